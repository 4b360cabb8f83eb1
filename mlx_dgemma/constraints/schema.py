r"""JSON Schema, translated into a plain pattern. Every text that the pattern matches is JSON and valid.

Not every valid text matches:

- an object has the keys of `properties` in their order, and no others;
- white space is as `json_values` says, and strings have no \u escapes;
- bounded numbers have no exponent and up to 15 digits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn
from urllib.parse import unquote

from ..errors import OptionError, shown
from .json_numbers import Bound, bounded_integer, bounded_number
from .json_values import CHARACTER, COMMA, FORMATS, SPACE, STRING, bracketed, object_of, repeated, string_value
from .patterns import any_of, literal, python_regex_to_plain

_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_TYPES = (*_KEYWORDS, "integer", "boolean", "null")
_COMBINING = ("anyOf", "allOf", "$ref")
SUPPORTED: tuple[str, ...] = ("type", "enum", "const", *(word for words in _KEYWORDS.values() for word in words))
SUPPORTED += _COMBINING
ANNOTATIONS = frozenset(
    "title description default examples $schema $id $comment deprecated readOnly writeOnly $defs definitions".split()
)

MAX_COUNT = 1_000_000  # of lengths and items; far more than any automaton has room for
MAX_PATTERN_LENGTH = 1_000_000  # characters; references in references grow exponentially


def to_regex(schema: dict[str, Any]) -> str:
    """The plain pattern of the JSON texts that are valid by a JSON Schema.

    Args:
        schema: draft 2020-12, with the keywords in SUPPORTED.

    Raises:
        OptionError: the schema is wrong or has what is not supported; the message has a JSON pointer to the place.
    """
    try:
        return _Schema(schema).pattern(schema, "#")
    except RecursionError:
        raise OptionError("The schema is nested too deeply; write it with fewer levels.") from None


class _Schema:
    """Walks one schema. `pointer` is the JSON pointer to the part that a method is given."""

    def __init__(self, root: Any):
        self.root = root
        self.known: dict[str, str] = {}  # references with their patterns
        self.open_references: list[str] = []

    def pattern(self, schema: Any, pointer: str) -> str:
        if schema is True or schema == {}:
            _fail(pointer, "allows any JSON, which is not supported; give it a type")
        if not isinstance(schema, dict):
            _fail(pointer, f"is {shown(schema)}; it should be an object with keywords")
        for word in schema:
            if word not in SUPPORTED and word not in ANNOTATIONS:
                _fail(pointer, f"has {word}, which is not supported; supported are {', '.join(SUPPORTED)}")
        if found := [word for word in _COMBINING if word in schema]:
            _refuse_others(schema, pointer, found[0])
            pattern = self._combined(schema, pointer)
        elif "enum" in schema or "const" in schema:
            pattern = self._values(schema, pointer)
        else:
            pattern = any_of(getattr(self, f"_{kind}")(schema, pointer) for kind in _types_of(schema, pointer))
        if len(pattern) > MAX_PATTERN_LENGTH:
            _fail(pointer, f"needs a pattern of more than {MAX_PATTERN_LENGTH} characters; make it smaller")
        return pattern

    def _combined(self, schema: dict, pointer: str) -> str:
        if "$ref" in schema:
            return self._reference(schema["$ref"], pointer)
        word = "anyOf" if "anyOf" in schema else "allOf"
        parts = schema[word]
        if not isinstance(parts, list) or not parts:
            _fail(pointer, f"has {word} {shown(parts)}; it should be a list of schemas")
        if word == "allOf" and len(parts) > 1:
            _fail(pointer, f"has allOf with {len(parts)} schemas, of which only one is supported; write them as one")
        return any_of(self.pattern(part, f"{pointer}/{word}/{i}") for i, part in enumerate(parts))

    def _reference(self, name: Any, pointer: str) -> str:
        if not isinstance(name, str) or not name.startswith(("#/$defs/", "#/definitions/")):
            _fail(pointer, f"refers to {name!r}; references should start with #/$defs/ or #/definitions/")
        if name in self.open_references:
            _fail(pointer, f"refers to {name!r} from within it, and recursion is not supported; write out the levels")
        if name not in self.known:
            target = self.root
            for part in name[2:].split("/"):
                key = unquote(part).replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or key not in target:
                    _fail(pointer, f"refers to {name!r}, which the schema does not have; define it")
                target = target[key]
            self.open_references.append(name)
            self.known[name] = self.pattern(target, name)
            self.open_references.pop()
        return self.known[name]

    def _values(self, schema: dict, pointer: str) -> str:
        """`enum` and `const`. Of the other keywords those on types, lengths and bounds select among the values."""
        word = "enum" if "enum" in schema else "const"
        _refuse_others(schema, pointer, word, ("type", "minLength", "maxLength", *_KEYWORDS["number"]))
        values = schema["enum"] if word == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            _fail(pointer, f"has enum {shown(values)}; it should be a list with a value or more")
        types = _types_of(schema, pointer) if "type" in schema else [*_TYPES]
        fitting = [
            value for value in values if any(_is(kind, value) for kind in types) and _in_bounds(value, schema, pointer)
        ]
        if not fitting:
            _fail(pointer, f"has no value in {word} that its other keywords allow; change one")
        return any_of(_value(value, pointer) for value in fitting)

    def _object(self, schema: dict, pointer: str) -> str:
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            _fail(pointer, f"has required {shown(required)}; it should be a list of keys")
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(key, str) for key in properties):
            _fail(pointer, f"has properties {shown(properties)}; it should be an object")
        for key in required:
            if key not in properties:
                _fail(pointer, f"requires {key!r}, which is not among its properties; add it there")
        additional = schema.get("additionalProperties", True)
        if not isinstance(additional, bool):
            if properties:
                _fail(pointer, "has additionalProperties beside properties; there it should be true or false")
            member = f"{STRING}:{SPACE}{self.pattern(additional, f'{pointer}/additionalProperties')}"
            return bracketed("{", f"{member}{repeated(COMMA + member, 0, None)}", True)
        if additional and "properties" not in schema:
            _fail(pointer, "is an object without properties; list them, or give additionalProperties a schema")
        members, optional = [], []
        for key, value in properties.items():
            place = f"{pointer}/properties/{key.replace('~', '~0').replace('/', '~1')}"
            members.append(f"{string_value(key)}:{SPACE}{self.pattern(value, place)}")
            optional.append(key not in required)
        return object_of(members, optional)

    def _array(self, schema: dict, pointer: str) -> str:
        low, high = _counts(schema, pointer, "minItems", "maxItems")
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        if not isinstance(prefix, list):
            _fail(pointer, f"has prefixItems {shown(prefix)}; it should be a list of schemas")
        if isinstance(items, list):
            _fail(pointer, "has a list in items; write it as prefixItems")
        if items is True and not prefix and high != 0:
            _fail(pointer, "is an array without items; give items a schema")
        if isinstance(items, bool):  # true would allow any items behind the prefix; no pattern has them
            high = len(prefix) if high is None else min(high, len(prefix))
            if low > high:
                _fail(pointer, f"has minItems {low} and a schema for {high}; give items a schema")
        parts = [self.pattern(part, f"{pointer}/prefixItems/{i}") for i, part in enumerate(prefix)][:high]
        rest = ""
        if high is None or high > len(parts):
            item = self.pattern(items, f"{pointer}/items")
            parts = parts or [item]
            rest = repeated(COMMA + item, max(low - len(parts), 0), None if high is None else high - len(parts))
        for i in reversed(range(1, len(parts))):
            rest = COMMA + parts[i] + rest
            rest = f"(?:{rest})?" if i >= low else rest
        return bracketed("[", "".join(parts[:1]) + rest, low == 0)

    def _string(self, schema: dict, pointer: str) -> str:
        found = [word for word in ("pattern", "format") if word in schema]
        if found:
            _refuse_others((word for word in _KEYWORDS["string"] if word in schema), pointer, found[0])
        if "format" in schema:
            if not isinstance(schema["format"], str) or schema["format"] not in FORMATS:
                _fail(pointer, f"has format {shown(schema['format'])}; supported are {', '.join(FORMATS)}")
            return f'"{FORMATS[schema["format"]]}"'
        if "pattern" not in schema:
            low, high = _counts(schema, pointer, "minLength", "maxLength")
            return f'"{repeated(CHARACTER, low, high)}"'
        if not isinstance(schema["pattern"], str):
            _fail(pointer, f"has pattern {shown(schema['pattern'])}; it should be a string")
        return f'"{python_regex_to_plain(schema["pattern"], json_safe=True, search=True)}"'

    def _integer(self, schema: dict, pointer: str) -> str:
        return _some_number(bounded_integer(*_bounds(schema, pointer)), pointer)

    def _number(self, schema: dict, pointer: str) -> str:
        return _some_number(bounded_number(*_bounds(schema, pointer)), pointer)

    def _boolean(self, schema: dict, pointer: str) -> str:
        return "(?:true|false)"

    def _null(self, schema: dict, pointer: str) -> str:
        return "null"


def _fail(pointer: str, what: str) -> NoReturn:
    raise OptionError(f"The schema at {pointer} {what}.")


def _refuse_others(words: Iterable[str], pointer: str, word: str, allowed: Sequence[str] = ()) -> None:
    """Refuse keywords beside `word` that are neither in `allowed` nor annotations."""
    for other in words:
        if other != word and other not in allowed and other not in ANNOTATIONS:
            _fail(pointer, f"has {other} beside {word}, which is not supported; leave one out")


def _types_of(schema: dict, pointer: str) -> list[str]:
    """The types that a schema allows. Without `type`, those that its keywords are about."""
    if "type" not in schema:
        types = [kind for kind, words in _KEYWORDS.items() if any(word in schema for word in words)]
        if not types:
            _fail(pointer, "allows any JSON, which is not supported; give it a type")
        return types
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or not all(kind in _TYPES for kind in types):
        _fail(pointer, f"has type {shown(schema['type'])}; it should be one or a list of {', '.join(_TYPES)}")
    return [kind for kind in dict.fromkeys(types) if kind != "integer" or "number" not in types]


def _counts(schema: dict, pointer: str, least: str, most: str) -> tuple[int, int | None]:
    """The smallest and largest length that two keywords allow; None: no limit."""
    for word in (least, most):
        count = schema.get(word, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            _fail(pointer, f"has {word} {shown(count)}; it should be a whole number, at least 0")
        if count > MAX_COUNT:
            _fail(pointer, f"has {word} {shown(count)}, and {MAX_COUNT:,} is the most; make it smaller")
    low, high = schema.get(least, 0), schema.get(most)
    if high is not None and low > high:
        _fail(pointer, f"has {least} {low} and {most} {high}; change one")
    return low, high


def _bounds(schema: dict, pointer: str) -> tuple[Bound | None, Bound | None]:
    """The tightest bounds of numbers that a schema has."""
    found = {}
    for word in _KEYWORDS["number"]:
        if word in schema:
            if not _is("number", schema[word]) or not _in_range(schema[word]):
                _fail(pointer, f"has {word} {shown(schema[word])}; it should be a number")
            found[word] = Bound(schema[word], word.startswith("exclusive"))
    lows = [found[word] for word in ("minimum", "exclusiveMinimum") if word in found]
    highs = [found[word] for word in ("maximum", "exclusiveMaximum") if word in found]
    return max(lows, default=None), min(highs, key=lambda high: (high.value, not high.exclusive), default=None)


def _some_number(pattern: str | None, pointer: str) -> str:
    if pattern is None:
        _fail(pointer, "allows no number between its bounds; change one")
    return pattern


def _is(kind: str, value: Any) -> bool:
    """Whether a JSON value has a type of JSON Schema. 1.0 is an integer there, True is none."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    types = {dict: ("object",), list: ("array",), str: ("string",), int: ("integer", "number")}
    return kind in types.get(type(value), ())


