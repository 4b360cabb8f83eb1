"""The keywords of one JSON Schema, read and checked: a schema's own part of its `Flat`."""

from __future__ import annotations

import difflib
import sys
from typing import Any, NoReturn

from ...errors import OptionError, shown
from .flat import ALL_TYPES, TYPES, Flat, Node, Part, type_set
from .formats import FORMATS
from .numbers import Bound, bounded_integer, bounded_number

KEYWORDS = {
    "object": (
        "properties required additionalProperties patternProperties propertyNames minProperties maxProperties "
        "unevaluatedProperties dependentRequired dependentSchemas dependencies"
    ).split(),
    "array": (
        "items prefixItems additionalItems contains minContains minItems maxItems uniqueItems unevaluatedItems"
    ).split(),
    "string": "minLength maxLength pattern format".split(),
    "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split(),
}
COMBINING = ("anyOf", "oneOf", "allOf", "not", "if", "then", "else", "$ref")
SUPPORTED: tuple[str, ...] = ("type", "enum", "const", *(word for words in KEYWORDS.values() for word in words))
SUPPORTED += COMBINING
REFUSED = {"maxContains": "write the items as prefixItems"}
MAX_COUNT = 1_000_000  # of lengths and items; far more than any automaton has room for


def own_part(schema: dict, pointer: str, depth: int) -> Flat:
    """What a schema's own keywords say, those aside that combine schemas.

    Raises:
        OptionError: a keyword is malformed, refused, or contradicts another.
    """
    check_names(schema, pointer)
    values = _values(schema, pointer)
    types = _types(schema, pointer)
    low, high = _bounds(schema, pointer)
    part = Flat(
        types=types,
        values=values,
        members=_counts(schema, pointer, "minProperties", "maxProperties"),
        length=_counts(schema, pointer, "minItems", "maxItems"),
        characters=_counts(schema, pointer, "minLength", "maxLength"),
        low=low,
        high=high,
        multiples=_multiples(schema, pointer),
        patterns=_text(schema, pointer, "pattern"),
        formats=tuple(name for name in _text(schema, pointer, "format") if name in FORMATS),
        unique=_flag(schema, pointer, "uniqueItems"),
        pointer=pointer,
        **_object(schema, pointer, depth),
        **_array(schema, pointer, depth),
    )
    if types <= {"number", "integer"} and (low or high):
        bounded = bounded_number if "number" in types else bounded_integer
        if bounded(low, high) is None:
            fail(pointer, "allows no number between its bounds; change one")
    return part


def fail(pointer: str, what: str) -> NoReturn:
    """Refuse the schema."""
    raise OptionError(f"The schema at {pointer} {what}.")


def key_pointer(pointer: str, word: str, key: str) -> str:
    """The JSON pointer to a key below a keyword."""
    return f"{pointer}/{word}/{key.replace('~', '~0').replace('/', '~1')}"


def schemas_of(schema: dict, pointer: str, word: str) -> list[tuple[Any, str]]:
    """The list of schemas that a keyword has, with their pointers."""
    parts = schema[word]
    if not isinstance(parts, list) or not parts:
        fail(pointer, f"has {word} {shown(parts)}; it should be a list of schemas")
    return [(part, f"{pointer}/{word}/{i}") for i, part in enumerate(parts)]


def check_names(schema: dict, pointer: str) -> None:
    """Refuse keywords that would change the meaning. Unknown ones say nothing about values, as the standard has it."""
    for word in schema:
        if word in REFUSED:
            fail(pointer, f"has {word}, which is not supported; {REFUSED[word]}")
        if isinstance(word, str) and word not in SUPPORTED and not word.startswith(("x-", "$")):
            near = difflib.get_close_matches(word, SUPPORTED, 1, 0.88)
            if near and near[0].lower() not in ("items",):
                fail(pointer, f"has {word}, which is no keyword; write {near[0]}")


