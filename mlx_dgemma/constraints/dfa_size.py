"""How many states an automaton takes, counted before a library builds it with no bound on memory or time.

A pattern's places are its characters. What a deterministic automaton remembers is a set of places, and a short pattern,
such as [ab]*a[ab]{30}, may need a power of two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .patterns import re_parser

MAX_WORK = 4_000_000  # places looked at; sets of many places take as long to build as they do to count


def dfa_size_exceeds(tree: Any, most: int) -> bool:
    """Whether the automaton of a plain pattern, as `re` parses it, has more states than `most`, or takes too long.

    Characters are counted as one step; those of several bytes take further states.
    """
    follow: list[int] = []  # of each place those that may come next, as bits
    classes: list[Any] = []

    def whole(items: list[Any]) -> tuple[bool, int, int]:
        """(whether it may be empty, places that begin it, places that end it) of a sequence."""
        empty, first, last = True, 0, 0
        for op, value in reversed(items):
            none, begins, ends = part(str(op), value)
            for place in bits(ends):
                follow[place] |= first
            first, last = begins | (first if none else 0), last | (ends if empty else 0)
            empty = empty and none
        return empty, first, last

    def part(name: str, value: Any) -> tuple[bool, int, int]:
        if name == "SUBPATTERN":
            return whole(list(value[-1]))
        if name == "BRANCH":
            branches = [whole(list(one)) for one in value[1]]
            firsts, lasts = 0, 0
            for _, first, last in branches:
                firsts, lasts = firsts | first, lasts | last
            return any(one[0] for one in branches), firsts, lasts
        if name != "MAX_REPEAT":
            follow.append(0)
            classes.append(value if name == "IN" else [(re_parser.LITERAL, value)])
            return False, 1 << len(follow) - 1, 1 << len(follow) - 1
        low, high, body = value
        return repeated(list(body), int(low), None if high == re_parser.MAXREPEAT else int(high))

    def repeated(body: list[Any], low: int, high: int | None) -> tuple[bool, int, int]:
        empty, first, last = True, 0, 0
        for i in reversed(range(max(low, 1) if high is None else high)):
            none, begins, ends = whole(body)
            if high is None and not last:  # the last copy goes round
                for place in bits(ends):
                    follow[place] |= begins
            for place in bits(ends):
                follow[place] |= first
            first, last = begins | (first if none else 0), last | (ends if empty else 0)
            empty = i >= low or (empty and none)
        return empty, first, last

    _, first, _ = whole(list(tree))
    alike = _alike(classes)
    start, work = first, 0
    seen, todo = {start}, [start]
    while todo:
        after = todo.pop()
        for one in alike:
            places = after & one
            if not places:
                continue
            to = 0
            for place in bits(places):
                to |= follow[place]
                work += 1
            if to not in seen:
                seen.add(to)
                todo.append(to)
        if len(seen) > most or work > MAX_WORK:
            return True
    return False


def bits(number: int) -> Iterator[int]:
    """Places of the ones in a number."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _alike(classes: list[Any]) -> set[int]:
    """For each kind of character, told apart by the places that take it, these places."""
    changes: dict[int, int] = {}
    for place, held in enumerate(classes):
        for op, value in held:
            low, high = value if str(op) == "RANGE" else (value, value)
            for at in (low, high + 1):
                changes[at] = changes.get(at, 0) ^ (1 << place)
    kinds, now = set(), 0
    for at in sorted(changes):
        now ^= changes[at]
        kinds.add(now)
    return kinds - {0}
