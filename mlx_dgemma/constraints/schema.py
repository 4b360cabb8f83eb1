r"""JSON Schema to a pattern: every text that it matches is JSON and valid.

Not every text of a valid value matches. Keys come in the order of `properties`, and no others; inside brackets and
behind , and : there may be nothing, a space, or a new line with any indentation, so that what json.dumps writes
matches with and without `indent`; strings have no \u escapes, and bounded numbers have no exponent and up to 15
digits. Patterns are in the plain subset of `regular`.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NoReturn
from urllib.parse import unquote

from ..errors import OptionError
from .patterns import (
    ALL_CODE_POINTS,
    JSON_ESCAPED,
    SURROGATES,
    character_class,
    literal,
    python_regex_to_plain,
    subtract,
)

_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_TYPES = (*_KEYWORDS, "integer", "boolean", "null")
_COMBINED = ("anyOf", "allOf", "$ref")
SUPPORTED: tuple[str, ...] = ("type", "enum", "const", *(word for words in _KEYWORDS.values() for word in words))
SUPPORTED += _COMBINED
ANNOTATIONS = frozenset(
    "title description default examples $schema $id $comment deprecated readOnly writeOnly $defs definitions".split()
)

LONGEST = 1_000_000  # characters of a pattern; references in references grow exponentially
DIGITS = 15  # decimals of so many digits differ as floats if they differ as text

SPACE = r"(?: |\x{a} *)?"
COMMA = "," + SPACE
_ESCAPES = "(?:" + "|".join(map(literal, '"\\/bfnrt')) + ")"
CHARACTER = (
    f"(?:{character_class(subtract([ALL_CODE_POINTS], SURROGATES, *JSON_ESCAPED))}|{literal(chr(92))}{_ESCAPES})"
)
STRING = f'"{CHARACTER}*"'
INTEGER = f"(?:0|-?[1-9][0-9]{{0,{DIGITS - 1}}})"
# json.dumps writes floats below 1e16 without an exponent; values stay below 1e115, so that none is read as infinity.
NUMBER = r"-?(?:0|[1-9][0-9]{0,15})(?:\x{2e}[0-9]+)?(?:[eE](?:\x{2b}|-)?[0-9]{1,2})?"

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # Python has no year 0
_FOURS = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP = f"(?:[0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29"
_DAYS = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAYS}|{_LEAP})"
_MINUTES = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_MINUTES}:[0-5][0-9](?:\x{{2e}}[0-9]{{1,6}})?(?:Z|(?:\x{{2b}}|-){_MINUTES})"
_HEX = "[0-9A-Fa-f]"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "-".join(f"{_HEX}{{{count}}}" for count in (8, 4, 4, 4, 12)),
}


def to_regex(schema: dict[str, Any]) -> str:
    """The pattern of JSON texts that a JSON Schema (draft 2020-12, the keywords in SUPPORTED) holds valid."""
    try:
        return _Schema(schema).pattern(schema, "#")
    except RecursionError:
        raise OptionError("The schema is nested too deeply; write it with fewer levels.") from None


class _Schema:
    """Walks one schema; `place` says where, as a JSON pointer."""

    def __init__(self, root: Any):
        self.root = root
        self.done: dict[str, str] = {}  # patterns of references
        self.under_way: list[str] = []

    def pattern(self, schema: Any, place: str) -> str:
        if schema is True or schema == {}:
            _fail(place, "allows any JSON, which is not supported; give it a type")
        if not isinstance(schema, dict):
            _fail(place, f"is {reprlib.repr(schema)}; it should be an object with keywords")
        for word in schema:
            if word not in SUPPORTED and word not in ANNOTATIONS:
                _fail(place, f"has {word}, which is not supported; supported are {', '.join(SUPPORTED)}")
        if found := [word for word in _COMBINED if word in schema]:
            _alone(schema, place, found[0])
            pattern = self._combined(schema, place)
        elif "enum" in schema or "const" in schema:
            pattern = self._values(schema, place)
        else:
            pattern = _any(getattr(self, f"_{kind}")(schema, place) for kind in _kinds(schema, place))
        if len(pattern) > LONGEST:
            _fail(place, f"needs a pattern of more than {LONGEST} characters; make it smaller")
        return pattern

    def _combined(self, schema: dict, place: str) -> str:
        if "$ref" in schema:
            return self._reference(schema["$ref"], place)
        word = "anyOf" if "anyOf" in schema else "allOf"
        parts = schema[word]
        if not isinstance(parts, list) or not parts:
            _fail(place, f"has {word} {reprlib.repr(parts)}; it should be a list of schemas")
        if word == "allOf" and len(parts) > 1:
            _fail(place, f"has allOf with {len(parts)} schemas, of which only one is supported; write them as one")
        return _any(self.pattern(part, f"{place}/{word}/{i}") for i, part in enumerate(parts))

    def _reference(self, name: Any, place: str) -> str:
        if not isinstance(name, str) or not name.startswith(("#/$defs/", "#/definitions/")):
            _fail(place, f"refers to {name!r}; references should start with #/$defs/ or #/definitions/")
        if name in self.under_way:
            _fail(place, f"refers to {name!r} from within it, and recursion is not supported; write out the levels")
        if name not in self.done:
            target = self.root
            for part in name[2:].split("/"):
                key = unquote(part).replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or key not in target:
                    _fail(place, f"refers to {name!r}, which the schema does not have; define it")
                target = target[key]
            self.under_way.append(name)
            self.done[name] = self.pattern(target, name)
            self.under_way.pop()
        return self.done[name]

    def _values(self, schema: dict, place: str) -> str:
        word = "enum" if "enum" in schema else "const"
        _alone(schema, place, word, ("type", "minLength", "maxLength", *_KEYWORDS["number"]))
        values = schema["enum"] if word == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            _fail(place, f"has enum {reprlib.repr(values)}; it should be a list with a value or more")
        kinds = _kinds(schema, place) if "type" in schema else [*_TYPES]
        fitting = [
            value for value in values if any(_is(kind, value) for kind in kinds) and _within(value, schema, place)
        ]
        if not fitting:
            _fail(place, f"has no value in {word} that its other keywords allow; change one")
        return _any(_value(value, place) for value in fitting)

    def _object(self, schema: dict, place: str) -> str:
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            _fail(place, f"has required {reprlib.repr(required)}; it should be a list of keys")
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(key, str) for key in properties):
            _fail(place, f"has properties {reprlib.repr(properties)}; it should be an object")
        for key in required:
            if key not in properties:
                _fail(place, f"requires {key!r}, which is not among its properties; add it there")
        more = schema.get("additionalProperties", True)
        if not isinstance(more, bool):
            if properties:
                _fail(place, "has additionalProperties beside properties; there it should be true or false")
            member = f"{STRING}:{SPACE}{self.pattern(more, f'{place}/additionalProperties')}"
            return _bracketed("{", f"{member}{_times(COMMA + member, 0, None)}", True)
        if more and "properties" not in schema:
            _fail(place, "is an object without properties; list them, or give additionalProperties a schema")
        members, optional = [], []
        for key, held in properties.items():
            where = f"{place}/properties/{key.replace('~', '~0').replace('/', '~1')}"
            members.append(f"{_string(key)}:{SPACE}{self.pattern(held, where)}")
            optional.append(key not in required)
        return _members(members, optional)

    def _array(self, schema: dict, place: str) -> str:
        low, high = _counts(schema, place, "minItems", "maxItems")
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        if not isinstance(prefix, list):
            _fail(place, f"has prefixItems {reprlib.repr(prefix)}; it should be a list of schemas")
        if isinstance(items, list):
            _fail(place, "has a list in items; write it as prefixItems")
        if items is True and not prefix and high != 0:
            _fail(place, "is an array without items; give items a schema")
        if isinstance(items, bool):  # no more than the prefix, although there may be for true
            high = len(prefix) if high is None else min(high, len(prefix))
            if low > high:
                _fail(place, f"has minItems {low} and a schema for {high}; give items a schema")
        parts = [self.pattern(part, f"{place}/prefixItems/{i}") for i, part in enumerate(prefix)][:high]
        rest = ""
        if high is None or high > len(parts):
            item = self.pattern(items, f"{place}/items")
            parts = parts or [item]
            rest = _times(COMMA + item, max(low - len(parts), 0), None if high is None else high - len(parts))
        for i in reversed(range(1, len(parts))):
            rest = COMMA + parts[i] + rest
            rest = f"(?:{rest})?" if i >= low else rest
        return _bracketed("[", "".join(parts[:1]) + rest, low == 0)

    def _string(self, schema: dict, place: str) -> str:
        found = [word for word in ("pattern", "format") if word in schema]
        if found:
            _alone((word for word in _KEYWORDS["string"] if word in schema), place, found[0])
        if "format" in schema:
            if not isinstance(schema["format"], str) or schema["format"] not in FORMATS:
                _fail(place, f"has format {reprlib.repr(schema['format'])}; supported are {', '.join(FORMATS)}")
            return f'"{FORMATS[schema["format"]]}"'
        if "pattern" not in schema:
            low, high = _counts(schema, place, "minLength", "maxLength")
            return f'"{_times(CHARACTER, low, high)}"'
        if not isinstance(schema["pattern"], str):
            _fail(place, f"has pattern {reprlib.repr(schema['pattern'])}; it should be a string")
        return f'"{python_regex_to_plain(schema["pattern"], json_safe=True, search=True)}"'

    def _integer(self, schema: dict, place: str) -> str:
        low, high = _bounds(schema, place)
        return INTEGER if low is high is None else _range(low, high, 0, place)

    def _number(self, schema: dict, place: str) -> str:
        low, high = _bounds(schema, place)
        if low is high is None:
            return NUMBER
        whole = max(len(str(abs(int(bound[0])))) for bound in (low, high) if bound)
        return _range(low, high, max(DIGITS - whole, 0), place)

    def _boolean(self, schema: dict, place: str) -> str:
        return "(?:true|false)"

    def _null(self, schema: dict, place: str) -> str:
        return "null"


def _fail(place: str, what: str) -> NoReturn:
    raise OptionError(f"The schema at {place} {what}.")


def _alone(words: Iterable[str], place: str, word: str, beside: Sequence[str] = ()) -> None:
    """Refuse what stands beside `word` and is neither in `beside` nor an annotation."""
    for other in words:
        if other != word and other not in beside and other not in ANNOTATIONS:
            _fail(place, f"has {other} beside {word}, which is not supported; leave one out")


def _kinds(schema: dict, place: str) -> list[str]:
    """The types that a schema allows; without `type`, those that its keywords are about."""
    if "type" not in schema:
        kinds = [kind for kind, words in _KEYWORDS.items() if any(word in schema for word in words)]
        if not kinds:
            _fail(place, "allows any JSON, which is not supported; give it a type")
        return kinds
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not kinds or not all(kind in _TYPES for kind in kinds):
        _fail(place, f"has type {reprlib.repr(schema['type'])}; it should be one or a list of {', '.join(_TYPES)}")
    return [kind for kind in dict.fromkeys(kinds) if kind != "integer" or "number" not in kinds]


def _counts(schema: dict, place: str, least: str, most: str) -> tuple[int, int | None]:
    """What two keywords say about a length; None: no limit."""
    for word in (least, most):
        count = schema.get(word, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            _fail(place, f"has {word} {reprlib.repr(count)}; it should be a whole number, at least 0")
    low, high = schema.get(least, 0), schema.get(most)
    if high is not None and low > high:
        _fail(place, f"has {least} {low} and {most} {high}; change one")
    return low, high


_Bound = tuple[float, bool]  # the value, and whether it is itself outside


def _bounds(schema: dict, place: str) -> tuple[_Bound | None, _Bound | None]:
    """The tightest bounds of numbers."""
    found = {}
    for word in _KEYWORDS["number"]:
        if word in schema:
            if not _is("number", schema[word]) or not math.isfinite(schema[word]):
                _fail(place, f"has {word} {reprlib.repr(schema[word])}; it should be a number")
            found[word] = (schema[word], word.startswith("exclusive"))
    lows = [found[word] for word in ("minimum", "exclusiveMinimum") if word in found]
    highs = [found[word] for word in ("maximum", "exclusiveMaximum") if word in found]
    return max(lows, default=None), min(highs, key=lambda high: (high[0], not high[1]), default=None)


def _is(kind: str, value: Any) -> bool:
    """Whether a JSON value has a type, as JSON Schema sees it: 1.0 is an integer, True is none."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    named = {dict: ("object",), list: ("array",), str: ("string",), int: ("integer", "number")}
    return kind in named.get(type(value), ())


