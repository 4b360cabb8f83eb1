"""What all ranks must agree on before they compute together: versions, and that none of them has failed.

A rank that raised by itself would leave the others waiting in their next message, so that errors are told to all first,
those that nobody foresaw included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

import mlx.core as mx

from .. import __version__, errors
from ..errors import INTERRUPTS, CircumstanceError, DgemmaError, failure
from .group import Group

Made = TypeVar("Made")


def together(group: Group, make: Callable[[], Made]) -> Made:
    """What `make` returns here, once it has returned on every rank. `make` sends no messages.

    Raises:
        DgemmaError: that of the first rank where it failed, on every rank; of another error the sentence names the
            rank and the reason.
    """
    if group.size == 1:
        return make()
    made: list[Made] = []
    told, cause = None, None
    try:
        made.append(make())
    except DgemmaError as error:
        told = [type(error).__name__, failure(group.rank, error) if group.rank else str(error)]
    except INTERRUPTS:
        raise
    except BaseException as error:
        told, cause = [DgemmaError.__name__, failure(group.rank, error)], error
    for one in group.gather_values(told):
        if one is not None:
            kind, text = one
            raise getattr(errors, kind)(text) from cause
    return made[0]


def check_versions(group: Group) -> None:
    """Refuse ranks that compute with other versions, or on another kind of device, than rank 0.

    Raises:
        CircumstanceError: on every rank, about the first such one.
    """
    kind = "the CPU" if mx.default_device() == mx.cpu else "a GPU"
    ranks = group.gather_values([f"mlx-dgemma {__version__}", f"MLX {metadata.version('mlx')}", kind])
    for rank, found in enumerate(ranks):
        if found != ranks[0]:
            mine, theirs = (f"{one[0]} and {one[1]} on {one[2]}" for one in (found, ranks[0]))
            raise CircumstanceError(
                f"Rank {rank} has {mine}, but rank 0 has {theirs}; install the same versions on every machine, and let "
                "all compute on the same kind of device."
            )


def check_equal(group: Group, told: Mapping[str, Any]) -> None:
    """Refuse ranks that tell something else than rank 0.

    Args:
        group: the ranks.
        told: names, as a sentence holds them, with values as JSON knows them.

    Raises:
        CircumstanceError: on every rank, about the first such one.
    """
    first, *others = group.gather_values(dict(told))
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                raise CircumstanceError(
                    f"Rank {rank} has the {name} {other.get(name)!r}, and rank 0 has {value!r}; give both the same."
                )


def is_any(group: Group, flag: bool) -> bool:
    """Whether the flag is true on any rank."""
    return bool(flag) if group.size == 1 else group.sum(mx.array([int(flag)])).item() > 0  # type: ignore[operator]
