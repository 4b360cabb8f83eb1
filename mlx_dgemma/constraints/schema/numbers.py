r"""Plain patterns of JSON numbers: free ones, and those between two bounds.

A bounded number has no exponent and up to DIGITS digits. Inside this module it is counted in units of its last
decimal: with two decimals, 1.25 is 125 units.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from ..patterns import any_of, literal

DIGITS = 15  # decimals of up to so many digits that differ as text differ as floats too

INTEGER = f"(?:0|-?[1-9][0-9]{{0,{DIGITS - 1}}})"
# json.dumps writes floats below 1e16 without an exponent. Values stay below 1e115, so none is read as infinity.
NUMBER = r"-?(?:0|[1-9][0-9]{0,15})(?:\x{2e}[0-9]+)?(?:[eE](?:\x{2b}|-)?[0-9]{1,2})?"


class Bound(NamedTuple):
    """One end of a range of numbers."""

    value: float
    exclusive: bool  # whether the value itself is outside


def bounded_integer(low: Bound | None, high: Bound | None) -> str | None:
    """The pattern of integers between two bounds, either of which may be missing; None if there are none."""
    return INTEGER if low is high is None else _range(low, high, 0)


def bounded_number(low: Bound | None, high: Bound | None) -> str | None:
    """The pattern of numbers between two bounds, either of which may be missing; None if there are none."""
    if low is high is None:
        return NUMBER
    whole_digits = max(len(str(abs(int(bound.value)))) for bound in (low, high) if bound)
    return _range(low, high, max(DIGITS - whole_digits, 0))


def _range(low: Bound | None, high: Bound | None, decimals: int) -> str | None:
    """Numbers between the bounds with up to `decimals` decimals.

    Bounds are compared as text, not as floats. With up to DIGITS digits both orders agree, so json.loads moves no
    number across a bound.
    """
    scale = 10**decimals
    first = last = None
    if low:
        units = _exact(low.value, decimals) * scale
        first = math.floor(units) + 1 if low.exclusive else math.ceil(units)
    if high:
        units = _exact(high.value, decimals) * scale
        last = math.ceil(units) - 1 if high.exclusive else math.floor(units)
    widest = 10**DIGITS * scale - 1
    if first is None:
        first = min(-widest, 10 * (last or 0))
    if last is None:
        last = max(widest, 10 * first)
    if first > last:
        return None
    parts = []
    if first < 0:
        parts.append("-" + _magnitudes(max(1, -last), -first, decimals))
    if last >= 0:
        parts.append(_magnitudes(max(0, first), last, decimals))
    return any_of(parts)


def _exact(bound: float, decimals: int) -> Fraction:
    """A bound as its text says; among integers, which are compared as numbers, its exact value."""
    return Fraction(str(bound)) if decimals else Fraction(bound)


def _magnitudes(first: int, last: int, decimals: int) -> str:
    """Unsigned decimals from `first` to `last` units."""
    scale = 10**decimals
    low, low_part = divmod(first, scale)
    high, high_part = divmod(last, scale)
    if low == high:
        return str(low) + _fraction(low_part, high_part, decimals)
    parts = []
    if low_part > 0:
        parts.append(str(low) + _fraction(low_part, scale - 1, decimals))
        low += 1
    if high_part < scale - 1:
        parts.append(str(high) + _fraction(0, high_part, decimals))
        high -= 1
    if low <= high:
        parts.append(_naturals(low, high) + _fraction(0, scale - 1, decimals))
    return any_of(parts)


def _fraction(first: int, last: int, decimals: int) -> str:
    """The point and the decimals behind it, from `first` to `last` units. Zeros at the end may be written or not."""
    if not decimals:
        return ""
    digits = literal(".") + _digits(f"{first:0{decimals}}", f"{last:0{decimals}}", True)
    return digits if first else f"(?:{digits})?"


def _naturals(first: int, last: int) -> str:
    """Whole numbers from `first` to `last`, without leading zeros."""
    low, high = str(first), str(last)
    if len(low) == len(high):
        return _digits(low, high)
    parts = [_digits(low, "9" * len(low))]
    if len(low) + 1 < len(high):
        parts.append(f"[1-9][0-9]{{{len(low)},{len(high) - 2}}}")
    parts.append(_digits("1" + "0" * (len(high) - 1), high))
    return any_of(parts)


def _digits(low: str, high: str, short: bool = False) -> str:
    """Strings of digits from `low` to `high`, which have the same length.

    Args:
        short: zeros at the end may be left out.
    """
    rest = len(low) - 1
    zeros, nines = "0" * rest, "9" * rest

    def behind(least: str, greatest: str) -> str:
        if not rest:
            return ""
        digits = _digits(least, greatest, short)
        return f"(?:{digits})?" if short and least == zeros else digits

    if low[0] == high[0]:
        return low[0] + behind(low[1:], high[1:])
    first, last = int(low[0]), int(high[0])
    parts = []
    if low[1:] > zeros:
        parts.append(low[0] + behind(low[1:], nines))
        first += 1
    if high[1:] < nines:
        parts.append(high[0] + behind(zeros, high[1:]))
        last -= 1
    if first <= last:
        free = f"[0-9]{{{0 if short else rest},{rest}}}" if rest else ""
        parts.append((f"[{first}-{last}]" if first < last else str(first)) + free)
    return any_of(parts)
