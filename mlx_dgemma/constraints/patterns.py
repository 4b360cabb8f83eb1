r"""Python's regular expressions, translated into a plain syntax that every regex library reads in the same way.

The plain syntax has literals (ASCII letters, digits, a few signs without a meaning, and \x{...}), classes of code point
ranges, (?:...), | and greedy repeats. It has no anchors, because a pattern describes the whole text. In (?:(?=a)b) the
whole of what b matches must match a as well, and in (?:(?!a)b) it must not.

Python's own parser reads a pattern, and Python's own matcher tells which characters a class holds. The translation
therefore agrees with `re`.
"""

from __future__ import annotations

import importlib
import json
import re
import string
import sys
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple, NoReturn

from ..errors import OptionError

_PACKAGE = sys.version_info >= (3, 11)
re_parser: Any = importlib.import_module("re._parser" if _PACKAGE else "sre_parse")
_re_compiler: Any = importlib.import_module("re._compiler" if _PACKAGE else "sre_compile")

Intervals = list[tuple[int, int]]  # of code points, both ends included

ALL_CODE_POINTS = (0, 0x10FFFD)  # `dfa` uses the last two, which are noncharacters, as marks
SURROGATES = (0xD800, 0xDFFF)  # UTF-8 has none
JSON_ESCAPED = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))  # what JSON strings escape: control characters, " and \

_ALPHANUMERIC = set(string.ascii_letters + string.digits)
_PLAIN_SIGNS = set(" \"',:;_=@%/!<>-")  # without a meaning outside of classes

MAX_FOLDED = 60  # different characters and classes without regard to case: each is matched with every code point

_REFUSED = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_START_ANCHORS = {"AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A"}
_END_ANCHORS = {"AT_END": "$", "AT_END_STRING": r"\Z"}


def python_regex_to_plain(pattern: str, json_safe: bool = False, search: bool = False, portable: bool = False) -> str:
    r"""The plain pattern of the texts that a Python pattern matches, except those with U+10FFFE or U+10FFFF.

    Args:
        pattern: in the syntax of `re`; ^, \A, $ and \Z only where a match starts or ends.
        json_safe: of the content of a JSON string. Quotes, backslashes and line breaks that the pattern names one by
            one are escaped; other texts with characters that JSON strings escape are left out.
        search: take the texts in which `re.search` finds a match, instead of those that `re.fullmatch` matches.
        portable: take (?<name>...) for a named group, as ECMA-262 does, and leave out the texts that only match where
            \d, \w and \s stand for more than ASCII, or only where they do not.

    Returns:
        A pattern of the whole text, which can be put into another pattern. It may match the empty text.

    Raises:
        OptionError: the pattern is not a regular expression, has what is not supported, or matches nothing.
    """
    try:
        tree = re_parser.parse(re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern) if portable else pattern)
        plain = _Translator(pattern, json_safe, portable).whole(tree, search)
        if plain is None and json_safe and _Translator(pattern, False, portable).whole(tree, search) is not None:
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
    return "".join(character if character in _PLAIN_SIGNS else _character(character) for character in text)


def character_class(intervals: Iterable[tuple[int, int]]) -> str:
    """The plain pattern of one character from any of the intervals."""
    ends = (chr(low) + chr(high) if low < high else chr(low) for low, high in intervals)
    return "[" + "".join("-".join(map(_character, pair)) for pair in ends) + "]"


def any_of(patterns: Iterable[str]) -> str:
    """The plain pattern of texts that match at least one of these patterns."""
    different = list(dict.fromkeys(patterns))
    return different[0] if len(different) == 1 else "(?:" + "|".join(different) + ")"


def _character(character: str) -> str:
    return character if character in _ALPHANUMERIC else rf"\x{{{ord(character):x}}}"


def subtract(intervals: Iterable[tuple[int, int]], *holes: tuple[int, int]) -> Intervals:
    """The intervals without the holes."""
    left = list(intervals)
    for low, high in holes:
        pieces = [piece for a, b in left for piece in ((a, min(b, low - 1)), (max(a, high + 1), b))]
        left = [(a, b) for a, b in pieces if a <= b]
    return left


class _Context(NamedTuple):
    """What surrounds a part of a pattern."""

    starts: bool  # the part begins the match, so ^ and \A may stand first in it
    ends: bool  # it ends the match, so $ and \Z may stand last in it
    before: str  # the plain pattern to put before it: of the text before the match if it begins the match, else ""
    after: str  # the same behind it


_MIDDLE = _Context(False, False, "", "")


