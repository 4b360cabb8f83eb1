"""The notation of tool calls, `call:name{key:value,...}`, as chat templates write it and as models do.

Templates write strings between two quote markers, keys bare, numbers and truth values as JSON. Models also write
JSON's and Python's quotes, bare strings, blanks, trailing commas, parentheses, and forget a brace at the end. Every
reading goes through the text once, so it takes linear time. Texts have signs for markers, as in `vocabulary`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .vocabulary import QUOTE_SIGN as Q
from .vocabulary import SIGNS

DEPTH = 100  # objects and arrays inside one another that are read
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,;]*")
_HEAD = re.compile(rf"\s*(?:(?:call)?\s*:)?\s*([\w.:/$@-]+)\s*([{{(]|[\s{SIGNS}]*\Z)")
_KEY, _KEY_OF_KEYWORD = re.compile(rf"[^:}}\n{Q}]*"), re.compile(rf"[^:=)\n{Q}]*")
PLAIN_KEY = re.compile(r"[\w.$@/+*#!?%&|^~<>-]+(?: [\w.$@/+*#!?%&|^~<>-]+)*")  # a key that needs no quotes
_BARE = {"}": re.compile(rf"[^,{{}}\[\]{Q}]*"), ")": re.compile(rf"[^,{{}}\[\]){Q}]*")}  # by the arguments' end
_REST = {  # of a bare string behind a comma in it: texts without a key
    end: re.compile(rf"[^,:={{}}\[\]{end}{Q}]+(?:,[^,:={{}}\[\]{end}{Q}]+)*(?=[,{end}}}])") for end in "})"
}
# What needs no second look, up to behind its comma or before the end: most of what templates write.
_SIMPLE = rf"(?:([^\W\d]\w*)|(-?(?:0|[1-9]\d{{0,17}}))|{Q}([^{Q}]*){Q})(?:,|(?=%s))"
_SIMPLE_ITEM = re.compile(_SIMPLE % r"\]")
_SIMPLE_KEY = r"([\w.$@/+-]+):"
_SIMPLE_MEMBER = {end: re.compile(rf"{_SIMPLE_KEY}(?:{_SIMPLE % re.escape(end)}|([{{\[]))") for end in "})"}
_SIMPLE_MEMBERS = re.compile(rf"(?:{_SIMPLE_KEY}{_SIMPLE % '}'})*}}")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_IDENTIFIER = re.compile(r"[A-Za-z_$@][\w.$@-]*")
_NEW_LINE = re.compile(rf"\n\s*(?=[\w$@-][\w.$@-]*\s*:|[\"'{Q}])")
# A quote that ends a string where quotes may also stand inside: behind it the notation must go on.
_AFTER = rf"\s*(?:[}}\]]\s*(?:[,}}\])]|\Z)|\)\s*\Z|\Z|,\s*(?:\}}|\]|{Q}|[\"']|%s))"
_END_OF_MEMBER = re.compile(Q + "(?=" + _AFTER % rf"[^,:{{}}\[\]{Q}]{{1,200}}:" + ")")
_END_OF_ITEM = re.compile(Q + "(?=" + _AFTER % r"[\[{]|-?\d|true|false|null|None|True|False" + ")")
_END_OF_KEY = re.compile(Q + r"(?=\s*[:=])")
_QUOTED = {
    '"': re.compile(rf'"((?:[^"\\{Q}]|\\[^{Q}])*)"(?=\s*(?:[,:=}}\])]|\Z))'),
    "'": re.compile(rf"'((?:[^'\\{Q}]|\\[^{Q}])*)'(?=\s*(?:[,:=}}\])]|\Z))"),
}


_NO_PROPERTIES: Mapping[str, Any] = {}


class Call(NamedTuple):
    """A call that was read."""

    name: str
    arguments: dict[str, Any]


class _UnreadableError(ValueError):
    """The text is not in the notation."""


class Tools:
    """The functions that may be called.

    Args:
        declarations: in OpenAI's form; None: nothing is known of them.
    """

    def __init__(self, declarations: Iterable[Any] | None):
        functions = [one.get("function", one) for one in declarations or () if isinstance(one, Mapping)]
        self.known = declarations is not None
        self.parameters: dict[str, Any] = {
            one["name"]: one.get("parameters")
            for one in functions
            if isinstance(one, Mapping) and isinstance(one.get("name"), str)
        }
        self._simple: dict[str, bool] = {}

    def is_simple(self, name: str) -> bool:
        """Whether all keys that a function declares can be told from the notation."""
        found = self._simple.get(name)
        if found is None:
            found = self._simple[name] = not _odd_names(_properties(self.parameters.get(name)))
        return found

    def resolve(self, name: str) -> str | None:
        """The declared function that a name means, or None: itself, or the only one that differs by its namespace."""
        if name in self.parameters:
            return name
        found = [one for one in self.parameters if _is_inside(one, name) or _is_inside(name, one)]
        return found[0] if len(found) == 1 else None


def _properties(schema: Any) -> Mapping[str, Any]:
    """The declared properties of an object."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else _NO_PROPERTIES


