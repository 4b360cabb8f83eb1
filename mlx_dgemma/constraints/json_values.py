r"""Plain patterns of JSON text: strings, arrays, objects, formats.

Inside brackets, and behind , and : there may be nothing, a space, or a new line with any indentation. What json.dumps
writes thus matches with and without `indent`. Strings have no \u escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .patterns import ALL_CODE_POINTS, JSON_ESCAPED, SURROGATES, character_class, literal, subtract

SPACE = r"(?: |\x{a} *)?"
COMMA = "," + SPACE
_ESCAPES = "(?:" + "|".join(map(literal, '"\\/bfnrt')) + ")"
_UNESCAPED = character_class(subtract([ALL_CODE_POINTS], SURROGATES, *JSON_ESCAPED))
CHARACTER = f"(?:{_UNESCAPED}|{literal(chr(92))}{_ESCAPES})"  # of a string
STRING = f'"{CHARACTER}*"'

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # Python has no year 0
_FOURS = "(?:0[48]|[2468][048]|[13579][26])"  # two digits divisible by four, 00 excepted
_LEAP_DAY = f"(?:[0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_DAY})"
_MINUTES = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_MINUTES}:[0-5][0-9](?:\x{{2e}}[0-9]{{1,6}})?(?:Z|(?:\x{{2b}}|-){_MINUTES})"
_HEX = "[0-9A-Fa-f]"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "-".join(f"{_HEX}{{{count}}}" for count in (8, 4, 4, 4, 12)),
}


def string_value(text: str) -> str:
    """One string, as json.dumps writes it. Only surrogates, which are no Unicode text, are escaped."""
    escaped = re.sub("[\ud800-\udfff]", lambda match: rf"\u{ord(match[0]):x}", json.dumps(text, ensure_ascii=False))
    return literal(escaped)


def repeated(pattern: str, low: int, high: int | None) -> str:
    """`pattern` from `low` to `high` times; None: without a limit."""
    if (low, high) == (0, None):
        return f"(?:{pattern})*"
    return f"(?:{pattern}){{{low},{'' if high is None else high}}}"


def bracketed(bracket: str, inside: str, may_be_empty: bool) -> str:
    """`inside` between a bracket, [ or {, and its counterpart.

    Args:
        may_be_empty: there may also be nothing between them.
    """
    inside = inside and inside + SPACE
    closing = {"[": "]", "{": "}"}[bracket]
    return literal(bracket) + SPACE + (f"(?:{inside})?" if may_be_empty and inside else inside) + literal(closing)


def object_of(members: Sequence[str], optional: Sequence[bool]) -> str:
    """An object with these members in this order.

    Args:
        members: patterns of "key": value.
        optional: which of them may be left out.
    """
    if all(optional):
        return bracketed("{", _some(members) if members else "", True)
    # One member is always there. Each member before it brings its comma behind it, each one after it before it.
    there = optional.index(False)
    before = "".join(f"(?:{member}{COMMA})?" for member in members[:there])
    after = "".join(
        f"(?:{COMMA}{member})?" if may_miss else COMMA + member
        for member, may_miss in zip(members[there + 1 :], optional[there + 1 :])
    )
    return bracketed("{", before + members[there] + after, False)


def _some(members: Sequence[str]) -> str:
    """One or more members in this order: the first of them is in one half or in the other. Takes O(n log n) text."""
    if len(members) == 1:
        return members[0]
    half = len(members) // 2
    rest = "".join(f"(?:{COMMA}{member})?" for member in members[half:])
    return f"(?:{_some(members[:half])}{rest}|{_some(members[half:])})"