class _Translator:
    """Walks the tree of one parsed pattern. The methods return a plain pattern, or None for what matches nothing."""

    def __init__(self, pattern: str, json_safe: bool, portable: bool):
        self.pattern, self.portable = pattern, portable
        self.left_out = (SURROGATES, *JSON_ESCAPED) if json_safe else (SURROGATES,)
        self.escapes = {ord(one): json.dumps(one)[1:-1] for one in '"\\\n\t\r'} if json_safe else {}
        self.any_text = character_class(subtract([ALL_CODE_POINTS], *self.left_out)) + "*"
        self.negated = False  # within a negative lookahead
        self.folded: set[Any] = set()
        self.last_newline = "" if json_safe else r"\x{a}?"  # $ also holds before a newline that ends the text

    def whole(self, tree: Any, search: bool) -> str | None:
        if _looks_ahead(tree):  # what is looked for would have to match escapes everywhere
            self.escapes = {}
        around = self.any_text if search else ""
        return self.sequence(tree, tree.state.flags, _Context(True, True, around, around))

    def sequence(self, items: Any, flags: int, context: _Context) -> str | None:
        """Items one behind the other. An anchor at the edge replaces what may stand outside of the match."""
        items = [(op if isinstance(op, str) else op.name, value) for op, value in items]
        starts, ends, before, after = context
        while items and starts and self._anchor(items[0], flags) in _START_ANCHORS:
            del items[0]
            before = ""
        while items and ends and (anchor := self._anchor(items[-1], flags)) in _END_ANCHORS:
            del items[-1]
            after = self.last_newline if after and anchor == "AT_END" else ""
        if not items:
            return before + after
        parts: list[str | None] = []
        for i, (op, value) in enumerate(items):
            first, last = i == 0, i == len(items) - 1
            if op in {"ASSERT", "ASSERT_NOT"}:
                if value[0] < 0 or not ends:
                    self._refuse("a lookbehind" if value[0] < 0 else "a lookahead in a group that something follows")
                rest = _Context(False, True, "", after)
                parts += [before if first else "", self._looking(op, value[1], items[i + 1 :], flags, rest)]
                break
            edges = _Context(starts and first, ends and last, before if first else "", after if last else "")
            parts.append(self.item(op, value, flags, edges))
        return None if None in parts else "".join(part for part in parts if part is not None)

    def _looking(self, op: str, condition: Any, rest: Any, flags: int, context: _Context) -> str | None:
        """A lookahead and what follows it up to the end of the text."""
        self.negated ^= op == "ASSERT_NOT"
        looked_for = self.sequence(condition, flags, _Context(False, True, "", self.any_text))
        self.negated ^= op == "ASSERT_NOT"
        following = self.sequence(rest, flags, context)
        if looked_for is None or following is None:
            return following if op == "ASSERT_NOT" else None
        return f"(?:({'?=' if op == 'ASSERT' else '?!'}{looked_for}){following})"

    def item(self, op: str, value: Any, flags: int, context: _Context) -> str | None:
        if op in _REFUSED:
            self._refuse(_REFUSED[op])
        if op == "FAILURE":  # what some Python versions make of (?!)
            return None
        if op == "AT":
            self._refuse_anchor(value.name)
        if op == "SUBPATTERN":
            _, added, dropped, body = value
            return self.sequence(body, _flags_within(flags, added, dropped), context)
        if op in {"MAX_REPEAT", "MIN_REPEAT"} and value[:2] == (0, 1) and context.ends and _looks_ahead(value[2]):
            op, value = "BRANCH", (None, [value[2], []])
        if op == "BRANCH":
            branches = [self.sequence(branch, flags, context) for branch in value[1]]
            possible = list(dict.fromkeys(branch for branch in branches if branch is not None))
            return "(?:" + "|".join(possible) + ")" if possible else None
        if op in {"MAX_REPEAT", "MIN_REPEAT"}:  # a lazy repeat matches the same whole texts
            part = _repeat(self.sequence(value[2], flags, _MIDDLE), value[0], value[1])
        else:
            part = self._one_character(op, value, flags)
        return None if part is None else context.before + part + context.after

    def _one_character(self, op: str, value: Any, flags: int) -> str | None:
        if op == "LITERAL" and value in self.escapes:
            return literal(self.escapes[value])
        if op == "LITERAL" and not flags & re.IGNORECASE:
            return literal(chr(value)) if subtract([(value, value)], *self.left_out) else None
        value = tuple(value) if isinstance(value, list) else value
        if flags & re.IGNORECASE:
            self.folded.add((op, value, flags))
            if len(self.folded) > MAX_FOLDED:
                self._refuse(f"more than {MAX_FOLDED} different characters or classes without regard to case")
        intervals = _intervals(op, value, flags)
        if self.portable and not flags & re.ASCII:
            ascii_only = _intervals(op, value, flags & ~re.UNICODE | re.ASCII)
            intervals = _union(intervals, ascii_only) if self.negated else _common(intervals, ascii_only)
        intervals = subtract(intervals, *self.left_out)
        return character_class(intervals) if intervals else None

    def _anchor(self, item: tuple[str, Any], flags: int) -> str:
        """The name of the anchor that an item is; "" for other items."""
        if item[0] != "AT":
            return ""
        name = item[1].name
        if flags & re.MULTILINE and name in {"AT_BEGINNING", "AT_END"}:
            self._refuse(f"{(_START_ANCHORS | _END_ANCHORS)[name]} with the flag MULTILINE")
        return name

    def _refuse_anchor(self, name: str) -> NoReturn:
        if name in _START_ANCHORS:
            self._refuse(f"{_START_ANCHORS[name]} elsewhere than where a match starts")
        if name in _END_ANCHORS:
            self._refuse(f"{_END_ANCHORS[name]} elsewhere than where a match ends")
        self._refuse(r"\b" if name == "AT_BOUNDARY" else r"\B")

    def _refuse(self, what: str) -> NoReturn:
        raise OptionError(f"The pattern {self.pattern!r} has {what}, which is not supported; write it without.")


