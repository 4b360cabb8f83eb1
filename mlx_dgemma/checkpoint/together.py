"""One checkpoint on all ranks of a group: the same everywhere, or sent by rank 0 to those that have none."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from ..distributed.agreement import check_versions, together
from ..distributed.group import Group
from ..distributed.transfer import send_folder
from ..errors import CheckpointError, DgemmaError, human
from ..files import cache_folder
from .find import SETTINGS, find
from .folder import Checkpoint

SAMPLE = 256  # bytes from the middle of each tensor


def open_together(path: str | os.PathLike | None, group: Group) -> Checkpoint:
    """The checkpoint that `find` names, opened on every rank.

    A rank that does not find it takes a copy that it was sent before, else rank 0 sends its folder.

    Raises:
        CheckpointError: rank 0 does not have it, or a rank has another one, on every rank.
        CircumstanceError: the ranks' versions differ.
    """
    if group.size == 1:
        return Checkpoint.open(find(path))
    check_versions(group)
    found: Checkpoint | None = None
    problem: DgemmaError | None = None
    try:
        found = Checkpoint.open(find(path))
    except DgemmaError as error:
        problem = error

    def of_rank_0() -> None:
        if group.rank == 0 and problem is not None:
            raise problem

    together(group, of_rank_0)
    wanted, name = group.share([digest_of(found), found.path.name] if found else None)
    kept = cache_folder() / "ranks" / wanted / name
    if found is None and kept.exists():
        found = Checkpoint.open(kept)
    if any(group.gather_values(found is None)):
        source = found.path if found is not None else kept
        names = files_of(found) if found is not None and group.rank == 0 else []
        send_folder(group, source, names, kept if found is None else None)
        if found is None:
            found = Checkpoint.open(kept)
            note = f"{human(found.nbytes)} were received from rank 0 and are kept in {kept}."
            found = replace(found, notes=(*found.notes, note))

    def checked() -> Checkpoint:
        assert found is not None
        if (mine := digest_of(found)) != wanted:
            raise CheckpointError(
                f"{found.path} is another checkpoint ({mine[:8]}) than rank 0's ({wanted[:8]}); copy rank 0's there, "
                "or remove it to have it sent."
            )
        return found

    return together(group, checked)


def digest_of(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's settings, of its tensors' names, shapes and dtypes, and of bytes of each tensor.

    It does not depend on how the tensors lie in files.
    """
    digest = hashlib.sha256()
    for file in _settings(checkpoint.path):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.start + max(info.nbytes - SAMPLE, 0) // 2)
            digest.update(stream.read(min(SAMPLE, info.nbytes)))
    return digest.hexdigest()


def files_of(checkpoint: Checkpoint) -> list[str]:
    """The files that a checkpoint is read from, relative to its folder."""
    weights = {info.file for info in checkpoint.tensors.values()}
    return sorted(str(file.relative_to(checkpoint.path)) for file in {*_every_setting(checkpoint.path), *weights})


def _every_setting(folder: Path) -> list[Path]:
    return sorted(file for pattern in SETTINGS for file in folder.glob(pattern) if not file.name.startswith("._"))


def _settings(folder: Path) -> list[Path]:
    """The files besides the weights; the index tells only where these lie."""
    return [file for file in _every_setting(folder) if not file.name.endswith(".index.json")]
