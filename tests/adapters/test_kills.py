"""A kill of convert and fuse leaves what was there whole, a rerun succeeds, and nothing else remains.

`bench/kills.py` kills real processes at more instants; `tests/test_files.py` goes through all of the files' own.
"""

import os

import pytest
from adapter_models import save_lora
from kills import contents, drawn, instants

from mlx_dgemma.adapters.fuse import fuse, write_checkpoint
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import convert


@pytest.mark.parametrize("command", ["convert", "fuse"])
def test_a_killed_conversion_and_fusion_can_be_repeated(demo, tmp_path, command):
    adapter = save_lora(demo, tmp_path)

    def make(folder):
        if command == "fuse":
            fuse(adapter, folder / "out", demo)
        else:
            convert(demo, folder / "out", dtype="float16")

    (counted,) = instants(tmp_path, tmp_path / "counted", lambda: make(tmp_path), set())
    place = tmp_path / "place"
    place.mkdir()
    for folder in instants(place, tmp_path / "seen", lambda: make(place), drawn(int(counted.name), 4)):
        if not (folder / "out").exists():
            make(folder)
        assert os.listdir(folder) == ["out"]
        made = contents(folder / "out")
        assert {**made, "README.md": b""} == {**contents(place / "out"), "README.md": b""}  # which tells the time


def test_a_kill_while_a_model_is_replaced_leaves_the_old_or_the_new(demo, tmp_path):
    checkpoint = Checkpoint.open(demo)
    model, place = build(checkpoint, "float32"), tmp_path / "place"
    place.mkdir()
    (counted,) = instants(
        place, tmp_path / "counted", lambda: write_checkpoint(model, checkpoint, place / "model"), set()
    )
    old, flushes = contents(place / "model"), int(counted.name)
    model.model.decoder.layers[0].self_attn.q_proj.weight *= 0
    last = set(range(flushes - 4, flushes + 40)) | drawn(flushes, 2)  # the exchange, and the removal of the old one
    left = instants(place, tmp_path / "seen", lambda: write_checkpoint(model, checkpoint, place / "model"), last)
    new = contents(place / "model")
    assert old != new
    found = [contents(folder / "model") for folder in left]
    assert all(one in (old, new) for one in found)
    assert old in found and found[-2:] == [new, new]  # before the last removal, too
    write_checkpoint(model, checkpoint, left[-2] / "model")
    assert os.listdir(left[-2]) == ["model"]