def _odd_names(declared: Mapping[str, Any]) -> list[str]:
    """The declared names that could not be told from the notation, the longest first."""
    odd = [name for name in declared if isinstance(name, str) and not PLAIN_KEY.fullmatch(name)]
    return sorted(filter(None, odd), key=len, reverse=True)


def _is_inside(name: str, namespaced: str) -> bool:
    """Whether the one is the other without its namespace."""
    return namespaced.endswith(name) and namespaced[-len(name) - 1 : -len(name)] in (".", ":", "/")


def read_calls(
    body: str, tools: Tools, spelt: Callable[[str], str], complete: bool = True
) -> tuple[list[Call], str] | None:
    """The calls at the beginning of a text and the text behind them; None where there is no call.

    Args:
        body: with signs.
        tools: the declared ones, whose names and keys are known.
        spelt: spells out the signs inside a string.
        complete: whether the text ends where the model ended it, so that it may only have forgotten a brace.
    """
    body = body.rstrip()
    if not _HEAD.match(body, _passed(_BETWEEN, body, 0)):
        return None
    for way in [_Reader, _LooseQuotes, _LooseCommas] + [_OpenEnd] * complete:
        try:
            calls, at = _read_all(way, body, tools, spelt)
        except _UnreadableError:
            continue
        return calls, body[at:]
    return None


def _read_all(way: type[_Reader], body: str, tools: Tools, spelt: Callable[[str], str]) -> tuple[list[Call], int]:
    calls: list[Call] = []
    readers: dict[str, _Reader] = {}
    at = 0
    while head := _HEAD.match(body, _passed(_BETWEEN, body, at)):
        name = tools.resolve(head[1]) or head[1]
        if not head[2].strip():
            if calls or name not in tools.parameters:
                break  # a word alone is a call only of a function that there is
            return [Call(name, {})], len(body)
        end = ")" if head[2] == "(" else "}"
        reader = readers.get(end) or readers.setdefault(end, way(body, spelt, end))
        try:
            arguments, at = reader.arguments(head.end(), tools.parameters.get(name))
        except _UnreadableError:
            if calls:
                break
            raise
        calls.append(Call(name, arguments))
    if not calls:
        raise _UnreadableError
    return calls, at


