"""Several processes that compute one model: their group, and how weights are dealt to them."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing's: a command of one process imports nothing here
if TYPE_CHECKING:
    from .watched import Watched

# Without one of these variables `launched.place_of` finds no launcher; the last one is `launched.CHILD`.
VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_DGEMMA_WATCHED")


def is_launched() -> bool:
    """Whether a launcher may have started this process, as one of several."""
    return any(name in os.environ for name in VARIABLES)


def rank_here() -> Watched | None:
    """What this process is as a rank, as `watched.watched` says; None: it is alone."""
    if not is_launched() and f"{__name__}.watched" not in sys.modules:
        return None
    from .watched import watched

    return watched()
