"""Real processes over loopback: one launch shows what threads cannot, MLX's own messages and a folder that is sent."""

import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from answers import few_answers
from ranks import launch, launched, on_threads
from support import engine_of

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli.commands.tune import first_rank_speaks
from mlx_dgemma.distributed import agreement, transfer, watched
from mlx_dgemma.distributed.group import ALONE, backend_of, init
from mlx_dgemma.errors import CheckpointError, CircumstanceError, DgemmaError, OptionError

PHASES = (
    "checkpoint.headers.read_header",
    "checkpoint.together.digest",
    "engine.load_tokenizer",
    "checkpoint.memory.resolve_dtype",
    "checkpoint.build.check_tied",
)


def test_processes_share_and_a_folder_is_sent_once(tmp_path):
    """Rank 1 has no such folder and a cache of its own; at last its copy is another than rank 0's."""
    (tmp_path / "model").symlink_to(DEMO)
    found = launch(2, Path(__file__).parent / "rank_program.py", tmp_path / "out", str(tmp_path / "model"))
    assert found["ranks"] == [[0, ""], [1, "x"]]
    assert found["shared"] == [5000, 5000]
    assert found["seeds"][0] == found["seeds"][1]
    assert found["answers"] == [few_answers(engine_of(DEMO))] * 2
    assert found["unseeded"][0] == found["unseeded"][1]
    received = next(note for note in found["notes"][1] if "received" in note)
    kept = tmp_path / "out-rank-1" / "mlx-dgemma" / "ranks"
    assert received.startswith("13.4 MB were received from rank 0 and are kept in ") and str(kept) in received
    assert not any("received" in note for note in [*found["notes"][0], *found["again"][1]])
    errors = found["error"]
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"CheckpointError Rank 1: {kept}") and "is another checkpoint" in errors[0]


def test_an_error_of_one_rank_is_told_to_all():
    def work(group):
        def make():
            if group.rank == 1:
                raise OptionError("no.")
            return group.rank

        with pytest.raises(OptionError, match=r"^Rank 1: no\.$"):
            agreement.together(group, make)

    on_threads(3, work)


@pytest.mark.parametrize("phase", PHASES)
def test_whatever_fails_on_one_rank_while_all_load_is_told_to_all(phase, monkeypatch):
    mine, (module, name) = threading.local(), phase.rsplit(".", 1)
    where = import_module(f"mlx_dgemma.{module}")
    real = getattr(where, name)

    def fail(*given, **more):
        if mine.rank == 1:
            raise MemoryError
        return real(*given, **more)

    def work(group):
        mine.rank = group.rank
        with pytest.raises(DgemmaError, match=r"^Rank 1 has failed \(MemoryError\)\.$"):
            mlx_dgemma.load(DEMO, group=group)

    monkeypatch.setattr(where, name, fail)
    on_threads(2, work)


def test_a_broken_checkpoint_of_one_rank_is_told_and_not_replaced(tmp_path):
    (tmp_path / "config.json").symlink_to(DEMO / "config.json")
    (tmp_path / "model.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes()[:10_000])

    def work(group):
        with pytest.raises(CheckpointError, match=r"^Rank 1: .*model\.safetensors is truncated: .*; download it again"):
            mlx_dgemma.load(tmp_path if group.rank else DEMO, group=group)

    on_threads(2, work)


def test_what_a_rank_fails_with_is_told(monkeypatch):
    class Rank(watched.Watched):
        def __init__(self):
            self.place = SimpleNamespace(rank=1)

        def fail(self, sentence):
            raise SystemExit(sentence)

    monkeypatch.setattr(watched, "TOLD_SECONDS", 0)
    for error, sentence in (
        (OptionError("no."), "Rank 1: no."),
        (FileNotFoundError(2, "No such file", "a.bin"), "Rank 1 has failed (No such file: a.bin)."),
        (BaseException("a panic\nof two lines"), "Rank 1 has failed (BaseException: a panic of two lines)."),
    ):
        with pytest.raises(SystemExit) as told, first_rank_speaks(Rank()):
            raise error
        assert str(told.value) == sentence


def test_other_versions_are_refused_on_every_rank(monkeypatch):
    def work(group):
        told = {"gather_values": lambda value: [["mlx-dgemma 9", *value[1:]] if i else value for i in range(2)]}
        group.gather_values = told["gather_values"]
        with pytest.raises(CircumstanceError, match=r"^Rank 1 has mlx-dgemma 9 .*install the same versions") as error:
            agreement.check_versions(group)
        assert error.value.exit_code == 1

    on_threads(2, work)


def test_bytes_that_change_on_the_way_are_refused(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a.bin").write_bytes(np.arange(200, dtype=np.uint8).tobytes())
    monkeypatch.setattr(transfer, "written", lambda file: "another")

    def work(group):
        target = tmp_path / "to" if group.rank else None
        with pytest.raises(DgemmaError, match=r"is not what rank 0 has sent; try again\."):
            transfer.send_folder(group, tmp_path / "from", ["a.bin"] if group.rank == 0 else [], target)

    on_threads(2, work)
    assert not (tmp_path / "to").exists()


def test_launchers_are_told_from_their_variables(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    rank = {"MLX_RANK": "0"}
    assert backend_of({}) is None
    assert backend_of({**rank, "MLX_HOSTFILE": str(hosts)}) == "ring"
    assert backend_of({**rank, "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "2"}) == "nccl"
    assert backend_of({**rank, "MLX_IBV_DEVICES": "x"}) == "jaccl"
    assert backend_of({"OMPI_COMM_WORLD_SIZE": "4"}) == "mpi"
    hosts.write_text("")  # what `mlx.launch -n 1` writes
    assert backend_of({**rank, "MLX_HOSTFILE": str(hosts)}) is None
    assert init() is ALONE


def test_mlx_launch_sets_what_ranks_read():
    code = "import json, os; print(os.environ['MLX_RANK'], len(json.load(open(os.environ['MLX_HOSTFILE']))))"
    assert launched(2, code) == ["0 2", "1 2"]


def test_a_backend_that_is_not_there_is_a_sentence():
    with pytest.raises(CircumstanceError, match=r"could not be joined by MLX's backend nccl .*mlx\.launch -n N"):
        init("nccl")
