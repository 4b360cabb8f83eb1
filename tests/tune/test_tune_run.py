"""A whole run: the command, saves, resumption, refusals and the curves."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from support import GREEN, RED, refusal, square
from training import batch_of, weights

import mlx_dgemma
from mlx_dgemma.adapters import deltas
from mlx_dgemma.cli.commands import tune as cli_tune
from mlx_dgemma.cli.main import main
from mlx_dgemma.errors import DataError, MemoryLimitError, OptionError
from mlx_dgemma.model.layers import Layer
from mlx_dgemma.tune.config import RunConfig, TrainerConfig
from mlx_dgemma.tune.curves import COLUMNS, MetricsLog, draw_curves
from mlx_dgemma.tune.data import Example, Target
from mlx_dgemma.tune.objective import VARIANTS, draw_noise
from mlx_dgemma.tune.run import data_digest, model_digest
from mlx_dgemma.tune.run import tune as run_
from mlx_dgemma.tune.trainer import saved_options


def test_run_configs_are_checked():
    for name, value in (("batch_size", 0), ("save_every", 0), ("validate", 0)):
        assert refusal(OptionError, lambda n=name, v=value: RunConfig("a", Path("b"), **{n: v})) == (
            f"{name} is {value}; it should be at least 1."
        )
    assert refusal(OptionError, lambda: RunConfig("a", Path(""))) == "output is empty; give the folder to make."
    assert refusal(OptionError, lambda: RunConfig("a", Path("b"), self_conditioning=2.0)) == (
        "self_conditioning is 2.0; it should be from 0 to 1."
    )
    assert refusal(OptionError, lambda: RunConfig("a", Path("b"), noise_min=1.0)) == (
        "noise_min is 1.0; it should be above 0 and below 0.9999."
    )
    chosen = RunConfig("a", Path("b"), "megatron", noise_min=0.2).objective
    t = np.array(draw_noise(batch_of(0, rows=64), chosen, 40, mx.random.key(0)).t)
    assert 0.2 <= t.min() < 0.3 and 0.9 < t.max() <= 1


def test_a_log_continues_and_is_drawn(tmp_path):
    log = MetricsLog(tmp_path / "log.csv")
    for step in range(1, 6):
        log.add(step=step, seconds=step / 2, loss=1 / step, valid_loss=0.5 if step == 4 else None)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("2")  # of 21, by a process that was killed while it wrote
    again = MetricsLog(tmp_path / "log.csv", step=3)
    again.add(step=4, seconds=2.5, loss=0.25)
    again.complete(valid_loss=0.125)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert lines[4].split(",")[7] == "0.125"
    draw_curves(log.rows, tmp_path / "curves.png")
    full = (tmp_path / "curves.png").read_bytes()
    draw_curves([], tmp_path / "curves.png")
    assert len((tmp_path / "curves.png").read_bytes()) < len(full)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "log.csv"]


ANIMALS = "cat dog fox owl bear frog".split()
QUICKLY = ["--steps", "3", "--batch-size", "2", "--validate-every", "2", "--validate", "2", "--generate", "1"]


def data_in(folder, train=ANIMALS, valid=ANIMALS[:2]):
    """Data with words to say twice."""
    for name, words in (("train", train), *([("valid", valid)] if valid else [])):
        lines = [json.dumps({"prompt": f"Say {word} twice.", "completion": f"{word} {word}"}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder)


def tune(*arguments):
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def test_a_whole_run_from_the_command_line(tmp_path):
    """The files, the output, a YAML file, and errors."""
    data, out, config = data_in(tmp_path), tmp_path / "out", tmp_path / "tune.yaml"
    config.write_text("rank: 2\nencoder-weight: 0\ntargets: [attention]\nseed: 5\n")
    done = tune(data, "--output", out, "--config", config, *QUICKLY)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "weights on 6 samples, validating on 2; canvases are filled with <pad> after an answer." in done.stderr
    assert "step 2 of 3, loss " in done.stderr and "% of the answers right" in done.stderr
    assert "expected: 'cat cat'" in done.stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "curves.png", "log.csv", "state.safetensors",
    ]  # fmt: skip
    rows = (out / "log.csv").read_text().splitlines()
    assert len(rows) == 4
    assert [row.split(",")[7] != "" for row in rows[1:]] == [False, True, True]
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (2, 32)
    assert tune(data, "--output", out).stderr.endswith(
        f"Error: {out} is not empty; give another --output, or continue its run with --resume.\n"
    )
    again = tune(data, "--output", out, "--config", config, *QUICKLY, "--resume", "--fill", "0")  # which it had found
    assert again.stderr.endswith(f"{out} is done already: 3 steps.\n")
    data_in(tmp_path, ANIMALS[:3])
    more = tune(data, "--output", out, "--config", config, *QUICKLY, "--resume", "--fill", "0")
    assert "state.safetensors was trained with data " in more.stderr and more.exit_code == 1


def test_a_stopped_run_is_saved_and_continues_exactly(tmp_path):
    """The run stops after a step, as with Ctrl-C."""
    data = data_in(tmp_path, valid=[])
    method = TrainerConfig(rank=2, steps=3, learning_rate=0.01, layers=1)

    def train(output, stop, resume=False):
        engine = mlx_dgemma.load(dtype="float32")
        plan = RunConfig(data, output, batch_size=1, encoder_weight=0.0, fill=0)
        return engine, [one.step for one in run_(engine, method, plan, resume, stop)]

    whole, steps = train(tmp_path / "whole", lambda: False)
    assert steps == [1, 2, 3]
    _, steps = train(tmp_path / "parts", lambda: True)
    assert steps == [1]
    saved = (tmp_path / "parts" / "adapter_model.safetensors").read_bytes()
    rest, steps = train(tmp_path / "parts", lambda: False, resume=True)
    assert steps == [2, 3]
    assert (tmp_path / "parts" / "adapter_model.safetensors").read_bytes() != saved
    parts, one = (tmp_path / name / "adapter_model.safetensors" for name in ("parts", "whole"))
    assert parts.read_bytes() == one.read_bytes()
    mine, theirs = weights(rest.model), weights(whole.model)
    assert all((mine[path] == theirs[path]).all() for path in mine)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--variant", "google", "--fill", "4000"], "--fill is 4000; it should be a token id below 2048."),
        (["--layers", "9", "--fill", "0"], "--layers is 9; the model has 6."),
        (["--kind", "dora", "--targets", "experts", "--fill", "0"],
         "DoRA does not support experts; leave experts out of --targets, or use lora."),
        (["--compute-dtype", "float16"],
         "--compute-dtype is for answers, and gradients need the model's own dtype; leave it out."),
        (["--resume", "--fill", "0"], "OUT has no state.safetensors to resume from; start a new run without --resume."),
    ],
)  # fmt: skip
def test_runs_that_are_refused(tmp_path, arguments, sentence):
    out = tmp_path / "out"
    done = tune(data_in(tmp_path), "--output", out, *arguments)
    assert done.exit_code == (1 if "--resume" in arguments else 2)
    last = done.stderr.splitlines()[-1]
    assert last == "Error: " + sentence.replace("OUT", str(out))
    assert not out.exists()


def test_a_killed_run_can_be_resumed(tmp_path):
    """Even before its first save, and if it ended between writing two files."""
    data, out = data_in(tmp_path, valid=[]), tmp_path / "out"
    engine = mlx_dgemma.load(dtype="float32")
    plan = RunConfig(data, out, batch_size=1, encoder_weight=0.0, fill=0)
    method = TrainerConfig(rank=2, steps=2, layers=1)
    run = run_(engine, method, plan)
    next(run)
    run.close()
    assert (engine.model.training, engine.model._apply) == (False, Layer.__call__)
    assert "state.safetensors" in {file.name for file in out.iterdir()}
    again = run_(mlx_dgemma.load(dtype="float32"), method, plan, resume=True)
    assert [one.step for one in again] == [1, 2]
    (out / "adapter_model.safetensors").unlink()
    assert list(run_(mlx_dgemma.load(dtype="float32"), method, plan, resume=True)) == []
    assert (out / "adapter_model.safetensors").exists()


def test_a_run_is_resumed_with_the_options_it_had(tmp_path):
    """Named again, they are compared."""
    data, out = data_in(tmp_path, valid=[]), tmp_path / "out"
    chosen = ["--rank", 2, "--layers", 1, "--fill", 0, "--batch-size", 1, "--encoder-weight", 0, "--targets", "mlp"]
    assert tune(data, "--output", out, *chosen, "--steps", 1).exit_code == 0
    done = tune(data, "--output", out, "--resume")
    assert done.stderr.endswith(f"{out} is done already: 1 step.\n"), done.stderr
    for named, sentence in (
        (["--rank", 3], "rank 2, and now it is 3"),
        (["--batch-size", 2], "batch_size 1, and now it is 2"),
        (["--steps", 1000], "steps 1, and now it is 1000"),
    ):
        assert f"was trained with {sentence};" in tune(data, "--output", out, "--resume", *named).stderr
    assert saved_options(out) == {
        **vars(TrainerConfig(rank=2, layers=1, targets=("mlp",), steps=1)),
        **{n: v for n, v in vars(RunConfig(data, out, batch_size=1, encoder_weight=0.0, fill=0)).items()
           if n not in ("data", "output")},
    }  # fmt: skip


def test_a_checkpoint_is_told_by_its_configuration_and_its_tensors():
    def digest(config, **tensors):
        found = {name: SimpleNamespace(dtype=dtype, shape=shape) for name, (dtype, shape) in tensors.items()}
        return model_digest(SimpleNamespace(raw_config=config, tensors=found))

    base = digest({"a": 1}, x=("F32", (2, 3)), y=("F32", (4,)))
    assert base == digest({"a": 1}, y=("F32", (4,)), x=("F32", (2, 3)))
    others = [
        digest({"a": 2}, x=("F32", (2, 3)), y=("F32", (4,))),
        digest({"a": 1}, x=("F32", (2, 3))),
        digest({"a": 1}, x=("BF16", (2, 3)), y=("F32", (4,))),
        digest({"a": 1}, x=("F32", (3, 2)), y=("F32", (4,))),
    ]
    assert base not in others


def test_data_are_compared_by_content(tmp_path):
    """A picture by its file's bytes, wherever it lies."""

    def example(*images, answer=(5, 6)):
        return Example("", [Target([1, 2], list(answer), list(images))], {})

    red, moved = tmp_path / "red.png", tmp_path / "elsewhere.png"
    square(RED).save(red)
    moved.write_bytes(red.read_bytes())
    url = "data:image/png;base64," + base64.b64encode(red.read_bytes()).decode()
    digest = data_digest([example(str(red))])
    assert digest == data_digest([example(str(moved))]) == data_digest([example(url)])
    square(GREEN).save(moved)
    others = [[example(str(moved))], [example()], [example(str(red), str(red))], [example(str(red))] * 2]
    others.append([example(str(red), answer=(5, 7))])
    assert len({digest, *map(data_digest, others)}) == 6


