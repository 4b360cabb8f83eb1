"""What kill -9 leaves at each instant of a piece of work: copies of a folder before every operation that changes it."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_watchers: list = []  # the hook cannot be taken away again


def _hook(event, arguments):
    if _watchers and (event in _CHANGES or (event == "open" and _writes(*arguments[1:]))):
        _watchers[-1](arguments)


sys.addaudithook(_hook)


def _writes(mode, flags):
    return any(sign in (mode or "") for sign in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def drawn(below: int, count: int, seed: int = 0) -> set[int]:
    """So many different numbers below a bound."""
    return set(Random(seed).sample(range(below), count))


def instants(folder: Path, copies: Path, work: Callable[[], object], points: set[int] | None = None) -> list[Path]:
    """Copies of `folder` as `work` would leave it if it were killed before each of its operations, and at its end.

    An operation opens a file for writing, writes at an offset, flushes, renames, makes or removes.

    Args:
        folder: what is watched.
        copies: where the copies are made.
        work: called once.
        points: numbers of the operations before which a copy is made; None for all.
    """
    made: list[Path] = []
    done = 0

    def watch(paths):
        nonlocal done
        if any(_within(path, folder) for path in paths):
            if points is None or done in points:
                copy()
            done += 1

    def copy():
        watcher = _watchers.pop()
        made.append(shutil.copytree(folder, copies / str(done), symlinks=True))
        _watchers.append(watcher)

    def watched(call):
        def operation(handle, *rest):
            watch([folder])
            return call(handle, *rest)

        return operation

    calls = os.pwrite, os.fsync
    os.pwrite, os.fsync = map(watched, calls)
    _watchers.append(watch)
    try:
        work()
        copy()
    finally:
        os.pwrite, os.fsync = calls
        _watchers.clear()
    return made


def _within(path, folder: Path) -> bool:
    return isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).absolute().is_relative_to(folder)