def is_type(kind: str, value: Any) -> bool:
    """Whether a JSON value has a type of JSON Schema. 1.0 is an integer there, True is none."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    types = {dict: ("object",), list: ("array",), str: ("string",), int: ("integer", "number")}
    return kind in types.get(type(value), ())


def in_range(number: float) -> bool:
    """Whether a number is one of JSON that readers of floats do not take for infinity."""
    return -sys.float_info.max <= number <= sys.float_info.max


def _types(schema: dict, pointer: str) -> frozenset[str]:
    if "type" not in schema:
        return ALL_TYPES
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or not all(isinstance(kind, str) and kind in TYPES for kind in types):
        fail(pointer, f"has type {shown(schema['type'])}; it should be one or a list of {', '.join(TYPES)}")
    return type_set(types)


def _values(schema: dict, pointer: str) -> tuple[Any, ...] | None:
    if "enum" not in schema and "const" not in schema:
        return None
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(values, list) or not values:
        fail(pointer, f"has enum {shown(values)}; it should be a list with a value or more")
    for value in values:
        _check_json(value, value, pointer)
    return tuple(values)


def _check_json(value: Any, whole: Any, pointer: str) -> None:
    inside: list[Any] = []
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        inside = list(value.values())
    elif isinstance(value, list):
        inside = value
    elif not (value is None or isinstance(value, str) or (isinstance(value, (int, float)) and in_range(value))):
        fail(pointer, f"has the value {shown(value)}, which is not JSON; leave it out")
    for one in inside:
        _check_json(one, whole, pointer)


def _counts(schema: dict, pointer: str, least: str, most: str) -> tuple[int, int | None]:
    """The smallest and largest count that two keywords allow; None: no limit."""
    for word in (least, most):
        count = schema.get(word, 0)
        if isinstance(count, float) and count.is_integer():
            count = int(count)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            fail(pointer, f"has {word} {shown(count)}; it should be a whole number, at least 0")
        if count > MAX_COUNT and word == least:
            fail(pointer, f"has {word} {shown(count)}, and {MAX_COUNT:,} is the most; make it smaller")
    low, high = int(schema.get(least, 0)), schema.get(most)
    if high is not None and low > high:
        fail(pointer, f"has {least} {low} and {most} {high}; change one")
    return low, None if high is None or high > MAX_COUNT else int(high)


def _bounds(schema: dict, pointer: str) -> tuple[Bound | None, Bound | None]:
    """The tightest bounds of numbers that a schema has."""
    found: dict[str, list[Bound]] = {"minimum": [], "maximum": []}
    for word, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        strict = schema.get(exclusive)
        if word in schema:
            found[word].append(Bound(_number(schema, pointer, word), strict is True))
        if exclusive in schema and not isinstance(strict, bool):  # true and false is how OpenAPI 3.0 writes it
            found[word].append(Bound(_number(schema, pointer, exclusive), True))
    highs = found["maximum"]
    return (
        max(found["minimum"], default=None),
        min(highs, key=lambda high: (high.value, not high.exclusive), default=None),
    )


def _number(schema: dict, pointer: str, word: str) -> float:
    number = schema[word]
    if not is_type("number", number) or not in_range(number):
        fail(pointer, f"has {word} {shown(number)}; it should be a number")
    return number


def _multiples(schema: dict, pointer: str) -> tuple[float, ...]:
    if "multipleOf" not in schema:
        return ()
    number = _number(schema, pointer, "multipleOf")
    if number <= 0:
        fail(pointer, f"has multipleOf {shown(number)}; it should be above 0")
    return (number,)


def _text(schema: dict, pointer: str, word: str) -> tuple[str, ...]:
    if word not in schema:
        return ()
    if not isinstance(schema[word], str):
        fail(pointer, f"has {word} {shown(schema[word])}; it should be a string")
    return (schema[word],)


def _flag(schema: dict, pointer: str, word: str) -> bool:
    flag = schema.get(word, False)
    if not isinstance(flag, bool):
        fail(pointer, f"has {word} {shown(flag)}; it should be true or false")
    return flag


def _object(schema: dict, pointer: str, depth: int) -> dict[str, Any]:
    required = schema.get("required", [])
    if isinstance(required, bool):  # as JSON Schema of draft 3 and some form libraries write it
        required = []
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        fail(pointer, f"has required {shown(required)}; it should be a list of keys")
    found: dict[str, Any] = {"required": tuple(dict.fromkeys(required)), "has_properties": "properties" in schema}
    for word in ("properties", "patternProperties"):
        given = schema.get(word, {})
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            fail(pointer, f"has {word} {shown(given)}; it should be an object")
        nodes = {key: (Part(one, key_pointer(pointer, word, key), depth),) for key, one in given.items()}
        found |= {"properties": nodes} if word == "properties" else {"patterned": tuple(nodes.items())}
    for word, name in (
        ("unevaluatedProperties", "additional"),
        ("additionalProperties", "additional"),
        ("propertyNames", "names"),
    ):
        if word in schema:
            found[name] = _node(schema, pointer, word, depth)
    return found


def _array(schema: dict, pointer: str, depth: int) -> dict[str, Any]:
    prefix, rest = schema.get("prefixItems", []), "items"
    if isinstance(schema.get("items"), list):  # as drafts before 2020-12 write it
        prefix, rest = schema["items"], "additionalItems"
    if not isinstance(prefix, list):
        fail(pointer, f"has prefixItems {shown(prefix)}; it should be a list of schemas")
    word = "items" if rest == "additionalItems" else "prefixItems"
    found: dict[str, Any] = {
        "prefix": tuple((Part(one, f"{pointer}/{word}/{i}", depth),) for i, one in enumerate(prefix))
    }
    for name in ("unevaluatedItems", rest):
        if name in schema:
            found["items"] = _node(schema, pointer, name, depth)
    if "contains" in schema:
        least = _counts(schema, pointer, "minContains", "maxContains")[0] if "minContains" in schema else 1
        found["contains"] = ((_node(schema, pointer, "contains", depth), least),)
    return found


def _node(schema: dict, pointer: str, word: str, depth: int) -> Node:
    return (Part(schema[word], f"{pointer}/{word}", depth),)