def _within(value: Any, schema: dict, place: str) -> bool:
    """Whether a value is within the bounds of its length or of itself."""
    if isinstance(value, str):
        least, most = _counts(schema, place, "minLength", "maxLength")
        return least <= len(value) and (most is None or len(value) <= most)
    if _is("number", value):
        low, high = _bounds(schema, place)
        return (low is None or value > low[0] or (value == low[0] and not low[1])) and (
            high is None or value < high[0] or (value == high[0] and not high[1])
        )
    return True


def _value(value: Any, place: str) -> str:
    """The pattern of one JSON value."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        members = [f"{_string(key)}:{SPACE}{_value(held, place)}" for key, held in value.items()]
        return _members(members, [False] * len(members))
    if isinstance(value, list):
        return _bracketed("[", COMMA.join(_value(held, place) for held in value), not value)
    if isinstance(value, str):
        return _string(value)
    if not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        _fail(place, f"has the value {reprlib.repr(value)}, which is not JSON; leave it out")
    return literal(json.dumps(value))


def _string(text: str) -> str:
    """The pattern of one JSON string, written as json.dumps does; only what is not Unicode is escaped."""
    escaped = re.sub("[\ud800-\udfff]", lambda match: rf"\u{ord(match[0]):x}", json.dumps(text, ensure_ascii=False))
    return literal(escaped)


def _any(patterns: Iterable[str]) -> str:
    different = list(dict.fromkeys(patterns))
    return different[0] if len(different) == 1 else "(?:" + "|".join(different) + ")"


def _times(pattern: str, low: int, high: int | None) -> str:
    if (low, high) == (0, None):
        return f"(?:{pattern})*"
    return f"(?:{pattern}){{{low},{'' if high is None else high}}}"


def _bracketed(bracket: str, inside: str, optional: bool) -> str:
    """`inside` in brackets; `optional`: or nothing in them."""
    inside = inside and inside + SPACE
    closing = {"[": "]", "{": "}"}[bracket]
    return literal(bracket) + SPACE + (f"(?:{inside})?" if optional and inside else inside) + literal(closing)


def _members(members: Sequence[str], optional: Sequence[bool]) -> str:
    """An object of members in this order, some of which may be left out."""
    if all(optional):
        return _bracketed("{", _some(members) if members else "", True)
    first = optional.index(False)  # the commas of what is before and behind this one are theirs
    before = "".join(f"(?:{member}{COMMA})?" for member in members[:first])
    rest = (f"(?:{COMMA}{m})?" if free else COMMA + m for m, free in zip(members[first + 1 :], optional[first + 1 :]))
    return _bracketed("{", before + members[first] + "".join(rest), False)


def _some(members: Sequence[str]) -> str:
    """One or more members in this order, in O(n log n): the first is in one half or in the other."""
    if len(members) == 1:
        return members[0]
    half = len(members) // 2
    rest = "".join(f"(?:{COMMA}{member})?" for member in members[half:])
    return f"(?:{_some(members[:half])}{rest}|{_some(members[half:])})"


def _range(low: _Bound | None, high: _Bound | None, places: int, place: str) -> str:
    """Numbers between bounds, of which one may be missing, with up to `places` decimals.

    Bounds and numbers are counted in units of the last decimal. A float is near its bound only if its text is,
    where it has no more than DIGITS digits, so that json.loads moves no number across a bound.
    """
    scale = 10**places
    first = last = None
    if low:
        units = _exact(low[0], places) * scale
        first = math.floor(units) + 1 if low[1] else math.ceil(units)
    if high:
        units = _exact(high[0], places) * scale
        last = math.ceil(units) - 1 if high[1] else math.floor(units)
    widest = 10**DIGITS * scale - 1
    if first is None:
        first = min(-widest, 10 * (last or 0))
    if last is None:
        last = max(widest, 10 * first)
    if first > last:
        _fail(place, "allows no number between its bounds; change one")
    parts = []
    if first < 0:
        parts.append("-" + _magnitudes(max(1, -last), -first, places))
    if last >= 0:
        parts.append(_magnitudes(max(0, first), last, places))
    return _any(parts)


def _exact(bound: float, places: int) -> Fraction:
    """A bound as its text says where texts are compared, and as it is where numbers are integers."""
    return Fraction(str(bound)) if places else Fraction(bound)


def _magnitudes(first: int, last: int, places: int) -> str:
    """Unsigned decimals from `first` to `last` units."""
    scale = 10**places
    low, low_part = divmod(first, scale)
    high, high_part = divmod(last, scale)
    if low == high:
        return str(low) + _fraction(low_part, high_part, places)
    parts = []
    if low_part > 0:
        parts.append(str(low) + _fraction(low_part, scale - 1, places))
        low += 1
    if high_part < scale - 1:
        parts.append(str(high) + _fraction(0, high_part, places))
        high -= 1
    if low <= high:
        parts.append(_naturals(low, high) + _fraction(0, scale - 1, places))
    return _any(parts)


def _fraction(first: int, last: int, places: int) -> str:
    """What stands behind the whole part: decimals from `first` to `last` units, without trailing zeros or with some."""
    if not places:
        return ""
    digits = literal(".") + _digits(f"{first:0{places}}", f"{last:0{places}}", True)
    return digits if first else f"(?:{digits})?"


def _naturals(first: int, last: int) -> str:
    low, high = str(first), str(last)
    if len(low) == len(high):
        return _digits(low, high)
    parts = [_digits(low, "9" * len(low))]
    if len(low) + 1 < len(high):
        parts.append(f"[1-9][0-9]{{{len(low)},{len(high) - 2}}}")
    parts.append(_digits("1" + "0" * (len(high) - 1), high))
    return _any(parts)


def _digits(low: str, high: str, short: bool = False) -> str:
    """As many digits as in `low` and `high` and between them; `short`: zeros at the end may be left out."""
    rest = len(low) - 1
    zeros, nines = "0" * rest, "9" * rest

    def behind(least: str, greatest: str) -> str:
        if not rest:
            return ""
        digits = _digits(least, greatest, short)
        return f"(?:{digits})?" if short and least == zeros else digits

    if low[0] == high[0]:
        return low[0] + behind(low[1:], high[1:])
    first, last = int(low[0]), int(high[0])
    parts = []
    if low[1:] > zeros:
        parts.append(low[0] + behind(low[1:], nines))
        first += 1
    if high[1:] < nines:
        parts.append(high[0] + behind(zeros, high[1:]))
        last -= 1
    if first <= last:
        free = f"[0-9]{{{0 if short else rest},{rest}}}" if rest else ""
        parts.append((f"[{first}-{last}]" if first < last else str(first)) + free)
    return _any(parts)
