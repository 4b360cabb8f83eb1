"""Random patterns against `re`, and random schemas against jsonschema, from fixed seeds."""

import json
import random
import re

import pytest
from automata import Automaton, accepts
from jsonschema import Draft202012Validator

from mlx_dgemma.constraints.dfa import build_dfa
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.constraints.schema import translate
from mlx_dgemma.errors import OptionError

ATOMS = ["a", "b", "A", "1", "[ab]", "[b1]", "é", r"\n", '"', r"\\"]  # wide classes take too long to build
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,2}?"]


def random_pattern(rng, depth=2):
    parts = []
    for _ in range(rng.randint(1, 2)):
        if depth and rng.random() < 0.4:
            group = rng.choice(["(?:", "("])
            branches = "|".join(random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 3)))
            parts.append(f"{group}{branches}){rng.choice(REPEATS)}")
        else:
            parts.append(rng.choice(ATOMS) + rng.choice(REPEATS))
    return "".join(parts)


def anchored(rng, pattern):
    return rng.choice(["", "", "^", r"\A"]) + pattern + rng.choice(["", "", "$", r"\Z"])


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("json_safe", [False, True])
def test_random_patterns_match_what_re_matches(json_safe, search):
    rng = random.Random(f"{json_safe} {search}")
    texts = ["".join(rng.choice('abA1é \n"\\') for _ in range(rng.randint(0, 5))) for _ in range(60)]
    matches = 0
    for _ in range(12):
        pattern = anchored(rng, random_pattern(rng))
        match = re.compile(pattern).search if search else re.compile(pattern).fullmatch
        escaped = [json_safe and bool(re.search(r'["\\\x00-\x1f]', text)) for text in texts]
        expected = [bool(match(text)) for text in texts]
        try:
            plain = python_regex_to_plain(pattern, json_safe, search)
        except OptionError as error:
            assert "characters that JSON strings escape" in str(error), pattern
            assert not any(fits and not other for fits, other in zip(expected, escaped)), pattern
            continue
        spelt = [json.dumps(text, ensure_ascii=False)[1:-1] if json_safe else text for text in texts]
        found = [accepts(build_dfa(plain), text) for text in spelt]
        assert not any(fits > wanted for fits, wanted in zip(found, expected)), pattern
        assert all(fits == wanted or other for fits, wanted, other in zip(found, expected, escaped)), pattern
        matches += sum(expected)
    assert matches > 10


def random_schema(rng, depth=2):
    kind = rng.choice(
        ["integer", "number", "string", "boolean", "null", "enum", *["array", "object", "anyOf"] * (depth > 0)]
    )
    inner = depth - 1
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, inner) for _ in range(rng.randint(1, 3))]}
    if kind == "enum":
        return {"enum": rng.sample(VALUES, rng.randint(1, 3))}
    schema = {"type": kind}
    if kind in ("integer", "number") and rng.random() < 0.7:
        low = rng.choice([-120, -1, 0, 0.5, 7, 99])
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([2, 10, 150.25])
    if kind == "string" and rng.random() < 0.6:
        low = rng.randint(0, 2)
        schema |= rng.choice([{"minLength": low, "maxLength": low + 2}, {"pattern": "^a+b?$"}, {"format": "date"}])
    if kind == "array":
        low = rng.randint(0, 2)
        schema |= {"items": random_schema(rng, inner), "minItems": low, "maxItems": low + rng.randint(0, 2)}
        if rng.random() < 0.3:
            schema["prefixItems"] = [random_schema(rng, inner)]
    if kind == "object":
        keys = rng.sample(["a", "b", "c", 'q"é'], rng.randint(0, 3))
        schema["properties"] = {key: random_schema(rng, inner) for key in keys}
        schema["required"] = [key for key in keys if rng.random() < 0.5]
    return schema


VALUES = [
    0,
    1,
    -1,
    7.5,
    100,
    250,
    "",
    "a",
    "aab",
    "b",
    'é"',
    "2024-02-29",
    None,
    True,
    False,
    [],
    [0],
    [1, "a"],
    [None],
]
VALUES += [[[]], ["aab", "b", "b"], {}, {"a": 1}, {"b": None}, {"a": "a", "b": True}, {"c": [0], 'q"é': 7.5}]


def test_random_schemas_match_only_what_is_valid():
    rng, sampled, told_apart = random.Random(5), 0, 0
    for _ in range(30):
        schema = random_schema(rng)
        validator = Draft202012Validator(schema)
        automaton = Automaton(translate(schema).expression)
        for _ in range(8):
            text = automaton.sample(rng, 40)
            validator.validate(json.loads(text, parse_constant=pytest.fail))
            sampled += 1
        for value in VALUES:
            if not validator.is_valid(value):
                assert not automaton.matches(json.dumps(value, ensure_ascii=False)), (schema, value)
                told_apart += 1
    assert sampled == 240
    assert told_apart > 300
