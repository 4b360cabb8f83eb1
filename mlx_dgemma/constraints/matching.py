"""Python's regular expressions, matched in a bounded number of steps.

`re` tries one way through a text after the other, and some patterns have more ways than can ever be tried. Here all
ways are followed at once: a part of a pattern takes the set of places in the text where it may begin to the set of
those where it may end. Each set is an integer in which bit i stands for the place before character i.

Single characters and anchors are found by `re` itself, which needs no choice for them. What depends on the order of the
ways is refused: backreferences, conditions, atomic groups and possessive repeats.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_PACKAGE = sys.version_info >= (3, 11)
_parser: Any = importlib.import_module("re._parser" if _PACKAGE else "sre_parse")
_compiler: Any = importlib.import_module("re._compiler" if _PACKAGE else "sre_compile")

MAX_STEPS = 1_000_000  # about a second
_STEP_CHARACTERS = 512  # of the text; sets of longer texts take longer
_GROUP_KINDS = re.ASCII | re.LOCALE | re.UNICODE  # flags that exclude each other
_REFUSED = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_SINGLE = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}


class PatternError(ValueError):
    """A pattern that cannot be used; the message is a reason, such as "it has a backreference"."""


class Steps:
    """The steps that are left for one or several patterns.

    Args:
        left: their number.
    """

    def __init__(self, left: int = MAX_STEPS):
        self.left = left

    def take(self, length: int) -> None:
        """Count a step over a text of `length` characters.

        Raises:
            PatternError: none is left.
        """
        self.left -= 1 + length // _STEP_CHARACTERS
        if self.left < 0:
            raise PatternError("it takes too many steps to match")


class Pattern:
    """A regular expression in the syntax of `re`.

    Args:
        text: the pattern.
        steps: what its matches may take, all together; None for MAX_STEPS.

    Attributes:
        literal: the only text that it matches, where it is plain text; otherwise None.
        looks_around: whether what stands before and behind a match counts: it has anchors, or looks ahead or behind.

    Raises:
        PatternError: it is not a regular expression, or has what cannot be matched in bounded time.
    """

    def __init__(self, text: str, steps: Steps | None = None):
        self._steps = Steps() if steps is None else steps
        try:
            tree = _parser.parse(text)
            self._flags = tree.state.flags
            self._items = list(tree)
            self.looks_around = _check(self._items)
            _compiler.compile(tree, self._flags)  # it checks lookbehinds, too
        except re.error as error:
            raise PatternError(str(error)) from None
        except (OverflowError, MemoryError):
            raise PatternError("it repeats too often") from None
        except RecursionError:
            raise PatternError("it is nested too deeply") from None
        plain = not self._flags & re.IGNORECASE and all(op.name == "LITERAL" for op, _ in self._items)
        self.literal = "".join(chr(value) for _, value in self._items) if plain else None

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches the whole text, as in `re.fullmatch`.

        Raises:
            PatternError: that takes too many steps.
        """
        return len(text) in self.ends(text) if self.literal is None else text == self.literal

    def ends(self, text: str, starts: Iterable[int] = (0,)) -> list[int]:
        """The places in a text, in order, where a match that begins at one of `starts` may end.

        Raises:
            PatternError: that takes too many steps.
        """
        begin = 0
        for start in starts:
            begin |= 1 << start
        try:
            return list(_bits(_Match(text, self._steps).sequence(self._items, begin, self._flags)))
        except RecursionError:
            raise PatternError("it is nested too deeply") from None


def _check(items: Any) -> bool:
    """Refuse what depends on the order in which a pattern's ways are tried; returns whether it looks around."""
    around = False
    for op, value in items:
        if what := _REFUSED.get(op.name):
            raise PatternError(f"it has {what}, which is not supported here")
        around |= op.name in ("AT", "ASSERT", "ASSERT_NOT")
        if op.name in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT"):
            around |= _check(value[-1])
        elif op.name == "BRANCH":
            for branch in value[1]:
                around |= _check(branch)
        elif op.name in ("ASSERT", "ASSERT_NOT"):
            _check(value[1])
    return around


class _Match:
    """Follows all ways of a pattern through one text."""

    def __init__(self, text: str, steps: Steps):
        self._text, self._steps = text, steps
        self._places: dict[Any, int] = {}  # where a single character or an anchor matches

    def sequence(self, items: Any, starts: int, flags: int) -> int:
        for op, value in items:
            if not starts:
                return 0
            starts = self._item(op, value, starts, flags)
        return starts

    def _item(self, op: Any, value: Any, starts: int, flags: int) -> int:
        self._steps.take(len(self._text))
        name = op.name
        if name == "SUBPATTERN":
            _, added, dropped, body = value
            inner = ((flags & ~_GROUP_KINDS if added & _GROUP_KINDS else flags) | added) & ~dropped
            return self.sequence(body, starts, inner)
        if name == "BRANCH":
            ends = 0
            for branch in value[1]:
                ends |= self.sequence(branch, starts, flags)
            return ends
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = value
            return self._repeat(low, high, body, starts, flags)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, body = value
            kept = sum(1 << place for place in _bits(starts) if self._looks(direction, body, place, flags))
            return kept if name == "ASSERT" else starts & ~kept
        if name == "FAILURE":  # what some Python versions make of (?!)
            return 0
        places = self._places_of(op, value, flags)
        return starts & places if name == "AT" else (starts & places) << 1

    def _looks(self, direction: int, body: Any, place: int, flags: int) -> bool:
        """Whether a lookahead (direction 1) or lookbehind (-1) holds at a place."""
        if direction > 0:
            return self.sequence(body, 1 << place, flags) != 0
        start = place - body.getwidth()[0]  # `re` takes only lookbehinds of one width
        return start >= 0 and bool(self.sequence(body, 1 << start, flags) >> place & 1)

    def _repeat(self, low: int, high: Any, body: Any, starts: int, flags: int) -> int:
        op, value = body[0] if len(body) == 1 else (None, None)
        if low <= 1 and high == _parser.MAXREPEAT and op is not None and op.name in _SINGLE:
            if low:
                starts = self._item(op, value, starts, flags)
            run = self._places_of(op, value, flags)
            # A carry runs through the places of each run in one addition.
            return (((starts & run) + run) ^ run) | starts
        for _ in range(int(low)):
            before, starts = starts, self.sequence(body, starts, flags)
            if starts == before:  # as it is after as many repeats as the text has characters, or earlier
                break
        ends = new = starts
        count = int(low)
        while new and (high == _parser.MAXREPEAT or count < int(high)):
            new = self.sequence(body, new, flags) & ~ends
            ends |= new
            count += 1
        return ends

    def _places_of(self, op: Any, value: Any, flags: int) -> int:
        """The places where a single character begins that an item matches, or where an anchor holds."""
        key = (op, tuple(value) if isinstance(value, list) else value, flags)
        if key not in self._places:
            self._steps.take(len(self._text))
            state = _parser.State()
            state.str = ""
            compiled = _compiler.compile(_parser.SubPattern(state, [(op, value)]), flags)
            signs = bytearray(b"0" * (len(self._text) + 1))
            for found in compiled.finditer(self._text):
                signs[-1 - found.start()] = ord("1")
            self._places[key] = int(signs, 2)
        return self._places[key]


def _bits(number: int) -> Iterator[int]:
    """The places in a set, in order."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
