r"""Expressions of JSON text: strings, arrays, objects.

Inside brackets, and behind , and : there may be nothing, a space, or a new line with any indentation. What json.dumps
writes thus matches with and without `indent`. Strings have no \u escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..checks import REQUIRED, UNIQUE, items_mark, length_mark
from ..expressions import EMPTY, Expression, characters, choice, graph, marked, optional, repeat, sequence, text
from ..patterns import ALL_CODE_POINTS, JSON_ESCAPED, SURROGATES, subtract
from ..plain import parse_plain

COUNTED = 1500  # states: what takes more to be counted is checked while it is written
COUNTED_CHARACTERS = 64

SPACE = parse_plain(r"(?: |\x{a} *)?")
COMMA = sequence(text(","), SPACE)
COLON = sequence(text(":"), SPACE)
UNESCAPED = characters(subtract([ALL_CODE_POINTS], SURROGATES, *JSON_ESCAPED))
CHARACTER = choice([UNESCAPED, parse_plain(r'\x{5c}["\x{5c}/bfnrt]')])


def quoted(content: Expression) -> Expression:
    """A string with this content."""
    return sequence(text('"'), content, text('"'))


def free_text(character: Expression, low: int, high: int | None) -> Expression:
    """`low` to `high` characters; None: without a limit."""
    if high is None or high <= COUNTED_CHARACTERS:
        return repeat(character, low, high)
    return sequence(repeat(character, low, low), marked(repeat(character, 0, None), length_mark(high)))


def string_value(value: str) -> Expression:
    """One string, as json.dumps writes it. Only surrogates, which are no Unicode text, are escaped."""
    dumped = json.dumps(value, ensure_ascii=False)
    return text(re.sub("[\ud800-\udfff]", lambda match: rf"\u{ord(match[0]):x}", dumped))


def member(key: Expression, value: Expression) -> Expression:
    """A key and its value."""
    return sequence(key, COLON, value)


def brackets(opening: str, inside: Expression | None, may_be_empty: bool) -> Expression | None:
    """`inside` between [ or { and its counterpart; None: nothing can be there."""
    closing = text({"[": "]", "{": "}"}[opening])
    if inside is None:
        return sequence(text(opening), SPACE, closing) if may_be_empty else None
    inside = sequence(inside, SPACE)
    return sequence(text(opening), SPACE, optional(inside) if may_be_empty else inside, closing)


def separated(item: Expression, low: int, high: int | None, unique: bool = False) -> Expression:
    """`low` to `high` items with commas between; at least one."""
    low = max(low, 1)
    counted = high is not None and (item.size + 4) * high <= COUNTED
    comma = _marked_comma(unique, None if counted else high)
    needed = sequence(marked(text(","), UNIQUE | REQUIRED), SPACE) if unique else COMMA
    first = repeat(sequence(item, needed), low - 1, low - 1)
    if counted and high is not None:
        return sequence(first, item, repeat(sequence(comma, item), 0, high - low))
    return sequence(first, graph(3, [(0, EMPTY, 1), (1, item, 2), (2, comma, 1)]))


def some_of(
    members: Sequence[Expression],
    may_miss: Sequence[bool],
    extra: Expression | None = None,
    low: int = 0,
    high: int | None = None,
) -> tuple[Expression | None, bool]:
    """Members in this order, then any number of extra ones, with commas between.

    Args:
        members: what stands between the commas.
        may_miss: which of them may be left out.
        extra: a further member; None: there is none.
        low, high: how many members there are in all; None: without a limit.

    Returns:
        The members, at least one, or None if there cannot be one; and whether there may also be none.
    """
    limit = high if extra is not None and high is not None and high > max(8, len(members)) else None
    if high is not None and (limit is not None or (high >= len(members) and extra is None)):
        high = None
    top = max(low, high or 0, 1)
    numbers: dict[tuple[str, int, int], int] = {("at", 0, 0): 0}
    edges: list[tuple[int, Expression, int]] = []

    def node(kind: str, i: int, count: int) -> int:
        return numbers.setdefault((kind, i, count), len(numbers))

    def enter(i: int, count: int, part: Expression, behind: int, comma: Expression) -> None:
        after = min(count + 1, top)
        if high is None or count < high:
            edges.append((node("at", i, count), comma if count else EMPTY, node("in", i, after)))
            inside = (node("in", i, after), part, node("at", behind, after))
            if inside not in edges[-2 * top - 4 :]:
                edges.append(inside)

    for i, part in enumerate(members):
        for count in range(min(i, top) + 1):
            if ("at", i, count) in numbers:
                enter(i, count, part, i + 1, COMMA)
                if may_miss[i]:
                    edges.append((node("at", i, count), EMPTY, node("at", i + 1, count)))
    last = len(members)
    if extra is not None:
        for count in range(top + 1):
            if ("at", last, count) in numbers:
                needed = sequence(marked(text(","), UNIQUE | REQUIRED), SPACE)
                enter(last, count, extra, last, _marked_comma(True, limit) if count >= low else needed)
    ends = [count for count in range(max(low, 1), top + 1) if ("at", last, count) in numbers]
    may_be_empty = low == 0 and ("at", last, 0) in numbers
    if not ends:
        return None, may_be_empty
    edges += [(node("at", last, count), EMPTY, len(numbers)) for count in ends]
    return graph(len(numbers) + 1, edges), may_be_empty


def any_order(values: Sequence[Expression], low: int, high: int | None) -> Expression | None:
    """`low` to `high` of a few values in any order, each at most once, at least one; None if that cannot be."""
    everything = 1 << len(values)
    edges: list[tuple[int, Expression, int]] = []
    for chosen in range(everything):
        for i, value in enumerate(values):
            if not chosen >> i & 1:
                part = sequence(COMMA, value) if chosen else value
                edges.append((chosen, part, chosen | 1 << i))
        if max(low, 1) <= chosen.bit_count() <= (len(values) if high is None else high):
            edges.append((chosen, EMPTY, everything))
    return graph(everything + 1, edges) if low <= len(values) and values else None


def _marked_comma(unique: bool, limit: int | None) -> Expression:
    mark = (UNIQUE if unique else 0) | (items_mark(limit) if limit is not None else 0)
    return sequence(marked(text(","), mark), SPACE) if mark else COMMA
