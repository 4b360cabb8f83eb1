"""One checkpoint on all ranks of a group: the same everywhere, or sent by rank 0 to those that have none."""

from __future__ import annotations

import os
from dataclasses import replace

from ..distributed.agreement import check_versions, together
from ..distributed.group import Group
from ..distributed.transfer import send_folder
from ..errors import CheckpointError, DgemmaError, human
from ..files import cache_folder
from .find import digest, find, settings_of
from .folder import Checkpoint


def open_together(path: str | os.PathLike | None, group: Group) -> Checkpoint:
    """The checkpoint that `find` names, opened on every rank.

    A rank that does not find it takes a copy that it was sent before, else rank 0 sends its folder.

    Raises:
        CheckpointError: rank 0 does not have it, or a rank has another or a broken one, on every rank.
        CircumstanceError: the ranks' versions differ.
    """
    if group.size == 1:
        return Checkpoint.open(find(path))
    check_versions(group)

    def opened() -> Checkpoint | None:
        try:
            folder = find(path)
        except DgemmaError:
            if group.rank == 0:
                raise
            return None
        return Checkpoint.open(folder)

    found = together(group, opened)
    mine = together(group, lambda: [digest_of(found), found.path.name] if found else None)
    wanted, name = group.share(mine)
    kept = cache_folder() / "ranks" / wanted / name
    found = together(group, lambda: Checkpoint.open(kept) if found is None and kept.exists() else found)
    if any(group.gather_values(found is None)):
        source = found.path if found is not None else kept
        names = files_of(found) if found is not None and group.rank == 0 else []
        send_folder(group, source, names, kept if found is None else None)

        def received() -> Checkpoint:
            if found is not None:
                return found
            new = Checkpoint.open(kept)
            note = f"{human(new.nbytes)} were received from rank 0 and are kept in {kept}."
            return replace(new, notes=(*new.notes, note))

        found = together(group, received)

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
    """What tells a checkpoint from others, as `find.digest`."""
    return digest(checkpoint.path, checkpoint.tensors)


def files_of(checkpoint: Checkpoint) -> list[str]:
    """The files that a checkpoint is read from, relative to its folder."""
    weights = {info.file for info in checkpoint.tensors.values()}
    return sorted(str(file.relative_to(checkpoint.path)) for file in {*settings_of(checkpoint.path), *weights})
