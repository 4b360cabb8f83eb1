"""Regular expressions as trees: what patterns and schemas are translated into, and automata are built from.

A tree may hold the same part in several places. Its `size` counts the part each time, as an automaton does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Intervals = tuple[tuple[int, int], ...]  # of code points, both ends included


@dataclass(frozen=True, eq=False)
class Expression:
    """A set of texts.

    Attributes:
        size: about how many states an automaton takes for it.
    """

    size: int


@dataclass(frozen=True, eq=False)
class Text(Expression):
    """One text in UTF-8."""

    spelt: bytes


@dataclass(frozen=True, eq=False)
class Characters(Expression):
    """One character of some intervals."""

    intervals: Intervals


@dataclass(frozen=True, eq=False)
class Sequence_(Expression):
    """Parts one behind the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Choice(Expression):
    """One of several parts."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Repeat(Expression):
    """A part from `low` to `high` times; None: without a limit."""

    part: Expression
    low: int
    high: int | None


@dataclass(frozen=True, eq=False)
class Both(Expression):
    """The texts of two parts at once, or of the first alone."""

    part: Expression
    other: Expression
    negative: bool  # whether the other's texts are left out


@dataclass(frozen=True, eq=False)
class Marked(Expression):
    """A part whose bytes carry a mark; see `checks`."""

    part: Expression
    mark: int


@dataclass(frozen=True, eq=False)
class Graph(Expression):
    """The ways through some nodes from node 0 to the last one; an edge is (node, part, node)."""

    nodes: int
    edges: tuple[tuple[int, Expression, int], ...]


EMPTY = Text(0, b"")


def text(value: str) -> Expression:
    """One text, which has no surrogates."""
    spelt = value.encode()
    return Text(len(spelt), spelt) if spelt else EMPTY


def characters(intervals: Iterable[tuple[int, int]]) -> Expression:
    """One character of some intervals of code points, of which there is at least one."""
    kept = tuple(intervals)
    return Characters(len(byte_ranges(kept)), kept)


def sequence(*parts: Expression) -> Expression:
    """Parts one behind the other."""
    kept: list[Expression] = []
    for part in parts:
        if isinstance(part, Text) and kept and isinstance(kept[-1], Text):
            kept[-1] = Text(kept[-1].size + part.size, kept[-1].spelt + part.spelt)
        elif part is not EMPTY:
            kept.append(part)
    if len(kept) < 2:
        return kept[0] if kept else EMPTY
    return Sequence_(sum(part.size for part in kept), tuple(kept))


def choice(parts: Sequence[Expression]) -> Expression:
    """One of several parts, of which there is at least one."""
    kept = list(dict.fromkeys(EMPTY if isinstance(part, Text) and not part.spelt else part for part in parts))
    return kept[0] if len(kept) == 1 else Choice(1 + sum(part.size for part in kept), tuple(kept))


def optional(part: Expression) -> Expression:
    """A part, or nothing."""
    return repeat(part, 0, 1)


def repeat(part: Expression, low: int, high: int | None) -> Expression:
    """A part from `low` to `high` times. Repeats of nothing are nothing, so that the size of none is zero."""
    if high == 0 or (isinstance(part, Text) and not part.spelt):
        return EMPTY
    if (low, high) == (1, 1):
        return part
    return Repeat((part.size + 1) * (max(low, 1) if high is None else high), part, low, high)


def both(part: Expression, other: Expression) -> Expression:
    """The texts of both."""
    return Both(part.size + other.size, part, other, False)


def without(part: Expression, other: Expression) -> Expression:
    """The texts of the first that are not of the other."""
    return Both(part.size + other.size, part, other, True)


def marked(part: Expression, mark: int) -> Expression:
    """A part whose bytes carry a mark."""
    return Marked(part.size, part, mark)


def graph(nodes: int, edges: Iterable[tuple[int, Expression, int]]) -> Expression:
    """The ways from node 0 to the last one."""
    kept = tuple(edges)
    return Graph(nodes + sum(part.size for _, part, _ in kept), nodes, kept)


@functools.lru_cache(maxsize=1024)
def byte_ranges(intervals: Intervals) -> tuple[tuple[int, int, int, int], ...]:
    """The UTF-8 of some intervals as edges (node, first byte, last byte, node): from node 0 to node 1."""
    nodes: dict[tuple[tuple[tuple[int, int], ...], ...], int] = {}
    edges: list[tuple[int, int, int, int]] = []

    def node(tails: tuple[tuple[tuple[int, int], ...], ...]) -> int:
        """The node from which these sequences of ranges lead to node 1."""
        if tails == ((),):
            return 1
        if tails not in nodes:
            nodes[tails] = number = len(nodes) + 2
            leave(number, tails)
        return nodes[tails]

    def leave(number: int, tails: Iterable[tuple[tuple[int, int], ...]]) -> None:
        heads: dict[tuple[int, int], list[tuple[tuple[int, int], ...]]] = {}
        for head, *rest in tails:
            heads.setdefault(head, []).append(tuple(rest))
        by_rest: dict[int, list[tuple[int, int]]] = {}
        for head, rests in heads.items():
            by_rest.setdefault(node(tuple(rests)), []).append(head)
        for target, ranges in by_rest.items():
            merged: list[list[int]] = []
            for low, high in sorted(ranges):
                if merged and merged[-1][1] + 1 == low:
                    merged[-1][1] = high
                else:
                    merged.append([low, high])
            edges.extend((number, low, high, target) for low, high in merged)

    leave(0, [one for low, high in intervals for one in _utf8(low, high)])
    return tuple(edges)


def _utf8(low: int, high: int) -> list[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges that spell the code points from `low` to `high`; any two have heads apart or equal."""
    for border in (0x7F, 0x7FF, 0xFFFF):
        if low <= border < high:
            return _utf8(low, border) + _utf8(border + 1, high)
    first, last = chr(low).encode(), chr(high).encode()
    for i in range(1, len(first)):
        span = (1 << 6 * i) - 1  # of the last i bytes
        if low & ~span != high & ~span:
            if low & span:
                return _utf8(low, low | span) + _utf8((low | span) + 1, high)
            if high & span != span:
                return _utf8(low, (high & ~span) - 1) + _utf8(high & ~span, high)
    return [tuple(zip(first, last))]