def _looks_ahead(items: Any) -> bool:
    return "ASSERT" in str(list(items))


def _repeat(body: str | None, low: int, high: Any) -> str | None:
    """`body` from `low` to `high` times."""
    if body is None:
        return None if low else ""
    upper = "" if high == re_parser.MAXREPEAT else str(int(high))
    signs = {(0, ""): "*", (1, ""): "+", (0, "1"): "?"}
    return f"(?:{body})" + signs.get((low, upper), f"{{{low},{upper}}}")


def _flags_within(flags: int, added: int, dropped: int) -> int:
    """The flags in a group that adds and drops some. ASCII, LOCALE and UNICODE exclude each other."""
    kinds = re.ASCII | re.LOCALE | re.UNICODE
    return ((flags & ~kinds if added & kinds else flags) | added) & ~dropped


def _intervals(op: str, value: Any, flags: int) -> Intervals:
    """The code points that one item of a parsed pattern matches."""
    if flags & re.IGNORECASE or op in {"ANY", "CATEGORY"}:
        return _matched(op, value, flags)
    if op != "IN":
        low, high = value if op == "RANGE" else (value, value)
        return _complement([(low, high)]) if op == "NOT_LITERAL" else [(low, min(high, ALL_CODE_POINTS[1]))]
    found: Intervals = []
    for inner, one in value:
        if inner.name != "NEGATE":
            found = _union(found, _intervals(inner.name, one, flags))
    return _complement(found) if value[0][0].name == "NEGATE" else found


@lru_cache(maxsize=256)
def _matched(op: str, value: Any, flags: int) -> Intervals:
    """The same, found by Python's matcher."""
    state = re_parser.State()
    state.str = ""
    code = getattr(re_parser, op)
    item = (re_parser.IN, [(code, value)]) if op == "CATEGORY" else (code, list(value) if op == "IN" else value)
    run = (re_parser.MAX_REPEAT, (1, re_parser.MAXREPEAT, re_parser.SubPattern(state, [item])))
    compiled = _re_compiler.compile(re_parser.SubPattern(state, [run]), flags)
    return [(match.start(), match.end() - 1) for match in compiled.finditer(_all_characters())]


def _union(first: Intervals, second: Intervals) -> Intervals:
    merged: Intervals = []
    for low, high in sorted([*first, *second]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _complement(intervals: Intervals) -> Intervals:
    left, at = [], 0
    for low, high in _union(intervals, []):
        if at < low:
            left.append((at, low - 1))
        at = high + 1
    return [*left, (at, ALL_CODE_POINTS[1])] if at <= ALL_CODE_POINTS[1] else left


def _common(first: Intervals, second: Intervals) -> Intervals:
    return _complement(_union(_complement(first), _complement(second)))


@cache
def _all_characters() -> str:
    """Every code point, each at its own position."""
    return "".join(map(chr, range(ALL_CODE_POINTS[1] + 1)))
