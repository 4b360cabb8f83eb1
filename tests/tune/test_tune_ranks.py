"""Training over two ranks of MLX's ring, beside one machine with the joined batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import training_rank_program
from support import refusal
from training import batch_of, trainer, weights
from training_rank_program import batches
from training_ranks import run_ranks

from mlx_dgemma.errors import DataError
from mlx_dgemma.tune import trainer as trainer_module

WORDS = "cat dog fox owl".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two ranks left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, words in (("data", WORDS), ("data0", WORDS), ("data1", [*WORDS[1:], "bee"])):
        (folder / name).mkdir()
        lines = [json.dumps({"prompt": f"Say {word}.", "completion": word}) for word in words]
        (folder / name / "train.jsonl").write_text("\n".join(lines))
    for code, out, err in run_ranks(folder, 2, Path(training_rank_program.__file__), folder):
        assert (code, out) == (0, ""), err
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def alone(steps=None):
    one = trainer(**training_rank_program.SETTINGS)
    return one, [one.update([batch]).total for batch in list(batches())[:steps]]


def test_two_ranks_train_as_one_machine_with_the_joined_batch(folder, told):
    one, losses = alone()
    assert told[0]["losses"] == told[1]["losses"] and told[0]["digest"] == told[1]["digest"]
    assert np.allclose(told[0]["losses"], losses, rtol=1e-5, atol=0)
    theirs = np.load(folder / "weights.npz")
    largest = max(np.abs(array - theirs[name]).max() for name, array in weights(one.model).items())
    assert largest < 1e-5
    for rows, value in zip((4, 3, 1), told[1]["valid"]):
        assert one.validation_loss(batch_of(7, rows), 0)[0].item() == pytest.approx(value, rel=1e-5)
    twice = trainer(accumulate=2)
    for step, value in enumerate(told[0]["twice"]):
        assert twice.update([batch_of(step, 2), batch_of(step + 50, 2)]).total == pytest.approx(value, rel=1e-5)


def test_two_ranks_train_as_two_processes_bit_for_bit(told, monkeypatch):
    """The same parts are summed: by MLX's ring, or by this process."""
    monkeypatch.setattr(trainer_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(trainer_module, "MIN_POSITIONS", 0)
    one, losses = alone(5)
    one.close()
    assert told[0]["losses"][:5] == losses


def test_a_run_over_ranks_resumes_exactly_and_with_as_many_ranks(folder, told):
    for rank in told:
        assert rank["rest"] == rank["losses"][training_rank_program.SAVED :] and rank["same"]
    message = refusal(DataError, lambda: trainer(**training_rank_program.SETTINGS).resume(folder, {"ranks": 1}))
    assert message.endswith(
        "was trained with ranks 2, and now it is 1; resume with the same value, or start a new run."
    )


def test_the_first_rank_writes_and_any_rank_stops_all(told):
    runs = [rank["run"] for rank in told]
    assert [run["first"][0] for run in runs] == [[1], [1]] and [run["second"][0] for run in runs] == [[2], [2]]
    assert runs[0]["second"][2] == runs[1]["second"][2] != runs[0]["first"][2]
    assert "adapter_model.safetensors" in runs[0]["files"] and runs[1]["files"] == []
    assert "GiB of memory is needed on each of 2 ranks" in runs[0]["first"][1][0]


def test_what_ranks_do_not_share_is_refused_on_all(told):
    assert [rank["failed"] for rank in told] == ["Rank 1: It is so."] * 2
    for rank in told:
        assert rank["any"] == [True, False]
        assert rank["equal"] == "Rank 1 has the data 1, and rank 0 has 0; give both the same."
        assert rank["dropout"] == (
            "dropout is 0.1, but 2 ranks would draw another one than a single machine; leave it out."
        )
        assert rank["run"]["odd"] == "batch_size is 3, which 2 ranks do not divide; give a multiple of theirs."
        assert rank["run"]["unequal"].startswith("Rank 1 has the training data '")
