"""Patterns of JSON schemas against jsonschema: samples are valid, dumped values match, invalid ones do not."""

import datetime
import json
import random
import re
import uuid
from fractions import Fraction

import pytest
from automata import Automaton
from jsonschema import Draft202012Validator, FormatChecker

from mlx_dgemma.constraints.schema import translate
from mlx_dgemma.errors import OptionError

CHECKER = FormatChecker(formats=())


def written_of(schema):
    return Automaton(translate(schema).expression)


def checks(name):
    """Register a check of strings; other values are for `type`."""

    def register(check):
        CHECKER.checks(name, raises=ValueError)(lambda value: not isinstance(value, str) or check(value))
        return check

    return register


@checks("date")
def is_date(text):
    return bool(datetime.datetime.strptime(text, "%Y-%m-%d"))


@checks("time")
def is_time(text):
    form = "%H:%M:%S.%f%z" if "." in text else "%H:%M:%S%z"
    return bool(datetime.datetime.strptime(text, form)) and len(text.split(".")[0]) >= 8


@checks("date-time")
def is_date_time(text):
    return is_date(text[:10]) and text[10:11] == "T" and is_time(text[11:])


@checks("uuid")
def is_uuid(text):
    return str(uuid.UUID(text)) == text.lower()


PERSON = {  # as pydantic writes it
    "$defs": {
        "Address": {
            "properties": {
                "street": {"title": "Street", "type": "string"},
                "zip": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Zip"},
            },
            "required": ["street"],
            "title": "Address",
            "type": "object",
        },
        "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
    },
    "properties": {
        "name": {"maxLength": 20, "minLength": 1, "title": "Name", "type": "string"},
        "age": {"exclusiveMaximum": 150, "minimum": 0, "title": "Age", "type": "integer"},
        "color": {"$ref": "#/$defs/Color", "default": "red"},
        "homes": {"default": [], "items": {"$ref": "#/$defs/Address"}, "title": "Homes", "type": "array"},
        "work": {"anyOf": [{"$ref": "#/$defs/Address"}, {"type": "null"}], "default": None},
        "kind": {"const": "person", "default": "person", "title": "Kind", "type": "string"},
    },
    "required": ["name", "age"],
    "title": "Person",
    "type": "object",
}
TUPLE = {"maxItems": 2, "minItems": 2, "prefixItems": [{"type": "number"}, {"type": "string"}], "type": "array"}
INT, TEXT = {"type": "integer"}, {"type": "string"}


def optional(*keys, required=()):
    return {"type": "object", "properties": dict.fromkeys(keys, INT), "required": list(required)}


