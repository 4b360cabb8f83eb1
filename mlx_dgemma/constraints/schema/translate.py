r"""JSON Schema, translated into an expression. Every text of it is JSON and valid.

Not every valid text is one of it:

- an object has the keys of `properties` in their order, and others only where a schema speaks of them;
- any JSON, and references that lead back to themselves, end after some levels;
- white space is as `json_text` says, and strings have no \u escapes;
- bounded numbers have no exponent and up to 15 digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from ...errors import OptionError
from ..checks import length_mark
from ..expressions import Characters, Expression, Repeat, both, choice, marked, repeat, sequence, text, without
from ..nfa import Work, determinize
from ..patterns import python_regex_to_plain
from ..plain import parse_plain
from .alternatives import Alternatives
from .flat import ALL_TYPES, NOTHING, Flat, Node, Part
from .formats import format_pattern
from .json_text import (
    CHARACTER,
    COMMA,
    COUNTED_CHARACTERS,
    UNESCAPED,
    any_order,
    brackets,
    free_text,
    member,
    quoted,
    separated,
    some_of,
    string_value,
)
from .keywords import fail, is_type
from .multiples import multiples
from .numbers import NUMBER, bounded_integer, bounded_number
from .validity import is_valid_flat

LEVELS = ((4, 6), (4, 4), (3, 4), (3, 3), (2, 3), (2, 2), (1, 2), (1, 1))  # of any JSON, and of references, by turns
ROOM = 12_000  # states; with more, fewer levels are taken
ORDERED = 4  # more values than this stand in the order of their enum where they must differ
FINITE = 16  # integers in a range that are taken one by one


class Translation(NamedTuple):
    """A schema's texts.

    Attributes:
        expression: the texts.
        levels: how deep any JSON is nested; 0: there is none.
        returns: how often references that lead back to themselves are followed; 0: none does.
    """

    expression: Expression
    levels: int
    returns: int


def translate(schema: Any) -> Translation:
    """The JSON texts that are valid by a JSON Schema.

    Args:
        schema: draft 2020-12, or one of the drafts and dialects before it.

    Raises:
        OptionError: the schema is wrong or has what is not supported; the message has a JSON pointer to the place.
    """
    try:
        key = json.dumps(schema)
    except (ValueError, TypeError, RecursionError):
        return _translated(schema)
    read = json.loads(key)
    return _kept(key) if read == schema else _translated(schema)  # keys that are no texts would become some


@lru_cache(maxsize=64)
def _kept(key: str) -> Translation:
    return _translated(json.loads(key))


def _translated(schema: Any) -> Translation:
    try:
        for levels, returns in LEVELS:
            translator = _Translator(schema, levels, returns)
            found = translator.whole()
            free, recursive = translator.met_any, translator.alternatives.recursive
            if found.size <= ROOM or not (free or recursive):
                break
    except RecursionError:
        raise OptionError("The schema is nested too deeply; write it with fewer levels.") from None
    return Translation(found, levels if free else 0, returns if recursive else 0)


class _Translator:
    """Walks one schema. The methods return None for what has no text."""

    def __init__(self, root: Any, levels: int, returns: int):
        self.alternatives = Alternatives(root, returns)
        self.levels, self.met_any = levels, False
        self._kept: dict[tuple[Any, ...], tuple[Node, Expression | None]] = {}
        self._any: list[Expression] = []

    def whole(self) -> Expression:
        found = self.node(self.alternatives.of_root())
        if found is None:
            fail("#", "allows no value; change what contradicts itself")
        return found

    def node(self, node: Node) -> Expression | None:
        """The texts of what is valid for some schemas at once."""
        key = tuple((id(part), 0) if isinstance(part, Flat) else (id(part.schema), part.depth) for part in node)
        if key not in self._kept:
            found = [self._flat(flat) for flat in self.alternatives.of(node)]
            possible = [one for one in found if one is not None]
            self._kept[key] = node, choice(possible) if possible else None
        return self._kept[key][1]

    def any_json(self, levels: int) -> Expression:
        """Any JSON, with so many levels of brackets."""
        self.met_any = True
        if not self._any:
            self._any.append(
                choice([quoted(repeat(CHARACTER, 0, None)), parse_plain(NUMBER), *map(text, ("true", "false", "null"))])
            )
        while len(self._any) <= levels:
            array, table = self._any_array(len(self._any)), self._any_object(len(self._any))
            self._any.append(choice([self._any[0], array, table]))
        return self._any[levels]

    def _any_array(self, levels: int) -> Expression:
        found = brackets("[", separated(self.any_json(levels - 1), 1, None), True)
        assert found is not None
        return found

    def _any_object(self, levels: int) -> Expression:
        value = self.any_json(levels - 1)
        inside, _ = some_of([], [], member(_ANY_KEY, value))
        found = brackets("{", inside, True)
        assert found is not None
        return found

    def _flat(self, flat: Flat) -> Expression | None:
        if flat.values is not None:
            rest = replace(flat, values=None)
            fitting = [one for one in flat.values if is_valid_flat(one, rest, self.alternatives.is_valid)]
            return choice([json_value(one) for one in fitting]) if fitting else None
        types = _types_of(flat)
        if types == ALL_TYPES and not flat.excluded:
            return self.any_json(self.levels)
        kinds = [
            kind for kind in ("object", "array", "string", "number", "integer", "boolean", "null") if kind in types
        ]
        found = [getattr(self, f"_{kind}")(flat) for kind in kinds]
        possible = [one for one in found if one is not None]
        return choice(possible) if possible else None

    # objects

    def _object(self, flat: Flat) -> Expression | None:
        _refuse_excluded(flat, "object")
        properties = self._properties(flat)
        members: list[Expression] = []
        may_miss: list[bool] = []
        for key, node in properties.items():
            value = None if node == NOTHING else self.node(node)
            if value is not None:
                members.append(member(string_value(key), value))
                may_miss.append(key not in flat.required)
            elif key in flat.required:
                return None
        extra = self._extra(flat, list(properties))
        inside, may_be_empty = some_of(members, may_miss, extra, *flat.members)
        return brackets("{", inside, may_be_empty)

    def _properties(self, flat: Flat) -> dict[str, Node]:
        """The keys that are written one by one, each with the schema of its value."""
        found = dict(flat.properties)
        for key in flat.required:
            found.setdefault(key, flat.schema_of(key))
        if not found and flat.names:
            named = self._finite((*flat.names, _STRINGS)) or []
            found = {key: flat.schema_of(key) for key in named}
        for key, node in found.items():
            matching = [inner for pattern, inner in flat.patterned if re.search(pattern, key)]
            if not matching and flat.patterned and key not in flat.properties:
                matching = [flat.additional or ()]
            fits = not flat.names or self.alternatives.is_valid(key, flat.names)
            found[key] = tuple(part for inner in (node, *matching) for part in inner) if fits else NOTHING
        return found

    def _extra(self, flat: Flat, listed: list[str]) -> Expression | None:
        """A member whose key is not listed."""
        if listed and not flat.properties and flat.names and not flat.required:
            return None  # all names that there may be are listed
        patterns = [quoted(_pattern(pattern)) for pattern, _ in flat.patterned]
        taken = [string_value(key) for key in listed]
        free = self._key(flat, bool(patterns or taken))
        found: list[Expression] = []
        for i, (_, node) in enumerate(flat.patterned):
            if (value := self.node(node)) is not None:
                key = both(free, patterns[i])
                others = [*taken, *patterns[:i], *patterns[i + 1 :]]
                found.append(member(without(key, choice(others)) if others else key, value))
        further = self._additional(flat, len(listed))
        if further is not None and (value := self.node(further)) is not None:
            others = [*taken, *patterns]
            found.append(member(without(free, choice(others)) if others else free, value))
        return choice(found) if found else None

    def _additional(self, flat: Flat, listed: int) -> Node | None:
        """The schema of further members; None: there are none."""
        given = flat.additional
        if given is None:
            open_ended = not flat.has_properties and not listed and not flat.patterned
            return () if open_ended or flat.members[0] > listed else None
        says_nothing = all(isinstance(part, Part) and part.schema in (True, {}) for part in given)
        return None if says_nothing and listed >= max(flat.members[0], 1) else given

    def _key(self, flat: Flat, told_apart: bool) -> Expression:
        """Any key; without escapes where it is told apart from others, which are texts of their own."""
        if not flat.names:
            return _PLAIN_KEY if told_apart else _ANY_KEY
        names = self.node((*flat.names, _STRINGS))
        return both(_PLAIN_KEY, names) if names is not None else quoted(parse_plain("(?:(?!a)a)"))

    # arrays

    def _array(self, flat: Flat) -> Expression | None:
        _refuse_excluded(flat, "array")
        low, high = flat.length
        prefix, items = list(flat.prefix), flat.items
        wanted = [node for node, least in flat.contains for _ in range(least)]
        for i, node in enumerate(wanted):  # the first items are those that must be there
            prefix[i : i + 1] = [(prefix[i] if i < len(prefix) else items or ()) + node]
        low = max(low, len(wanted))
        if flat.unique and (high is None or high > 1):
            if prefix:
                fail(flat.pointer, "has uniqueItems beside items of their own, which is not supported; leave it out")
            return self._unique(items or (), low, high)
        if items is None and prefix and not flat.contains:
            high = len(prefix) if high is None else min(high, len(prefix))
        parts: list[Expression] = []
        for node in prefix[:high]:
            if (part := self.node(node)) is None:
                high = len(parts)
                break
            parts.append(part)
        rest: list[Expression] = []
        if high is None or high > len(parts):
            if (item := self.node(items or ())) is None:
                high = len(parts)
            elif not parts:
                return brackets("[", separated(item, low, high), low == 0)
            else:
                behind = separated(item, low - len(parts), None if high is None else high - len(parts))
                rest = [sequence(COMMA, behind)]
        if high is not None and low > high:
            return None
        return brackets("[", _in_turn(parts, rest, low), low == 0)

    def _unique(self, items: Node, low: int, high: int | None) -> Expression | None:
        values = self._finite(items)
        if values is not None:
            spelt = [json_value(value) for value in values]
            if low > len(spelt):
                return None
            if len(spelt) <= ORDERED:
                return brackets("[", any_order(spelt, low, high), low == 0)
            inside, may_be_empty = some_of(spelt, [True] * len(spelt), None, low, high)
            return brackets("[", inside, may_be_empty)
        item = self.node(items)
        if item is None:
            return brackets("[", None, low == 0)
        return brackets("[", separated(item, low, high, True), low == 0)

    def _finite(self, node: Node) -> list[Any] | None:
        """All values of a schema, if they are few."""
        found: list[Any] = []
        for flat in self.alternatives.of(node):
            values = flat.values
            if values is None:
                if flat.types == {"integer"} and flat.low and flat.high and flat.high.value - flat.low.value < FINITE:
                    values = tuple(range(int(flat.low.value) - 1, int(flat.high.value) + 2))
                elif flat.types <= {"boolean", "null"}:
                    values = (True, False, None)
                else:
                    return None
            found += [one for one in values if is_valid_flat(one, flat, self.alternatives.is_valid)]
        return [one for i, one in enumerate(found) if not any(_equal(one, other) for other in found[:i])]

    # scalars

    def _string(self, flat: Flat) -> Expression | None:
        low, high = flat.characters
        patterns = [_pattern(one) for one in flat.patterns]
        formats = [parse_plain(format_pattern(one)) for one in flat.formats]
        excluded = [string_value(one) for one in flat.excluded if isinstance(one, str)]
        if not patterns and not formats:
            if high is not None and low > high:
                return None
            found = quoted(free_text(UNESCAPED if excluded else CHARACTER, low, high))
        else:
            content = _together([*patterns, *formats])
            if patterns and formats and _is_empty(content):
                content = _together(patterns)  # a format is an annotation, a pattern is none
            found = quoted(_of_length(content, low, high))
        return without(found, choice(excluded)) if excluded else found

    def _integer(self, flat: Flat) -> Expression | None:
        if flat.multiples:
            return self._multiple(flat)
        pattern = bounded_integer(flat.low, flat.high)
        return None if pattern is None else self._but_excluded(parse_plain(pattern), flat)

    def _number(self, flat: Flat) -> Expression | None:
        if flat.multiples:
            return self._multiple(flat)
        if any(is_type("number", one) for one in flat.excluded):
            return self._integer(replace(flat, types=frozenset({"integer"})))
        pattern = bounded_number(flat.low, flat.high)
        return None if pattern is None else parse_plain(pattern)

    def _multiple(self, flat: Flat) -> Expression | None:
        found: Expression | None = None
        for step in flat.multiples:
            one = multiples(step, flat, lambda what: fail(flat.pointer, what))
            if one is None:
                return None
            found = one if found is None else both(found, one)
        assert found is not None
        return self._but_excluded(found, flat)

    def _but_excluded(self, found: Expression, flat: Flat) -> Expression:
        numbers = [text(json.dumps(int(one))) for one in flat.excluded if is_type("integer", one)]
        return without(found, choice(numbers)) if numbers else found

    def _boolean(self, flat: Flat) -> Expression | None:
        left = [one for one in (True, False) if not any(one is other for other in flat.excluded)]
        return choice([text(json.dumps(one)) for one in left]) if left else None

    def _null(self, flat: Flat) -> Expression | None:
        return None if any(one is None for one in flat.excluded) else text("null")


_ANY_KEY, _PLAIN_KEY = (quoted(repeat(part, 0, None)) for part in (CHARACTER, UNESCAPED))
_STRINGS = Flat(types=frozenset({"string"}))


def json_value(value: Any) -> Expression:
    """The texts of one JSON value."""
    if isinstance(value, dict):
        members = [member(string_value(key), json_value(one)) for key, one in value.items()]
        found = brackets("{", some_of(members, [False] * len(members))[0], not members)
    elif isinstance(value, list):
        found = brackets(
            "[", _in_turn([json_value(one) for one in value], [], len(value)) if value else None, not value
        )
    else:
        found = string_value(value) if isinstance(value, str) else text(json.dumps(value))
    assert found is not None
    return found


def _types_of(flat: Flat) -> frozenset[str]:
    """The types of a schema. Without `type`, those that its keywords are about."""
    if flat.types != ALL_TYPES:
        return flat.types
    about = {
        "object": flat.properties
        or flat.has_properties
        or flat.required
        or flat.additional is not None
        or flat.patterned
        or flat.names
        or flat.members != (0, None),
        "array": flat.prefix or flat.items is not None or flat.length != (0, None) or flat.unique or flat.contains,
        "string": flat.patterns or flat.formats or flat.characters != (0, None),
        "number": flat.low or flat.high or flat.multiples,
    }
    return frozenset(kind for kind, there in about.items() if there) or flat.types


def _in_turn(parts: Sequence[Expression], rest: Sequence[Expression], low: int) -> Expression | None:
    """The first `low` parts and as many more as there are, with commas between; `rest` brings its own."""
    if not parts:
        return None
    behind = list(rest)
    if behind and len(parts) >= low:
        behind = [choice([text(""), *behind])]
    for i in reversed(range(1, len(parts))):
        behind = [sequence(COMMA, parts[i], *behind)]
        if i >= low:
            behind = [choice([text(""), *behind])]
    return sequence(parts[0], *behind)


def _pattern(pattern: str) -> Expression:
    found = parse_plain(python_regex_to_plain(pattern, json_safe=True, search=True, portable=True))
    if isinstance(found, Repeat) and isinstance(found.part, Characters):
        return free_text(found.part, found.low, found.high)
    return found


def _together(parts: Sequence[Expression]) -> Expression:
    found = parts[0]
    for part in parts[1:]:
        found = both(found, part)
    return found


def _of_length(content: Expression, low: int, high: int | None) -> Expression:
    """Those texts that have so many characters."""
    if low > 1:
        content = both(content, sequence(repeat(UNESCAPED, low, low), repeat(UNESCAPED, 0, None)))
    elif low == 1:
        content = both(content, repeat(UNESCAPED, 1, None))
    if high is None:
        return content
    if high <= COUNTED_CHARACTERS:
        return both(content, repeat(UNESCAPED, 0, high))
    return marked(content, length_mark(high))


def _is_empty(expression: Expression) -> bool:
    return not any(determinize(expression, Work()).accepting)


def _equal(one: Any, other: Any) -> bool:
    return json.dumps(one) == json.dumps(other) or (
        is_type("number", one) and is_type("number", other) and one == other
    )


def _refuse_excluded(flat: Flat, kind: str) -> None:
    if any(is_type(kind, one) for one in flat.excluded):
        fail(flat.pointer, f"leaves out an {kind}, which is not supported; leave out texts and numbers alone")
