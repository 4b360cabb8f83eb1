"""Patterns in the plain syntax of `patterns` become expressions."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ..errors import OptionError
from .expressions import Expression, both, characters, choice, repeat, sequence, text, without
from .patterns import re_parser

MAX_PLAIN = 300_000  # characters; the parser takes a second or so for them


@lru_cache(maxsize=512)
def parse_plain(pattern: str) -> Expression:
    r"""The expression of a plain pattern. `re` parses it, which writes \U0000000a for \x{a}.

    Raises:
        OptionError: it is not in the plain syntax, or longer than MAX_PLAIN.
    """
    if len(pattern) > MAX_PLAIN:
        raise OptionError(f"The pattern takes {len(pattern):,} characters, and {MAX_PLAIN:,} are the most; shorten it.")
    try:
        tree = re_parser.parse(re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: rf"\U{int(found[1], 16):08x}", pattern))
    except (re.error, OverflowError) as error:
        raise OptionError(f"The pattern cannot be made into an automaton ({error}); simplify it.") from None
    return _sequence(list(tree))


def _sequence(items: list[Any]) -> Expression:
    parts: list[Expression] = []
    for i, (op, value) in enumerate(items):
        if op.name in {"ASSERT", "ASSERT_NOT"}:  # of what follows in this group, as a whole
            condition, rest = _sequence(list(value[1])), _sequence(items[i + 1 :])
            return sequence(*parts, (both if op.name == "ASSERT" else without)(rest, condition))
        parts.append(_item(op.name, value))
    return sequence(*parts)


def _item(op: str, value: Any) -> Expression:
    if op == "SUBPATTERN":
        return _sequence(list(value[-1]))
    if op == "BRANCH":
        return choice([_sequence(list(branch)) for branch in value[1]])
    if op == "MAX_REPEAT":
        low, high, body = value
        return repeat(_sequence(list(body)), int(low), None if high == re_parser.MAXREPEAT else int(high))
    if op == "LITERAL":
        return text(chr(value))
    ends = sorted(one[1] if one[0].name == "RANGE" else (one[1], one[1]) for one in value)
    merged: list[tuple[int, int]] = []
    for low, high in ends:
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if len(merged) == 1 and merged[0][0] == merged[0][1]:
        return text(chr(merged[0][0]))
    return characters(merged)
