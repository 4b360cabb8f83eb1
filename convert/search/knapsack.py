"""Widths under a size: of each module one choice, the least sum of costs within a number of bytes.

This module is plain arithmetic and does not import MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

UNITS = 1 << 15  # into which the bytes are divided


@dataclass(frozen=True)
class Choice:
    """One way to store a module: `name`, its `nbytes`, and what it costs."""

    name: str
    nbytes: int
    cost: float


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of cost over bytes, smallest first."""
    found: list[Choice] = []
    for one in sorted(choices, key=lambda one: (one.nbytes, one.cost)):
        if found and one.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], one):
            found.pop()
        found.append(one)
    return found


def _slope(a: Choice, b: Choice) -> float:
    return (b.cost - a.cost) / (b.nbytes - a.nbytes)


def best(modules: Mapping[str, Sequence[Choice]], nbytes: int, units: int = UNITS) -> dict[str, Choice]:
    """The cheapest choices that fit.

    Exact over sizes that are rounded up to a unit, by dynamic programming over the modules; what the rounding leaves
    free is then given to the upgrade that saves most, as long as one fits.

    Args:
        modules: {path: its choices}.
        nbytes: that all of them may take together.
        units: number of units.

    Returns:
        {path: its choice}.

    Raises:
        ValueError: the smallest choices do not fit.
    """
    least = {path: min(choices, key=lambda one: one.nbytes) for path, choices in modules.items()}
    base = sum(one.nbytes for one in least.values())
    if base > nbytes:
        raise ValueError(f"the least that these modules take is {base} bytes")
    unit = max((nbytes - base) / units, 1.0)  # of bytes beyond each module's smallest choice
    room = int((nbytes - base) / unit)
    table, taken = np.zeros(room + 1), []
    for path, choices in modules.items():
        after = np.full(room + 1, np.inf)
        which = np.zeros(room + 1, np.int16)
        for number, one in enumerate(choices):
            more = int(np.ceil((one.nbytes - least[path].nbytes) / unit))
            if more <= room:
                reached = table[: room + 1 - more] + one.cost
                better = reached < after[more:]
                after[more:][better] = reached[better]
                which[more:][better] = number
        table = np.minimum(after, np.inf)
        taken.append((path, which))
    chosen: dict[str, Choice] = {}
    at = room
    for path, which in reversed(taken):
        one = modules[path][int(which[at])]
        chosen[path] = one
        at -= int(np.ceil((one.nbytes - least[path].nbytes) / unit))
    chosen = {path: chosen[path] for path in modules}
    _fill(modules, chosen, nbytes)
    return chosen


def greedy(modules: Mapping[str, Sequence[Choice]], nbytes: int) -> dict[str, Choice]:
    """As `best`, by upgrades along the convex hulls in order of what a byte saves.

    It is at most one module's step away from the best; `best` is never worse but for its units.

    Raises:
        ValueError: the smallest choices do not fit.
    """
    hulls = {path: hull(choices) for path, choices in modules.items()}
    chosen = {path: one[0] for path, one in hulls.items()}
    free = nbytes - sum(one.nbytes for one in chosen.values())
    if free < 0:
        raise ValueError(f"the least that these modules take is {nbytes - free} bytes")
    steps = sorted(
        ((_slope(a, b), path, b) for path, one in hulls.items() for a, b in pairwise(one)),
        key=lambda step: (step[0], step[1], step[2].nbytes),
    )
    for _, path, one in steps:
        more = one.nbytes - chosen[path].nbytes
        if 0 < more <= free:
            chosen[path], free = one, free - more
    _fill(modules, chosen, nbytes)
    return chosen


def bound(modules: Mapping[str, Sequence[Choice]], nbytes: int) -> float:
    """What no choice within so many bytes can fall below: the sum of costs if modules could mix two choices."""
    hulls = [hull(choices) for choices in modules.values()]
    total, free = sum(one[0].cost for one in hulls), float(nbytes - sum(one[0].nbytes for one in hulls))
    for slope, size in sorted((_slope(a, b), b.nbytes - a.nbytes) for one in hulls for a, b in pairwise(one)):
        part = min(size, free)
        total, free = total + slope * part, free - part
    return total


def _fill(modules: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], nbytes: int) -> None:
    """Spend the bytes that are left on upgrades, each time the one that saves most."""
    free = nbytes - sum(one.nbytes for one in chosen.values())
    while True:
        found = [
            (chosen[path].cost - one.cost, path, one)
            for path, choices in modules.items()
            for one in choices
            if one.cost < chosen[path].cost and one.nbytes - chosen[path].nbytes <= free
        ]
        if not found:
            return
        _, path, one = max(found, key=lambda entry: entry[0])
        free -= one.nbytes - chosen[path].nbytes
        chosen[path] = one