def _passed(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The place behind what a pattern matches there."""
    found = pattern.match(text, at)
    return found.end() if found else at


class _Reader:
    """Reads a call's arguments as a template writes them, and what cannot be mistaken.

    Args:
        text: with signs.
        spelt: spells out the signs inside a string.
        end: the bracket that ends the arguments.
    """

    commas_needed = True
    open_end = False
    simple = True  # whether a string ends with the next quote

    def __init__(self, text: str, spelt: Callable[[str], str], end: str):
        self.text, self._spelt, self._end = text, spelt, end
        self._bare, self._rest = _BARE[end], _REST[end]
        self._odd: dict[int, list[str]] = {}  # by the identity of the declared properties

    def arguments(self, at: int, schema: Any) -> tuple[dict[str, Any], int]:
        """The arguments from behind their bracket, and the place behind their end."""
        inner = self._space(at)
        if self._end == "}" or not self.text.startswith("{", inner):
            return self._members(at, schema, 1, self._end)
        found, after = self._members(inner + 1, schema, 1, "}")
        after = self._space(after)
        if not self.text.startswith(")", after) and not self.open_end:
            raise _UnreadableError
        return found, min(after + 1, len(self.text))

    def _members(self, at: int, schema: Any, depth: int, end: str = "}") -> tuple[dict[str, Any], int]:
        """The members of an object from behind its brace, and the place behind its end."""
        text = self.text
        declared = _properties(schema)
        found: dict[str, Any] = {}
        bare = ""  # the last member's key, where its value is a bare string
        simple = _SIMPLE_MEMBER[end] if self.simple and not self._odd_names(declared) else None
        while True:
            if simple and (one := simple.match(text, at)):
                key, at, bare = one[1], one.end(), ""
                if one.lastindex == 5:
                    found[key], at, _ = self._value(at - 1, declared.get(key), depth + 1, False)
                    at = self._comma(at, end)
                else:
                    found[key] = value = _simple_value(one, 1, self._spelt)
                    bare = key if one.lastindex == 2 and isinstance(value, str) else ""
                continue
            at = self._space(at)
            if at == len(text):
                if self.open_end:
                    return found, at
                raise _UnreadableError
            if text.startswith(end, at):
                return found, at + 1
            if bare and (rest := self._rest.match(text, at)):  # a comma inside a bare string
                found[bare] += text[text.rfind(",", 0, at) : rest.end()].rstrip()
                at = rest.end()
            else:
                key, at = self._key(at, declared, end)
                found[key], at, is_bare = self._value(self._space(at), declared.get(key), depth + 1, False)
                bare = key if is_bare else ""
            at = self._comma(at, end)

    def _items(self, at: int, schema: Any, depth: int) -> tuple[list[Any], int]:
        """The items of an array from behind its bracket, and the place behind its end."""
        inner = schema.get("items") if isinstance(schema, Mapping) else None
        found: list[Any] = []
        while True:
            while self.simple and (one := _SIMPLE_ITEM.match(self.text, at)):
                found.append(_simple_value(one, 0, self._spelt))
                at = one.end()
            at = self._space(at)
            if at == len(self.text) and self.open_end:
                return found, at
            if self.text.startswith("]", at):
                return found, at + 1
            value, at, _ = self._value(at, inner, depth + 1, True)
            found.append(value)
            at = self._comma(at, "]")

    def _space(self, at: int) -> int:
        return _passed(_SPACE, self.text, at)

    def _comma(self, at: int, end: str) -> int:
        """Behind the comma that must follow, unless the end does."""
        after = self._space(at)
        if self.text[after : after + 1] in (",", ";"):
            return after + 1
        if self.text.startswith(end, after) or (after == len(self.text) and self.open_end):
            return after
        if self.commas_needed and "\n" not in self.text[at:after]:
            raise _UnreadableError
        return after

    def _key(self, at: int, declared: Mapping[str, Any], end: str) -> tuple[str, int]:
        """A key, and the place behind its colon."""
        text = self.text
        if text[at] == Q or text[at] in _QUOTED:
            key, after = self._string(at, _END_OF_KEY)
            after = self._space(after)
            if text[after : after + 1] in (":", "="):
                return key, after + 1
            raise _UnreadableError
        for name in self._odd_names(declared):
            if text.startswith(name, at) and text.startswith(":", after := self._space(at + len(name))):
                return name, after + 1
        place = _passed(_KEY_OF_KEYWORD if end == ")" else _KEY, text, at)
        if text[place : place + 1] == ":":
            if text[at:place].strip() not in declared and not self._is_written(place + 1):
                place = self._last_colon(at, place)
        elif text[place : place + 1] != "=":
            place = text.find("=", at, place)  # no colon before the end: name=value
            if place < 0:
                raise _UnreadableError
        return text[at:place].strip(), place + 1

    def _odd_names(self, declared: Mapping[str, Any]) -> list[str]:
        """As `_odd_names`."""
        found = self._odd.get(id(declared))
        if found is None:
            found = self._odd[id(declared)] = _odd_names(declared)
        return found

    def _is_written(self, at: int) -> bool:
        """Whether a value begins there as templates write it."""
        at = self._space(at)
        return self.text[at : at + 1] in (Q, "{", "[") or self._literal(at)

    def _literal(self, at: int) -> bool:
        """Whether a number or a word of JSON or Python stands there, up to the member's end."""
        found = self._bare.match(self.text, at)
        told = found[0].strip() if found else ""
        return told in _WORDS or _NUMBER.fullmatch(told) is not None

    def _last_colon(self, at: int, first: int) -> int:
        """The colon that ends a key: the first one, unless a later one stands before what templates write."""
        line = self.text.find("\n", first + 1, end := _passed(self._bare, self.text, first + 1))
        last = self.text.rfind(":", first + 1, end if line < 0 else line)
        if last < 0:
            return first
        parts = self.text[at:last].split(":")
        quoted = self.text[self._space(last + 1) : self._space(last + 1) + 1] in (Q, "{", "[")
        named = all(_IDENTIFIER.fullmatch(part.strip()) for part in parts)
        return last if quoted or (named and self._literal(last + 1)) else first

    def _value(self, at: int, schema: Any, depth: int, in_array: bool) -> tuple[Any, int, bool]:
        """A value, the place behind it, and whether it is a bare string."""
        text = self.text
        char = text[at : at + 1]
        if char and char in "{[" and depth > DEPTH:
            raise _UnreadableError
        if char == "{":
            return (*self._members(at + 1, schema, depth), False)
        if char == "[":
            return (*self._items(at + 1, schema, depth), False)
        if char == Q or (char in _QUOTED and _QUOTED[char].match(text, at)):
            return (*self._string(at, _END_OF_ITEM if in_array else _END_OF_MEMBER), False)
        found = self._bare.match(text, at)
        assert found is not None
        told, after = found[0], found.end()
        if line := _NEW_LINE.search(told):  # the next member stands on a line of its own
            told, after = told[: line.start()], at + line.start()
        value = _literal_value(told.strip())
        if value is _NONE:
            if not told.strip() or (after == len(text) and not self.open_end):
                raise _UnreadableError
            return self._spelt(told.strip()), after, True
        return value, after, False

    def _string(self, at: int, end: re.Pattern[str]) -> tuple[str, int]:
        """A quoted string, and the place behind it."""
        if self.text[at] != Q:
            found = _QUOTED[self.text[at]].match(self.text, at)
            if found is None:
                raise _UnreadableError
            return self._spelt(_unescaped(found[1], self.text[at])), found.end()
        after = self._end_of_string(at + 1, end)
        if after < 0:
            raise _UnreadableError
        return self._spelt(self.text[at + 1 : after]), after + 1

    def _end_of_string(self, at: int, end: re.Pattern[str]) -> int:
        """The place of the quote that ends a string; -1: none does."""
        return self.text.find(Q, at)


class _LooseQuotes(_Reader):
    """Reads strings that hold quote markers: one ends where the notation goes on behind it."""

    simple = False

    def _end_of_string(self, at: int, end: re.Pattern[str]) -> int:
        found = end.search(self.text, at)
        return found.start() if found else -1


class _LooseCommas(_Reader):
    """Reads members without commas between them."""

    commas_needed = False


class _OpenEnd(_Reader):
    """Reads objects and arrays that are not closed."""

    commas_needed = False
    open_end = True


def simple_arguments(text: str, at: int, end: int, spelt: Callable[[str], str]) -> tuple[dict[str, Any], int] | None:
    """The arguments from behind their brace and the place behind their end, where all of them are simple, else None.

    Only where no declared key is odd (`Tools.is_simple`) they are what `read_calls` reads.
    """
    found = _SIMPLE_MEMBERS.match(text, at, end)
    if found is None:
        return None
    members = _SIMPLE_MEMBER["}"].finditer(text, at, found.end())
    return {one[1]: _simple_value(one, 1, spelt) for one in members}, found.end()


def _simple_value(one: re.Match[str], before: int, spelt: Callable[[str], str]) -> Any:
    """The value in a match of a simple pattern with so many groups before the value's."""
    kind = one.lastindex or 0
    told = one[kind]
    if kind == before + 1:
        return _WORDS.get(told, told)
    return int(told) if kind == before + 2 else spelt(told)


_NONE = object()


def _literal_value(told: str) -> Any:
    """The value of a number or a word; `_NONE`: it is a string."""
    if told in _WORDS:
        return _WORDS[told]
    number = _NUMBER.fullmatch(told)
    if number is None:
        return _NONE
    try:
        value = float(told) if number[1] or number[2] else int(told)
    except ValueError:  # Python reads integers of at most 4300 digits
        return _NONE
    return value if abs(value) != float("inf") else _NONE


def _unescaped(text: str, quote: str) -> str:
    """A string of JSON or Python without its escapes; left as it is where they make no text."""
    if "\\" not in text:
        return text
    inner = text if quote == '"' else re.sub(r"\\(.)|(\")", lambda one: _python_escape(one), text, flags=re.DOTALL)
    try:
        value = json.loads(f'"{inner}"', strict=False)
        value.encode()
    except ValueError:
        return text
    return value


def _python_escape(found: re.Match[str]) -> str:
    """An escape of a Python string as JSON writes it."""
    if found[2]:
        return '\\"'
    return "'" if found[1] == "'" else found[0]
