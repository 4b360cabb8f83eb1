"""Atomic files and folders: whole or not at all, at whatever instant the process is killed."""

import errno
import os
import shutil
import socket
import subprocess
import sys

import pytest
from kills import instants
from support import refusal

from mlx_dgemma import files
from mlx_dgemma.errors import DgemmaError, OptionError
from mlx_dgemma.files import atomic_file, atomic_folder, remove_leftovers, require_absent, sweep_folder

HOST = "".join(c for c in socket.gethostname() if c.isalnum() or c == "_")[:32]


def write_folder(target, text, replace=True):
    with atomic_folder(target, 10, "--output", replace=replace) as draft:
        for name in ("a", "b"):
            (draft / name).write_text(text)


def write_file(target, text):
    with atomic_file(target) as draft:
        draft.write_text(text)


def content(target):
    """The texts in a file or folder; None if it does not exist."""
    if target.is_dir():
        return {one.name: one.read_text() for one in target.iterdir()}
    return target.read_text() if target.exists() else None


@pytest.fixture
def dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_at_any_instant_leaves_the_old_or_the_new_and_a_rerun_works(
    tmp_path, monkeypatch, kind, existing, exchange
):
    """Without an exchange, the old folder may lie aside until the rerun puts it back."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write = write_file if kind == "file" else write_folder
    place = tmp_path / "place"
    place.mkdir()
    if existing:
        write(place / "out", "old")
    old = content(place / "out")
    snapshots = instants(place, tmp_path / "seen", lambda: write(place / "out", "new"))
    new = content(place / "out")
    seen = []
    for folder in snapshots:
        if not (exchange or kind == "file"):
            remove_leftovers(folder / "out")
        seen.append(content(folder / "out"))
        assert seen[-1] in (old, new)
        write(folder / "out", "rerun")
        assert os.listdir(folder) == ["out"]
        assert "rerun" in str(content(folder / "out"))
    assert old in seen and new in seen


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "new" / "out"
    for write, keep in ((atomic_file, tmp_path / "file"), (lambda path: atomic_folder(path, 1, "OUT"), target)):
        with pytest.raises(KeyboardInterrupt), write(keep):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_leftovers_of_dead_processes_of_this_host_are_removed(tmp_path, dead):
    gone = [f".out.partial-{HOST}-{dead}-0", f".out.partial-{HOST}-{os.getpid()}-3.txt"]
    kept = [
        f".out.partial-{HOST}-{os.getppid()}-0",  # runs
        f".out.partial-elsewhere-{dead}-0",
        f".out.partial-{HOST}-{'9' * 30}-0",
        ".out.partial-1",
        f".outer.partial-{HOST}-{dead}-0",
        "out.partial",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])
    with atomic_file(tmp_path / "x") as draft:
        sweep_folder(tmp_path)
        assert draft.exists()
    assert sorted(os.listdir(tmp_path)) == sorted({*kept, "out", "x"} - {f".outer.partial-{HOST}-{dead}-0"})


def test_long_names_have_drafts_of_a_legal_length(tmp_path, dead):
    name = "é" * 125
    write_folder(tmp_path / name, "old")
    aside = f".{'é' * 60}.replaced-{HOST}-{dead}-0"
    (tmp_path / name).rename(tmp_path / aside)
    sweep_folder(tmp_path)
    assert os.listdir(tmp_path) == [aside]  # its name is not known
    remove_leftovers(tmp_path / name)
    assert content(tmp_path / name) == {"a": "old", "b": "old"}


def test_names_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"mod\xff")
    assert refusal(OptionError, require_absent, path, "OUT") == (
        f"{tmp_path}/mod\\udcff is not a name in UTF-8; choose another one."
    )


LIMITED = """
import resource, sys
import mlx.core as mx
from pathlib import Path
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import atomic_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_file(Path(sys.argv[1])) as draft:
        mx.save_safetensors(str(draft), {"a": mx.zeros((1000,))})
except DgemmaError as error:
    print(error)
"""


def test_a_limit_on_sizes_is_told_even_where_mlx_writes(tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, target], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"{target} becomes larger than a file may be here; raise that limit (see `ulimit -f`) and try again.\n"
    )
    assert content(tmp_path) == {"a.safetensors": "old"}


@pytest.mark.parametrize(
    ("number", "file_message", "folder_message"),
    [
        (
            errno.ENOSPC,
            "The disk is full, so that {}/out cannot be written; free some space and try again.",
            "The disk under {} is full, and the result takes 10 bytes; free some space or choose another --output.",
        ),
        (
            errno.EFBIG,
            "{}/out becomes larger than a file may be here; raise that limit (see `ulimit -f`) and try again.",
            "A file of {}/out becomes larger than a file may be here; raise that limit (see `ulimit -f`) or choose "
            "another --output.",
        ),
        (
            errno.EIO,
            "{}/out cannot be written (Input/output error); mend that and try again.",
            "{} cannot be used (Input/output error); fix that or choose another --output.",
        ),
    ],
)
def test_a_disk_that_fails_at_the_last_moment(tmp_path, monkeypatch, number, file_message, folder_message):
    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    assert refusal(DgemmaError, write_file, tmp_path / "out", "new") == file_message.format(tmp_path)
    assert refusal(DgemmaError, write_folder, tmp_path / "out", "new") == folder_message.format(tmp_path)
    assert os.listdir(tmp_path) == []
    assert refusal(DgemmaError, write_file, tmp_path / "no" / "out", "new") == (
        f"{tmp_path}/no/out cannot be written (No such file or directory); mend that and try again."
    )


def test_an_exchange_that_fails_keeps_the_old_folder(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = type(tmp_path).rename

    def fail(self, other):
        if "partial" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, other)

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    assert "Input/output error" in refusal(DgemmaError, write_folder, tmp_path / "out", "new")
    assert content(tmp_path / "out") == {"a": "old", "b": "old"}
    assert os.listdir(tmp_path) == ["out"]
    shutil.rmtree(tmp_path / "out")
