"""What a process does that `mlx.launch` started: watch, follow, or run the command as rank 0."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..distributed.launched import CHILD, place_of
from ..distributed.meeting import Fact
from ..distributed.watched import watched
from ..errors import DgemmaError, failure

if TYPE_CHECKING:
    from ..engine import Engine

ALIKE = ("tune",)  # commands that every rank runs by itself


def take_part() -> int | None:
    """Do the part of a rank; returns its exit code. None: run the command, alone, as rank 0, or as all ranks do.

    Raises:
        CircumstanceError: the launcher's variables cannot be used.
    """
    if CHILD in os.environ:
        command = next((one for one in sys.argv[1:] if not one.startswith("-")), "")
        if (me := watched()) is None or me.place.rank == 0 or command in ALIKE:
            os.environ["MLX_DGEMMA_NO_SERVER"] = "1"  # who asks for ranks does not want another process to answer
            return None
        from .following import follow

        return follow(me)
    place = place_of()
    if place is None:
        return None
    from ..distributed.supervisor import supervise

    trouble = ""
    try:
        facts = facts_of(sys.argv[1:], os.environ)
    except (DgemmaError, OSError) as error:  # rank 0's command tells its own
        facts, trouble = [], failure(place.rank, error)
    return supervise(place, facts, trouble)


def facts_of(arguments: Sequence[str], environment: Mapping[str, str]) -> list[Fact]:
    """In what the ranks of a command line must be equal, as far as it shows before anything heavy is imported.

    Raises:
        CheckpointError: the checkpoint is broken.
        OSError: one of its files cannot be read.
    """
    from ..checkpoint.find import digest_of_path

    model, words = environment.get("MLX_DGEMMA_MODEL"), list(arguments)
    for word, following in zip(words, [*words[1:], None]):
        if word == "--":
            break
        if word in ("-m", "--model"):
            model = following
        elif attached := re.fullmatch(r"(?:--model=|-m)(.+)", word):
            model = attached[1]
    install = "install the same version on every machine"
    found = digest_of_path(model) if model else None
    return [
        Fact("mlx-dgemma", __version__, install),
        Fact("MLX", metadata.version("mlx"), install),
        Fact(
            "the checkpoint", found and found[:12],
            f"copy rank 0's {model} to its machine, or remove it there to have it sent",
        ),
    ]  # fmt: skip


def load(name: str | None, whole: bool = False, **keywords: Any) -> Engine:
    """An engine of this process, or of all ranks together; takes what `mlx_dgemma.load` takes and raises the same.

    With `whole` it is this process's own even if there are other ranks.

    Raises:
        CircumstanceError: the ranks do not find each other, or differ in versions or checkpoints.
    """
    if (me := watched()) is None or whole:
        from ..engine import load as load_alone

        return load_alone(name, **keywords)
    from .leading import lead

    return lead(me, name, **keywords)
