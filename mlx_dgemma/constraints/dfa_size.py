"""An upper bound on the size of an automaton, checked before a library builds it without a bound on memory or time.

A deterministic automaton remembers a set of positions of its pattern, where a position is one character of it. A short
pattern may need very many of these sets: [ab]*a[ab]{30} needs 2**31.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .patterns import re_parser

MAX_WORK = 4_000_000  # positions visited; a library's build takes time in proportion to it


def dfa_size_exceeds(tree: Any, limit: int) -> bool:
    """Whether the automaton of a plain pattern has more than `limit` states, or takes more than MAX_WORK to count.

    A character counts as one step, although its UTF-8 bytes may take more states. The answer is thus never True for an
    automaton that has `limit` states or fewer.

    Args:
        tree: the pattern as `re` parses it.
        limit: the number of states that is allowed.
    """
    positions = _Positions(tree)
    kinds = _character_kinds(positions.classes)
    seen, todo = {positions.first}, [positions.first]
    work = 0
    while todo:
        candidates = todo.pop()  # one state: the positions that the next character may be at
        for kind in kinds:
            taken = candidates & kind
            if not taken:
                continue
            successor = 0
            for position in _bits(taken):
                successor |= positions.follow[position]
                work += 1
            if successor not in seen:
                seen.add(successor)
                todo.append(successor)
        if len(seen) > limit or work > MAX_WORK:
            return True
    return False


class _Part(NamedTuple):
    """A part of a pattern. Sets of positions are integers, in which bit i stands for position i."""

    nullable: bool  # whether it matches the empty text
    first: int  # positions that can begin a match of it
    last: int  # positions that can end one


_EMPTY = _Part(True, 0, 0)


class _Positions:
    """Glushkov's construction: the positions of a pattern, and which may follow which.

    Attributes:
        follow: for each position the set of positions that may come next.
        classes: for each position the characters that it takes, as `re` parses a class.
        first: the set of positions that can begin a match.
    """

    def __init__(self, tree: Any):
        self.follow: list[int] = []
        self.classes: list[Any] = []
        self.first = self._sequence(list(tree)).first

    def _sequence(self, items: list[Any]) -> _Part:
        # From the end, because a part is linked to what comes behind it.
        rest = _EMPTY
        for op, value in reversed(items):
            rest = self._joined(self._item(str(op), value), rest)
        return rest

    def _item(self, op: str, value: Any) -> _Part:
        if op == "SUBPATTERN":
            return self._sequence(list(value[-1]))
        if op == "BRANCH":
            return self._union([self._sequence(list(branch)) for branch in value[1]])
        if op == "MAX_REPEAT":
            low, high, body = value
            return self._repeat(list(body), int(low), None if high == re_parser.MAXREPEAT else int(high))
        position = 1 << len(self.follow)
        self.follow.append(0)
        self.classes.append(value if op == "IN" else [(re_parser.LITERAL, value)])
        return _Part(False, position, position)

    def _repeat(self, body: list[Any], low: int, high: int | None) -> _Part:
        """`low` to `high` copies of the body. Without a limit the last copy may also follow itself."""
        copies = max(low, 1) if high is None else high
        rest = _EMPTY
        for i in reversed(range(copies)):
            copy = self._sequence(body)
            if high is None and not rest.last:
                self._link(copy.last, copy.first)
            nullable = i >= low or (rest.nullable and copy.nullable)
            rest = self._joined(copy, rest)._replace(nullable=nullable)
        return rest

    def _joined(self, part: _Part, rest: _Part) -> _Part:
        """`part` and then `rest`."""
        self._link(part.last, rest.first)
        return _Part(
            part.nullable and rest.nullable,
            part.first | (rest.first if part.nullable else 0),
            rest.last | (part.last if rest.nullable else 0),
        )

    @staticmethod
    def _union(parts: list[_Part]) -> _Part:
        first = last = 0
        for part in parts:
            first, last = first | part.first, last | part.last
        return _Part(any(part.nullable for part in parts), first, last)

    def _link(self, sources: int, targets: int) -> None:
        for position in _bits(sources):
            self.follow[position] |= targets


def _bits(number: int) -> Iterator[int]:
    """The indices of the ones in a number."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _character_kinds(classes: list[Any]) -> set[int]:
    """The sets of positions that some character is taken by. Characters with the same set behave alike."""
    changes: dict[int, int] = {}  # at a code point, the positions whose class begins or ends there
    for position, items in enumerate(classes):
        for op, value in items:
            low, high = value if str(op) == "RANGE" else (value, value)
            for code_point in (low, high + 1):
                changes[code_point] = changes.get(code_point, 0) ^ (1 << position)
    kinds, current = set(), 0
    for code_point in sorted(changes):
        current ^= changes[code_point]
        kinds.add(current)
    return kinds - {0}