def _in_range(number: float) -> bool:
    """Whether a number is one of JSON that readers of floats do not take for infinity."""
    return -sys.float_info.max <= number <= sys.float_info.max


def _in_bounds(value: Any, schema: dict, pointer: str) -> bool:
    """Whether a string's length, or a number, is within a schema's bounds. Other values have none."""
    if isinstance(value, str):
        least, most = _counts(schema, pointer, "minLength", "maxLength")
        return least <= len(value) and (most is None or len(value) <= most)
    if _is("number", value):
        low, high = _bounds(schema, pointer)
        return (low is None or value > low.value or (value == low.value and not low.exclusive)) and (
            high is None or value < high.value or (value == high.value and not high.exclusive)
        )
    return True


def _value(value: Any, pointer: str) -> str:
    """The pattern of one JSON value."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        members = [f"{string_value(key)}:{SPACE}{_value(one, pointer)}" for key, one in value.items()]
        return object_of(members, [False] * len(members))
    if isinstance(value, list):
        return bracketed("[", COMMA.join(_value(one, pointer) for one in value), not value)
    if isinstance(value, str):
        return string_value(value)
    if not (value is None or (isinstance(value, (int, float)) and _in_range(value))):
        _fail(pointer, f"has the value {shown(value)}, which is not JSON; leave it out")
    return literal(json.dumps(value))
