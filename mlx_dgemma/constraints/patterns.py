r"""Python's regular expressions in a plain subset that every regex library reads alike.

The subset has literals (ASCII letters, digits, a few harmless signs, and \x{...}), classes of code point ranges,
(?:...), | and greedy repeats; no anchors, since a pattern describes the whole text. Python's own parser reads a
pattern and its own matcher tells what a class holds, so that neither can be read in another way than `re` does.
"""

from __future__ import annotations

import importlib
import re
import string
import sys
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NoReturn

from ..errors import OptionError

_PACKAGE = sys.version_info >= (3, 11)
re_parser: Any = importlib.import_module("re._parser" if _PACKAGE else "sre_parse")
_compiler: Any = importlib.import_module("re._compiler" if _PACKAGE else "sre_compile")

Intervals = list[tuple[int, int]]  # code points, both ends included

ALL_CODE_POINTS = (0, 0x10FFFD)  # the two noncharacters above it mark where a text begins and ends
SURROGATES = (0xD800, 0xDFFF)  # UTF-8 has none
JSON_ESCAPED = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))  # what JSON strings escape: control characters, " and \

_ALPHANUMERIC = set(string.ascii_letters + string.digits)
_SIGNS = set(" \"',:;_=@%/!<>-")  # without a meaning outside of classes

_REFUSED = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ASSERT": "a lookahead or lookbehind",
    "ASSERT_NOT": "a negative lookahead or lookbehind",
    "FAILURE": "a negative lookahead or lookbehind",  # what some versions make of (?!)
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_STARTS = {"AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A"}
_ENDS = {"AT_END": "$", "AT_END_STRING": r"\Z"}


def python_regex_to_plain(pattern: str, json_safe: bool = False, search: bool = False) -> str:
    r"""The plain pattern of exactly the texts that Python's `re` matches, U+10FFFE and U+10FFFF left out.

    Args:
        pattern: with the syntax of `re`; ^, \A, $ and \Z only where a match starts or ends.
        json_safe: only the texts without characters that JSON strings escape.
        search: the texts in which `re.search` finds a match, rather than those that `re.fullmatch` matches.

    Returns:
        a pattern for the whole text, which can stand in another as it is; it may match the empty text.
    """
    try:
        tree = re_parser.parse(pattern)
        plain = _Translator(pattern, json_safe).whole(tree, search)
        if plain is None and json_safe and _Translator(pattern, False).whole(tree, search) is not None:
            raise OptionError(
                f"The pattern {pattern!r} needs characters that JSON strings escape "
                '(", \\ or control characters); give one that does without them.'
            )
    except re.error as error:
        raise OptionError(f"The pattern {pattern!r} is not a regular expression: {error}.") from None
    except OverflowError:
        raise OptionError(f"The pattern {pattern!r} repeats too often; write a smaller number.") from None
    except RecursionError:
        raise OptionError("The pattern is nested too deeply; write it with fewer groups in groups.") from None
    if plain is None:
        raise OptionError(f"The pattern {pattern!r} matches nothing; give one that some text matches.")
    return plain


def literal(text: str) -> str:
    """The plain pattern of one text."""
    return "".join(character if character in _SIGNS else _character(character) for character in text)


def character_class(intervals: Iterable[tuple[int, int]]) -> str:
    """The plain pattern of one character from any of the intervals."""
    ends = (chr(low) + chr(high) if low < high else chr(low) for low, high in intervals)
    return "[" + "".join("-".join(map(_character, pair)) for pair in ends) + "]"


def _character(character: str) -> str:
    return character if character in _ALPHANUMERIC else rf"\x{{{ord(character):x}}}"


def subtract(intervals: Iterable[tuple[int, int]], *holes: tuple[int, int]) -> Intervals:
    """The intervals less the holes."""
    left = list(intervals)
    for low, high in holes:
        pieces = [piece for a, b in left for piece in ((a, min(b, low - 1)), (max(a, high + 1), b))]
        left = [(a, b) for a, b in pieces if a <= b]
    return left


