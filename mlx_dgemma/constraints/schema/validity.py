"""Whether a JSON value is valid for a `Flat`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .flat import Flat, Node, same
from .formats import is_of_format
from .keywords import is_type

Check = Callable[[Any, Node], bool]


def is_valid_flat(value: Any, flat: Flat, check: Check) -> bool:
    """Whether a value is valid; `check` looks at the values within."""
    if not any(is_type(kind, value) for kind in flat.types):
        return False
    if flat.values is not None and not any(same(value, one) for one in flat.values):
        return False
    if any(same(value, one) for one in flat.excluded):
        return False
    if isinstance(value, str):
        return (
            _within(len(value), flat.characters)
            and all(re.search(pattern, value) for pattern in flat.patterns)
            and all(is_of_format(name, value) for name in flat.formats)
        )
    if isinstance(value, list):
        return _array(value, flat, check)
    if isinstance(value, dict):
        return _object(value, flat, check)
    return not is_type("number", value) or (
        in_bounds(value, flat) and all(is_multiple(value, step) for step in flat.multiples)
    )


def in_bounds(number: float, flat: Flat) -> bool:
    """Whether a number is within a schema's bounds."""
    low, high = flat.low, flat.high
    return (low is None or number > low.value or (number == low.value and not low.exclusive)) and (
        high is None or number < high.value or (number == high.value and not high.exclusive)
    )


def is_multiple(number: float, step: float) -> bool:
    """Whether a number is a multiple both as it is written and as floats are divided."""
    exact = (Fraction(str(number)) / Fraction(str(step))).denominator == 1
    return exact and (number % step == 0 if isinstance(step, int) else float(number / step).is_integer())


def _within(count: int, limits: tuple[int, int | None]) -> bool:
    return limits[0] <= count and (limits[1] is None or count <= limits[1])


def _array(value: list, flat: Flat, check: Check) -> bool:
    if not _within(len(value), flat.length):
        return False
    if flat.unique and any(same(one, other) for i, one in enumerate(value) for other in value[:i]):
        return False
    nodes = [*flat.prefix, *[flat.items or ()] * (len(value) - len(flat.prefix))]
    return all(map(check, value, nodes)) and all(
        sum(check(one, node) for one in value) >= least for node, least in flat.contains
    )


def _object(value: dict, flat: Flat, check: Check) -> bool:
    if not _within(len(value), flat.members) or any(key not in value for key in flat.required):
        return False
    for key, one in value.items():
        nodes = [node for pattern, node in flat.patterned if re.search(pattern, key)]
        if key in flat.properties:
            nodes.append(flat.properties[key])
        elif not nodes and flat.additional is not None:
            nodes.append(flat.additional)
        if not check(key, flat.names) or not all(check(one, node) for node in nodes):
            return False
    return True
