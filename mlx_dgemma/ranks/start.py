"""What a process does that `mlx.launch` started: watch, follow, or run the command as rank 0."""

from __future__ import annotations

import os
import sys

from ..distributed.launched import CHILD, place_of

ALIKE = ("tune",)  # commands that every rank runs by itself


def take_part() -> int | None:
    """Do the part of a rank; returns its exit code. None: run the command, alone, as rank 0, or as all ranks do.

    Raises:
        CircumstanceError: the launcher's variables cannot be used.
    """
    if CHILD in os.environ:
        from ..distributed.watched import watched

        command = next((one for one in sys.argv[1:] if not one.startswith("-")), "")
        if (me := watched()) is None or me.place.rank == 0 or command in ALIKE:
            return None
        from .following import follow

        return follow(me)
    place = place_of()
    if place is None:
        return None
    from ..distributed.supervisor import supervise

    return supervise(place)