def test_a_run_that_needs_too_much_memory_is_refused(tmp_path, monkeypatch):
    engine, plan = (
        mlx_dgemma.load(dtype="float32"),
        RunConfig(data_in(tmp_path), tmp_path / "out", batch_size=2, fill=0),
    )
    monkeypatch.setattr("mlx_dgemma.model.device.available", lambda: 2**20)
    message = refusal(MemoryLimitError, list, run_(engine, TrainerConfig(rank=2, steps=1), plan))
    assert message.startswith("Training needs about 0.")
    assert message.endswith(
        " GiB of memory, but this machine has 0.0 GiB; lower --batch-size or --max-length, or try it anyway with "
        "--ignore-memory."
    )
    assert not (tmp_path / "out").exists()


def test_a_broken_log_is_refused(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("step,loss\n1,a\n")
    assert refusal(DataError, MetricsLog, file, 3) == f"{file} is broken; remove it to start a new log."


def test_the_command_knows_every_objective_and_target():
    assert tuple(VARIANTS) == cli_tune.VARIANTS
    assert (*deltas.GROUPS, "self-conditioning") == cli_tune.TARGETS


def test_yaml_files_are_checked(tmp_path, monkeypatch):
    config = tmp_path / "tune.yaml"
    for text, sentence in (
        ("rank: 2.7", f"{config} sets rank to 2.7; it should be a whole number."),
        ("rank: [1]", f"{config} sets rank to [1]; it should be a whole number."),
        ("resume: 1", f"{config} sets resume to 1; it should be true or false."),
        ("targets: 3", f"{config} sets targets to 3; it should be a list of words."),
        ("output: 5", f"{config} sets output to 5; it should be a text."),
        (
            "learning-rate: 1e-4",
            f"{config} sets learning_rate to '1e-4'; it should be a number (YAML reads 1e-4 as a word: write 1.0e-4).",
        ),
        ("rnak: 3", f"{config} sets rnak, which is no option of tune; see mlx-dgemma tune --help."),
        ("- 3", f"{config} holds no names with values; write lines such as rank: 16."),
    ):
        config.write_text(text)
        done = tune(tmp_path, "--config", config)
        assert (done.exit_code, done.stderr) == (1, f"Error: {sentence}\n")
    monkeypatch.setenv("MLX_DGEMMA_MODEL", "somewhere")
    config.write_text("model: here")
    assert tune(tmp_path, "--config", config).stderr == (
        f"Error: {config} sets model, and so does $MLX_DGEMMA_MODEL; unset one of them.\n"
    )
    config.write_text("rank: [")
    assert tune(tmp_path, "--config", config).stderr.startswith(f"Error: {config} is not valid YAML (while parsing")
