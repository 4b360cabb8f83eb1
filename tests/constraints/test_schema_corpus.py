"""Schemas as pydantic, zod, the OpenAI SDK and tool servers write them; bench/schemas.py looks at more texts."""

import json
import random

import jsonschema
import pytest
from automata import Automaton
from support import DATA, refusal

from mlx_dgemma.constraints.dfa import build_dfa
from mlx_dgemma.constraints.schema import translate
from mlx_dgemma.errors import OptionError

CORPUS = json.loads((DATA / "schemas.json").read_text(encoding="utf-8"))
TAKEN, REFUSED = CORPUS["taken"], CORPUS["refused"]


def test_every_schema_is_taken():
    assert len(TAKEN) >= 240
    for name, schema in TAKEN.items():
        assert 0 < translate(schema).expression.size < 30_000, name


@pytest.mark.parametrize("part", range(2))
def test_texts_are_valid(part):
    """Of a quarter of the schemas."""
    for name in [*TAKEN][4 * part :: 8]:
        schema, source = TAKEN[name], random.Random(name)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        check, automaton = kind(schema, format_checker=kind.FORMAT_CHECKER), Automaton(translate(schema).expression)
        for _ in range(4):
            text = automaton.sample(source, source.choice([5, 60, 200]))
            value = json.loads(text, parse_constant=pytest.fail)
            if automaton.matches(text):
                assert not list(check.iter_errors(value)), (name, text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    schema, message = REFUSED[name]
    assert refusal(OptionError, lambda: build_dfa(translate(schema).expression)) == message


INT, TEXT = {"type": "integer"}, {"type": "string"}
TREE = {
    "type": "object",
    "properties": {"v": INT, "below": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["v"],
}
KINDS = [{"type": "object", "properties": {"kind": {"const": one}, one: INT}, "required": [one]} for one in ("a", "b")]
FOR_A = {"properties": {"k": {"const": "a"}}, "required": ["k"]}
# Each schema with values that are written, and values that are not.
CASES = [
    ({}, [1, "a", None, [[{"a": [1]}]], {"a": {"b": [{}]}}], []),
    ({"type": "object"}, [{}, {"a": [1, {"b": None}]}], [[], 1]),
    ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    ({"type": "object", "properties": {"a": INT}, "additionalProperties": TEXT}, [{"a": 1, "b": "c"}], [{"b": 1}]),
    ({"type": "object", "properties": {"a": INT}, "required": ["z"]}, [{"a": 1, "z": [2]}], [{"a": 1}]),
    (TREE, [{"v": 1}, {"v": 1, "below": [{"v": 2, "below": [{"v": 3}]}]}], [{"v": 1, "below": [1]}]),
    ({"oneOf": KINDS}, [{"kind": "a", "a": 1}, {"kind": "b", "b": 1}], [{"kind": "a", "b": 1}, {"a": 1, "b": 1}]),
    (
        {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object", "properties": {"a": INT, "b": INT}},
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    ({"oneOf": [TEXT, {"enum": ["a", 1]}]}, ["b", 1], ["a"]),
    (
        {"allOf": [{"properties": {"a": INT}}, {"properties": {"a": {"minimum": 3}}, "required": ["a"]}]},
        [{"a": 3}],
        [{"a": 2}, {}],
    ),
    (
        {
            **FOR_A,
            "type": "object",
            "properties": {"k": {"enum": ["a", "b"]}, "x": INT},
            "if": FOR_A,
            "then": {"required": ["x"]},
            "else": {"properties": {"x": False}},
        },
        [{"k": "a", "x": 1}, {"k": "b"}],
        [{"k": "a"}, {"k": "b", "x": 1}],
    ),
    (
        {"type": "object", "properties": {"a": INT, "b": INT}, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    ({"type": "string", "not": {"enum": ["a", "b"]}}, ["", "c", "ab"], ["a", "b"]),
    ({"type": "string", "pattern": "^a", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", "ba"]),
    ({"type": "string", "format": "date", "pattern": "^2"}, ["2024-01-01"], ["1999-01-01", "2"]),
    ({"type": "string", "maxLength": 70}, ["é" * 70, '"' * 70, ""], ["é" * 71, '"' * 71]),
    ({"type": "array", "items": {"minLength": 40}, "maxItems": 20}, [["é" * 40] * 20], [["é" * 40] * 21]),
    ({"type": "array", "items": INT, "uniqueItems": True}, [[], [1, 2, 12]], [[1, 1], [1, 2, 1]]),
    ({"type": "array", "items": {"enum": [*"abcdef"]}, "uniqueItems": True}, [["a", "c"]], [["a", "a"]]),
    ({"type": "array", "items": TEXT, "contains": {"const": "x"}, "maxItems": 2}, [["x"], ["x", "y"]], [[], ["y"]]),
    ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INT, "type": "object"}, [{"a": 1}], [{"c": 1}]),
    ({"propertyNames": {"pattern": "^[a-z]$"}, "type": "object"}, [{"a": 1, "b": []}], [{"A": 1}]),
    (
        {"patternProperties": {"^n": INT}, "additionalProperties": TEXT},
        [{"n1": 1}, {"a": "b"}],
        [{"n1": "b"}, {"a": 1}],
    ),
    (
        {"type": "object", "additionalProperties": INT, "minProperties": 2, "maxProperties": 3},
        [{"a": 1, "b": 2}],
        [{"a": 1}, dict.fromkeys("abcd", 1)],
    ),
    ({"type": "integer", "multipleOf": 30, "maximum": 100}, [0, 30, 90, -60], [10, 45, 120]),
    ({"type": "number", "multipleOf": 0.25, "minimum": 0}, [0, 0.25, 7.75, 12.5], [0.1, 0.3, -0.25]),
    ({"type": "number", "multipleOf": 0.01, "minimum": 0}, [0.25, 3, 250], [0.001, 0.07, 19.99]),
    ({"type": "string", "pattern": "^(?=.*[0-9])(?!.*x)[a-z0-9]{2,4}$"}, ["a1"], ["ab", "x1", "1"]),
    ({"type": "string", "pattern": '^"[a-z]*"$'}, ['"a"'], ["a"]),
    ({"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "null"}}}, [None], [1]),
]


@pytest.mark.parametrize(("schema", "written", "other"), CASES, ids=[str(case[0])[:60] for case in CASES])
def test_values_are_written(schema, written, other):
    check, automaton = jsonschema.Draft202012Validator(schema), Automaton(translate(schema).expression)
    for value in written:
        assert check.is_valid(value), value
        assert automaton.matches(json.dumps(value, ensure_ascii=False)), value
    for value in other:
        assert not automaton.matches(json.dumps(value, ensure_ascii=False)), value
    source = random.Random(1)
    for _ in range(12):
        text = automaton.sample(source)
        if automaton.matches(text):
            check.validate(json.loads(text))


def test_levels_are_told_and_become_fewer_where_there_is_no_room():
    assert translate(TREE)[1:] == (0, 6)
    assert translate({"type": "object"})[1:] == (4, 0)
    assert translate(INT)[1:] == (0, 0)
    many = {"type": "object", "properties": {f"k{i}": {} for i in range(10)}}
    assert translate(many).levels < 4
    nested = json.dumps({"k9": [[]]})
    assert Automaton(translate(many).expression).matches(nested)
