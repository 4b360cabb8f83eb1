"""What ranks must agree on: that all have succeeded, that all have the same, whether any of them wants to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import mlx.core as mx

from ..errors import CircumstanceError, DgemmaError
from .group import Group

T = TypeVar("T")


def together(group: Group, work: Callable[[], T]) -> T:
    """What `work` returns on this rank, once it has succeeded on all. It must not wait for other ranks.

    Raises:
        DgemmaError: this rank's own error; CircumstanceError: that of the first rank that failed, with its number.
    """
    own: DgemmaError | None = None
    result: Any = None
    try:
        result = work()
    except DgemmaError as error:
        own = error
    failed = group.gather_values(None if own is None else str(own))
    if own is not None:
        raise own
    for rank, message in enumerate(failed):
        if message is not None:
            raise CircumstanceError(f"Rank {rank} of {group.size} failed: {message}")
    return result


def check_equal(group: Group, told: Mapping[str, Any]) -> None:
    """Check that all ranks tell the same.

    Args:
        group: the ranks.
        told: names, which a sentence can hold, with values as JSON knows them.

    Raises:
        CircumstanceError: on every rank, where one tells something else than rank 0.
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