# Each schema with values that match when dumped and values that do not, since they are invalid.
CASES = [
    ({"type": "null"}, [None], [0, "null", False]),
    ({"type": "boolean"}, [True, False], [0, 1, None, "true"]),
    (INT, [0, -1, 10, 999999999999999], [0.5, "1", None, True]),
    ({"type": "number"}, [0, -1, 1.5, 1e-7, 1e22, 9.9e15, 0.1 + 0.2, -12.25], ["1", None, [1]]),
    (TEXT, ["", "a", 'é"\\/\n\t', "日本 😀", "x" * 300], [1, None, ["a"]]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é😀\n", '"""'], ["", "a", "abcd", "\\\\\\\\"]),
    ({"type": "string", "maxLength": 0}, [""], ["a"]),
    ({"minLength": 4}, ["abcd", "abcdef"], ["abc"]),
    ({"type": "string", "pattern": "^[a-z]+-\\d{2}$"}, ["ab-12"], ["ab-1", "x ab-12", ""]),
    ({"type": "string", "pattern": "b"}, ["b", "abc", "b b"], ["", "a"]),
    ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01", "x"]),
    ({"type": "string", "format": "time"}, ["12:30:00Z", "23:59:59.125+02:00"], ["24:00:00Z", "12:30:00", "12:30Z"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-29T12:30:00Z"], ["2024-02-30T12:30:00Z", "2024-02-29"]),
    ({"type": "string", "format": "uuid"}, [str(uuid.UUID(int=7)), "A" * 8 + str(uuid.UUID(int=7))[8:]], ["7"]),
    ({"type": "integer", "minimum": 0}, [0, 7, 10**15 - 1], [-1, 0.5]),
    ({"type": "integer", "exclusiveMinimum": -3, "maximum": 250}, [-2, 0, 99, 250], [-3, 251, 1000]),
    ({"type": "integer", "maximum": -5, "format": "int64", "minLength": 3}, [-5, -123456], [-4, 0, 5]),
    ({"type": "integer", "minimum": 10**20}, [10**20, 5 * 10**20], [10**20 - 1]),
    ({"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 1.0, 0.5, 0.25], [-0.5, 1.5, 2, 1.0001]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.3}, [0.1, 0.25, 0.2999], [0, 0.3, 1, 0.0]),
    ({"type": "number", "minimum": -2.5}, [-2.5, -2, 0, 123.75, 10**14], [-2.51, -3]),
    ({"type": ["string", "null"]}, ["a", None], [1, False]),
    ({"type": ["integer", "number", "boolean"]}, [1, 1.5, True], ["a", None]),
    ({"enum": ["a", "é\n", 1, 2.5, None, True, ["x", {}], {"k": [], "l": "}"}]}, ["a", 1, True], ["b", 2, False, []]),
    ({"enum": ["a", 1, 2, None, "bcd"], "type": ["string", "integer"], "maximum": 1, "minLength": 2}, [1, "bcd"], [2]),
    ({"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [1]}, {}]),
    ({"const": "x", "type": "string", "title": "X"}, ["x"], ["y"]),
    ({"anyOf": [INT, TEXT, {"type": "null"}], "title": "Any"}, [1, "a", None], [1.5, [], True]),
    ({"allOf": [INT], "description": "one"}, [1], ["a"]),
    ({"type": "array", "items": INT}, [[], [1], [1, 2, 3]], [["a"], [None], {}, 1]),
    ({"items": INT, "minItems": 2, "maxItems": 3}, [[1, 2], [1, 2, 3]], [[], [1], [1, 2, 3, 4]]),
    ({"type": "array", "items": {"items": INT, "minItems": 1}, "maxItems": 2}, [[], [[1]], [[1], [2, 3]]], [[[]]]),
    ({"type": "array", "maxItems": 0}, [[]], [[1]]),
    (TUPLE, [[1.5, "a"]], [[1.5], [], [1, "a", 2], ["a", 1]]),
    ({"prefixItems": [INT, TEXT], "items": {"type": "null"}}, [[], [1], [1, "a"], [1, "a", None, None]], [["a"]]),
    ({"prefixItems": [INT, TEXT], "items": False, "minItems": 1}, [[1], [1, "a"]], [[], [1, "a", 1]]),
    (
        {"prefixItems": [INT, TEXT], "items": {"type": "null"}, "minItems": 3, "maxItems": 4},
        [[1, "a", None], [1, "a", None, None]],
        [[1, "a"], [1, "a", None, None, None]],
    ),
    ({"type": "object", "properties": {}}, [{}], [[], 1]),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"type": "object", "additionalProperties": INT}, [{}, {"a": 1}, {"é\n": 1, "": 2}], [{"a": "b"}, []]),
    (optional("a"), [{}, {"a": 1}], [{"a": "x"}, []]),
    (optional("a", "b", "c"), [{}, {"a": 1}, {"b": 1}, {"c": 1}, {"a": 1, "c": 2}, {"a": 1, "b": 2, "c": 3}], [1]),
    (optional("a", "b", required="b"), [{"b": 1}, {"a": 1, "b": 2}], [{}, {"a": 1}]),
    (optional("a", "b", required="a"), [{"a": 1}, {"a": 1, "b": 2}], [{}, {"b": 1}]),
    (
        optional("a", "b", "c", "d", "e", required="bd"),
        [{"b": 1, "d": 1}, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, {"b": 1, "d": 1, "e": 1}],
        [{}, {"a": 1, "b": 1, "e": 1}, {"d": 1}],
    ),
    ({"properties": {'q"\\/é\n': TEXT}, "required": ['q"\\/é\n']}, [{'q"\\/é\n': "a"}], [{}, {"q": "a"}]),
    (
        {"type": "object", "properties": {"in": {"type": "object", "properties": {"x": TUPLE}}}},
        [{}, {"in": {}}, {"in": {"x": [1, "a"]}}],
        [{"in": []}, {"in": {"x": 1}}],
    ),
    (
        PERSON,
        [
            {"name": "A", "age": 0},
            {"name": "Zoë", "age": 149, "color": "green", "homes": [], "work": None, "kind": "person"},
            {"name": "B", "age": 30, "homes": [{"street": "s"}, {"street": "", "zip": None}], "work": {"street": "w"}},
        ],
        [{"name": "", "age": 0}, {"name": "A"}, {"name": "A", "age": 150}, {"name": "A", "age": 1, "kind": "dog"}, 1],
    ),
    (
        {"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": {"type": "array", "items": INT}}},
        [[1]],
        [["a"], 1],
    ),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=[str(case[0])[:60] for case in CASES])
def test_what_matches_is_valid(schema, valid, invalid):
    validator = Draft202012Validator(schema, format_checker=CHECKER)
    automaton = written_of(schema)
    for value in valid:
        assert validator.is_valid(value), value
        for indent in (None, 2):
            for ascii_only in (False,) if re.search("[^ -~]", str(value)) else (False, True):
                assert automaton.matches(json.dumps(value, indent=indent, ensure_ascii=ascii_only)), value
        assert automaton.matches(json.dumps(value, separators=(",", ":"), ensure_ascii=False)), value
    for value in invalid:
        assert not validator.is_valid(value), value
        assert not automaton.matches(json.dumps(value, ensure_ascii=False)), value
    rng = random.Random(2)
    for _ in range(60):
        text = automaton.sample(rng)
        validator.validate(json.loads(text, parse_constant=pytest.fail))


@pytest.mark.parametrize("text", ["", " {}", "{} ", '{"a": 1,}', '{"b": 1, "a": 1}', '{"a": 1, "a": 1}', '{"c": 1}'])
def test_only_one_layout_matches(text):
    assert not written_of(optional("a", "b")).matches(text)


@pytest.mark.parametrize("text", ["{ }", "{\n}", '{ "a":1 }', '{"a":\n1,\n    "b": -2\n  }', '{"b": 1}'])
def test_white_space_is_free(text):
    assert written_of(optional("a", "b")).matches(text)


def matcher(schema):
    return written_of(schema).matches


def test_integers_by_brute_force():
    rng = random.Random(3)
    for _ in range(150):
        low, high = sorted(rng.choice([9, 120, 1100]) * rng.choice([-1, 1]) + rng.randrange(-12, 12) for _ in "ab")
        match = matcher({"type": "integer", "minimum": low, "maximum": high})
        for number in range(low - 20, high + 20, 1):
            assert bool(match(str(number))) == (low <= number <= high), (low, high, number)
        assert not match("-0") and not match("007")


BOUNDS = [-120, -0.25, 0, 0.05, 1.01, 120]
DECIMALS = [
    f"{sign}{n}{part}"
    for sign in ("", "-")
    for n in (0, 1, 2, 9, 10, 11, 98, 99, 100, 119, 120, 121)
    for part in (
        "",
        ".0",
        ".00",
        ".01",
        ".04",
        ".05",
        ".06",
        ".1",
        ".24",
        ".25",
        ".26",
        ".49",
        ".5",
        ".50",
        ".7500",
        ".99",
    )
]


def test_decimals_by_brute_force():
    for low in BOUNDS:
        for high in BOUNDS:
            if low > high:
                continue
            closed = matcher({"type": "number", "minimum": low, "maximum": high})
            half = matcher({"type": "number", "minimum": low}), matcher({"type": "number", "exclusiveMaximum": high})
            opened = low < high and matcher({"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high})
            for text in DECIMALS:
                value = Fraction(text)
                if value == 0 and text.startswith("-"):
                    continue
                at_least, at_most = value >= Fraction(str(low)), value <= Fraction(str(high))
                assert bool(closed(text)) == (at_least and at_most), (low, high, text)
                assert bool(half[0](text)) == at_least, (low, text)
                assert bool(half[1](text)) == (value < Fraction(str(high))), (high, text)
                if opened:
                    inside = Fraction(str(low)) < value < Fraction(str(high))
                    assert bool(opened(text)) == inside, (low, high, text)


@pytest.mark.parametrize("low", [0.1, 0.3, 0.30000000000000004, 5e-324, 1e-7, 123456.789, 99999999999999, 1e15, 1e22])
def test_no_float_crosses_its_bound(low):
    """Samples close to a bound have many digits, and json.loads rounds."""
    above = written_of({"type": "number", "exclusiveMinimum": low, "maximum": low * 1.5 + 1})
    below = written_of({"type": "number", "minimum": -low, "exclusiveMaximum": low})
    rng = random.Random(4)
    for _ in range(200):
        assert low < json.loads(above.sample(rng)) <= low * 1.5 + 1
        assert -low <= json.loads(below.sample(rng)) < low


def test_dates_by_brute_force():
    match = matcher({"type": "string", "format": "date"})
    for year in (0, 1, 4, 96, 100, 400, 1600, 1900, 2000, 2023, 2024, 2100, 9996, 9999):
        for month in range(14):
            for day in range(33):
                try:
                    expected = bool(datetime.date(year, month, day))
                except ValueError:
                    expected = False
                assert bool(match(f'"{year:04}-{month:02}-{day:02}"')) == expected, (year, month, day)


def test_optional_keys_need_few_states():
    few, many = (len(written_of(optional(*(f"k{i}" for i in range(n)))).moves) for n in (12, 24))
    assert few < 1000
    assert many < 3 * few


def test_equal_references_are_written_once():
    held = {f"L{i}": {"type": "array", "items": {"$ref": f"#/$defs/L{i + 1}"}} for i in range(8)}
    assert translate({"$defs": {**held, "L8": TEXT}, "$ref": "#/$defs/L0"}).expression.size < 500


def some(word, value, **others):
    return {"type": "object", "properties": {"a/b": {word: value, **others}}}


AT = "The schema at #/properties/a~1b "
ERRORS = [
    ([1], "The schema at # is [1]; it should be an object with keywords."),
    (False, "The schema at # allows no value; change what contradicts itself."),
    (some("oneOf", []), f"{AT}has oneOf []; it should be a list of schemas."),
    (some("uniqueItems", 1), f"{AT}has uniqueItems 1; it should be true or false."),
    (some("minLenght", 1), f"{AT}has minLenght, which is no keyword; write minLength."),
    (some("maxContains", 1), f"{AT}has maxContains, which is not supported; write the items as prefixItems."),
    (
        some("type", "text"),
        f"{AT}has type 'text'; it should be one or a list of object, array, string, number, integer, boolean, null.",
    ),
    (
        some("type", []),
        f"{AT}has type []; it should be one or a list of object, array, string, number, integer, boolean, null.",
    ),
    (some("prefixItems", INT), f"{AT}has prefixItems {{'type': 'integer'}}; it should be a list of schemas."),
    (some("items", INT, minItems=2, maxItems=1), f"{AT}has minItems 2 and maxItems 1; change one."),
    (some("type", "string", minLength=2, maxLength=1), f"{AT}has minLength 2 and maxLength 1; change one."),
    (some("type", "string", minLength=-1), f"{AT}has minLength -1; it should be a whole number, at least 0."),
    (some("items", INT, maxItems=True), f"{AT}has maxItems True; it should be a whole number, at least 0."),
    (some("pattern", 1), f"{AT}has pattern 1; it should be a string."),
    (
        some("pattern", "(a)\\1"),
        "The pattern '(a)\\\\1' has a backreference, which is not supported; write it without.",
    ),
    (some("format", 1), f"{AT}has format 1; it should be a string."),
    (some("multipleOf", 0), f"{AT}has multipleOf 0; it should be above 0."),
    (
        some("multipleOf", 1013),
        f"{AT}has multipleOf 1013, and 1000 residues are the most; write the values as an enum.",
    ),
    (some("minimum", "1"), f"{AT}has minimum '1'; it should be a number."),
    (some("minimum", float("inf")), f"{AT}has minimum inf; it should be a number."),
    (some("minimum", 2, maximum=1, type="number"), f"{AT}allows no number between its bounds; change one."),
    (some("type", "integer", minimum=0.2, exclusiveMaximum=1), f"{AT}allows no number between its bounds; change one."),
    (some("enum", []), f"{AT}has enum []; it should be a list with a value or more."),
    (some("const", float("nan")), f"{AT}has the value nan, which is not JSON; leave it out."),
    (some("const", [{1: 2}]), f"{AT}has the value {{1: 2}}, which is not JSON; leave it out."),
    (some("anyOf", []), f"{AT}has anyOf []; it should be a list of schemas."),
    (some("$ref", "#/$defs/A"), f"{AT}refers to '#/$defs/A', which the schema does not have; define it."),
    (
        some("$ref", "other.json"),
        f"{AT}refers to 'other.json'; references should start with #/: put what it names under $defs.",
    ),
    (
        {"$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, INT]}}, "$ref": "#/$defs/A"},
        "The schema at #/$defs/A refers to itself without a property or item between; leave that out.",
    ),
    (
        {"oneOf": [TEXT, {"type": "string", "format": "uri"}]},
        "The schema at # has oneOf, of which no schema can be told apart from the others; "
        "write anyOf, or give each a required property with a const of its own.",
    ),
    (
        {"not": {"pattern": "a"}},
        "The schema at #/not has keywords in not that cannot be turned round; there may be type, enum, const, "
        "properties, required, minimum and maximum.",
    ),
    (
        {"type": "object", "properties": {"a": INT, "b": {"enum": [1], "type": "string"}}, "required": ["b"]},
        "The schema at # allows no value; change what contradicts itself.",
    ),
    (
        {"anyOf": [{"const": i} for i in range(20)], "allOf": [{"anyOf": [{"const": i} for i in range(20)]}]},
        "The schema at # has more than 200 combinations of alternatives; write fewer of them.",
    ),
    (some("required", "x"), f"{AT}has required 'x'; it should be a list of keys."),
    (some("properties", [1]), f"{AT}has properties [1]; it should be an object."),
    (some("dependentRequired", [1]), f"{AT}has dependentRequired [1]; it should be an object."),
]


@pytest.mark.parametrize(("schema", "message"), ERRORS)
def test_errors(schema, message):
    with pytest.raises(OptionError) as error:
        translate(schema)
    assert str(error.value) == message


def test_a_schema_that_never_ends_is_refused():
    schema = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(OptionError) as error:
        translate(schema)
    assert str(error.value) == "The schema is nested too deeply; write it with fewer levels."


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 10**400}, "has minimum 1000"),
        ({"type": "number", "exclusiveMaximum": -(10**5000)}, "has exclusiveMaximum an integer of thousands of digits"),
        ({"enum": [10**5000]}, "has the value an integer of thousands of digits"),
        ({"const": {"a": [10**400]}}, "has the value 1000"),
        ({"enum": [1], "minimum": 10**400}, "has minimum 1000"),
        ({"type": "string", "minLength": 10**5000}, "has minLength an integer of thousands of digits"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2**32}, "has minItems 4294967296"),
        ({"type": 10**5000}, "has type an integer of thousands of digits"),
    ],
    ids=map(str, range(8)),
)
def test_numbers_of_many_digits_are_refused(schema, message):
    with pytest.raises(OptionError) as caught:
        translate(schema)
    assert str(caught.value).startswith("The schema at #")
    assert message in str(caught.value)
