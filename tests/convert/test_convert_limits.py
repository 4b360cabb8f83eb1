"""Conversion is all or nothing, and its memory is bounded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import floats, left_in
from mlx.utils import tree_flatten
from safetensors_files import read_folder
from support import small_config

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import DEFAULT, convert
from mlx_dgemma.convert.writer import Entry, Writer
from mlx_dgemma.errors import DgemmaError, OptionError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

ROOT = Path(__file__).parent.parent.parent


# --- the writer -------------------------------------------------------------------------------------------------------


def test_a_write_that_the_system_cuts_short_is_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:7], at))
    values = np.arange(40, dtype=np.float32)
    with Writer(tmp_path, [[Entry("a", "F32", (40,))]]) as writer:
        writer.write("a", 0, values)
    assert mx.load(str(tmp_path / "model.safetensors"))["a"].tolist() == values.tolist()


@pytest.mark.parametrize(("limit", "shards"), [(16, 1), (15, 2)])
def test_a_shard_is_filled_up_to_its_limit(tmp_path, limit, shards):
    with Writer(tmp_path, [[Entry("a", "F32", (2,))], [Entry("b", "F32", (2,))]], limit):
        pass
    assert len(list(tmp_path.glob("*.safetensors"))) == shards


# --- all or nothing -----------------------------------------------------------------------------------------------


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(hf_checkpoint, tmp_path):
    target = tmp_path / "new" / "out"
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append(left_in(target.parent))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(hf_checkpoint, target, DEFAULT, progress=interrupt)
    ((draft,), *_) = seen
    assert draft.startswith(".out.partial-") and f"-{os.getpid()}-" in draft
    assert left_in(tmp_path) == []
    convert(hf_checkpoint, target, DEFAULT)
    assert left_in(target.parent) == ["out"]


def test_progress_counts_every_byte_once(hf_checkpoint, tmp_path):
    steps = []
    convert(hf_checkpoint, tmp_path / "out", DEFAULT, progress=lambda done, total: steps.append((done, total)))
    total = sum(len(data) for *_, data in read_folder(hf_checkpoint).values())
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_an_existing_output_is_refused(demo, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OptionError) as error:
        convert(demo, tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'out'} exists; delete it or choose another --mlx-path."
    assert left_in(tmp_path / "out") == []


def test_too_little_disk_space_is_refused_before_writing(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 7 * 10**6, 3 * 10**6))
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path} has 3.0 MB free, but the result takes 13.4 MB; free some space or choose another --mlx-path."
    )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "number, message",
    [
        (28, "The disk under {} is full, and the result takes 5.9 MB; free some space or choose another --mlx-path."),
        (122, "The disk under {} is full, and the result takes 5.9 MB; free some space or choose another --mlx-path."),
        (5, "{} cannot be used (Input/output error); fix that or choose another --mlx-path."),
    ],
)
def test_a_failing_disk_leaves_nothing(demo, tmp_path, monkeypatch, number, message):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "out", DEFAULT)
    assert str(error.value) == message.format(tmp_path)
    assert left_in(tmp_path) == []


def test_a_target_that_cannot_be_written(demo, tmp_path, monkeypatch):
    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "file").write_text("")
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "file" / "out")
    assert str(error.value) == (
        f"{tmp_path / 'file'} cannot be used (File exists); fix that or choose another --mlx-path."
    )
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DgemmaError) as error:
        convert(demo, tmp_path / "out")
    assert str(error.value) == f"{tmp_path} cannot be used (Permission denied); fix that or choose another --mlx-path."


# --- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from mlx_dgemma.convert import convert, conversion

def peak():
    status = Path("/proc/self/status")  # getrusage's peak is inherited from the parent on Linux
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
convert(sys.argv[1], sys.argv[2], "4bit")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_size_of_a_tensor(tmp_path):
    """An embedding of 420 MB; its two ends are compared."""
    config = small_config(("full_attention",), vocab_size=262144, hidden_size=800)
    source = tmp_path / "source"
    source.mkdir()
    shapes = {name: a.shape for name, a in tree_flatten(DiffusionGemma(ModelConfig.from_dict(config)).parameters())}
    writer = Writer(source, [[Entry(name, "BF16", shape)] for name, shape in shapes.items()])
    row = np.arange(800, dtype=np.float32).view(np.uint32) >> 16
    rows = np.tile(row.astype(np.uint16), (64, 1))
    embedding = "model.decoder.embed_tokens.weight"
    writer.write(embedding, 0, rows)
    writer.write(embedding, (262144 - 64) * 1600, rows)  # between the two the file is sparse
    writer.write("model.encoder.language_model.layers.0.layer_scalar", 0, np.ones(1, np.uint16))
    for name, shape in shapes.items():
        writer.write(name, 2 * int(np.prod(shape)) - 2, np.zeros(1, np.uint16))
    writer.finish()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (source / "model.safetensors").stat().st_size > 419_000_000
    assert int(done.stdout) < 300_000_000
    stored = Checkpoint.open(tmp_path / "out").tensors
    info = stored[embedding]
    with info.file.open("rb") as file:
        file.seek(info.start)
        assert (
            file.read(800) == np.array(mx.quantize(floats(("BF16", [64, 800], rows.tobytes())), 32, 8)[0])[0].tobytes()
        )