class _Translator:
    """Walks the tree of one pattern; a part that matches nothing is None.

    `before` and `after` are what may stand on either side of a part: a pattern, empty where the text starts or
    ends, or None in the middle of the whole pattern, where no anchor can hold.
    """

    def __init__(self, pattern: str, json_safe: bool):
        self.pattern = pattern
        self.holes = (SURROGATES, *JSON_ESCAPED) if json_safe else (SURROGATES,)
        self.newline = "" if json_safe else r"\x{a}?"  # $ also holds before a newline that ends the text

    def whole(self, tree: Any, search: bool) -> str | None:
        rest = character_class(subtract([ALL_CODE_POINTS], *self.holes)) + "*" if search else ""
        return self.sequence(tree, tree.state.flags, rest, rest)

    def sequence(self, items: Any, flags: int, before: str | None, after: str | None) -> str | None:
        items = [(op.name, value) for op, value in items]
        while items and before is not None and self._anchor(items[0], flags) in _STARTS:
            del items[0]
            before = ""
        while items and after is not None and (anchor := self._anchor(items[-1], flags)) in _ENDS:
            del items[-1]
            after = self.newline if after and anchor == "AT_END" else ""
        if not items:
            return (before or "") + (after or "")
        last = len(items) - 1
        parts = [
            self.item(op, value, flags, before if i == 0 else None, after if i == last else None)
            for i, (op, value) in enumerate(items)
        ]
        return None if None in parts else "".join(part for part in parts if part is not None)

    def item(self, op: str, value: Any, flags: int, before: str | None, after: str | None) -> str | None:
        if op in _REFUSED:
            self._refuse(_REFUSED[op])
        if op == "AT":
            self._misplaced(value.name)
        if op == "SUBPATTERN":
            _, add, drop, body = value
            return self.sequence(body, _combined(flags, add, drop), before, after)
        if op == "BRANCH":
            branches = [self.sequence(branch, flags, before, after) for branch in value[1]]
            some = list(dict.fromkeys(branch for branch in branches if branch is not None))
            return "(?:" + "|".join(some) + ")" if some else None
        if op in {"MAX_REPEAT", "MIN_REPEAT"}:  # a lazy repeat matches the same whole texts
            part = _repeat(self.sequence(value[2], flags, None, None), value[0], value[1])
        else:
            part = self._one(op, value, flags)
        return None if part is None else (before or "") + part + (after or "")

    def _one(self, op: str, value: Any, flags: int) -> str | None:
        """One character."""
        if op == "LITERAL" and not flags & re.IGNORECASE:
            return literal(chr(value)) if subtract([(value, value)], *self.holes) else None
        held = _intervals(op, tuple(value) if isinstance(value, list) else value, flags)
        held = subtract(held, *self.holes)
        return character_class(held) if held else None

    def _anchor(self, item: tuple[str, Any], flags: int) -> str:
        """The name of the anchor that an item is, empty for other items."""
        if item[0] != "AT":
            return ""
        name = item[1].name
        if flags & re.MULTILINE and name in {"AT_BEGINNING", "AT_END"}:
            self._refuse(f"{(_STARTS | _ENDS)[name]} with the flag MULTILINE")
        return name

    def _misplaced(self, name: str) -> NoReturn:
        if name in _STARTS:
            self._refuse(f"{_STARTS[name]} elsewhere than where a match starts")
        if name in _ENDS:
            self._refuse(f"{_ENDS[name]} elsewhere than where a match ends")
        self._refuse(r"\b" if name == "AT_BOUNDARY" else r"\B")

    def _refuse(self, what: str) -> NoReturn:
        raise OptionError(f"The pattern {self.pattern!r} has {what}, which is not supported; write it without.")


def _repeat(body: str | None, low: int, high: Any) -> str | None:
    """`body` from `low` to `high` times."""
    if body is None:
        return None if low else ""
    upper = "" if high == re_parser.MAXREPEAT else str(int(high))
    signs = {(0, ""): "*", (1, ""): "+", (0, "1"): "?"}
    return f"(?:{body})" + signs.get((low, upper), f"{{{low},{upper}}}")


def _combined(flags: int, add: int, drop: int) -> int:
    """The flags within a group that adds and drops some; (?a) and (?u) exclude each other."""
    kinds = re.ASCII | re.LOCALE | re.UNICODE
    return ((flags & ~kinds if add & kinds else flags) | add) & ~drop


@lru_cache(maxsize=256)
def _intervals(op: str, value: Any, flags: int) -> Intervals:
    """The code points that one item of a parsed pattern matches, as Python's matcher finds them."""
    state = re_parser.State()
    state.str = ""
    one = (getattr(re_parser, op), list(value) if isinstance(value, tuple) else value)
    run = (re_parser.MAX_REPEAT, (1, re_parser.MAXREPEAT, re_parser.SubPattern(state, [one])))
    compiled = _compiler.compile(re_parser.SubPattern(state, [run]), flags)
    return [(match.start(), match.end() - 1) for match in compiled.finditer(_all_characters())]


@cache
def _all_characters() -> str:
    """Every code point at its own position."""
    return "".join(map(chr, range(ALL_CODE_POINTS[1] + 1)))
