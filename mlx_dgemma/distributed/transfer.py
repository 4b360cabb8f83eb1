"""Rank 0's files on the ranks that lack them: sent once, in bounded pieces, verified, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import DgemmaError
from ..files import atomic_folder
from .agreement import together
from .group import Group

PIECE = 2**23  # bytes of a message


def send_folder(group: Group, source: Path, names: Sequence[str], target: Path | None) -> None:
    """Send files of rank 0's folder to the ranks that ask for them. Every rank calls this.

    Args:
        group: the ranks.
        source: rank 0's folder; not looked at elsewhere.
        names: of the files in it, on rank 0.
        target: where this rank keeps them; None: it needs none. There is a whole folder or none.

    Raises:
        DgemmaError: a disk is full, or what arrived is not what was sent; on every rank.
    """
    files = names if group.rank == 0 else []
    listed = group.share(together(group, lambda: [(name, (source / name).stat().st_size) for name in files]))
    total = sum(size for _, size in listed)
    with ExitStack() as stack:

        def prepared() -> Path | None:
            return None if target is None else stack.enter_context(atomic_folder(target, total, "cache", replace=True))

        draft = together(group, prepared)
        failed: DgemmaError | None = None
        for name, size in listed:
            try:
                _send_file(group, source / name, draft and draft / name, size, failed is not None)
            except DgemmaError as error:
                failed = failed or error

        def finished() -> None:
            if failed is not None:
                raise failed

        together(group, finished)
        together(group, stack.close)


def _send_file(group: Group, source: Path, target: Path | None, size: int, drop: bool) -> None:
    """Send a file; every rank takes part in every message, whatever happens to its own copy."""
    digest, problem = hashlib.sha256(), None
    with ExitStack() as stack:
        given: BinaryIO | None = stack.enter_context(source.open("rb")) if group.rank == 0 else None
        kept: BinaryIO | None = None
        if target is not None and not drop:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                kept = stack.enter_context(target.open("wb"))
            except OSError as error:
                problem = error
        for start in range(0, size, PIECE):
            piece = np.zeros(min(PIECE, size - start), np.uint8)
            if given is not None:
                read = np.frombuffer(given.read(len(piece)), np.uint8)
                piece[: len(read)] = read
            piece = group.share_array(piece)
            digest.update(piece.data)
            if kept is not None and problem is None:
                try:
                    kept.write(piece.data)
                except OSError as error:
                    problem = error
    if problem is not None:
        raise DgemmaError(f"{target} cannot be written ({problem.strerror or problem}); free some space and try again.")
    if group.share(digest.hexdigest()) != (written(target) if kept is not None and target else digest.hexdigest()):
        raise DgemmaError(f"{target} is not what rank 0 has sent; try again.")


def written(file: Path) -> str:
    """SHA-256 of a file's content, as it lies on the disk."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
