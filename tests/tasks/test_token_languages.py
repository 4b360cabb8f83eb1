"""Constrained text that comes token by token: always in the language, always whole within its room."""

import json
import re

import pytest
from support import engine_of, refusal

from mlx_dgemma.constraints.language import Language
from mlx_dgemma.constraints.next_token import NextTokens
from mlx_dgemma.constraints.search import FRESH, THINKING
from mlx_dgemma.errors import LanguageError, OptionError

PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
TAGS = {"type": "array", "items": {"type": "null"}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": TAGS},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.mark.parametrize(
    ("prompt", "form", "room"),
    [
        (PERSON, {"schema": SCHEMA}, 200),
        (PERSON, {"schema": SCHEMA}, 0),
        ("Spell the word frog.", {"regex": r"(a|b)+ [0-9]{2,}"}, 12),
        ("Spell the word frog.", {"regex": r"[^\n]+x"}, 3),
        ("Spell the word frog.", {"regex": r"\w{3}é|日本+"}, 1),
    ],
)
def test_text_is_in_its_language_and_drafts_change_nothing(engine, prompt, form, room):
    """At a high temperature, with as much room beyond the shortest text as `room` says."""
    request = engine.prepare(prompt, seed=0, mode="causal", **form)
    least = int(request.control._language.distance[0]) + 1
    options = {"max_tokens": least + room, "seed": 3, "temperature": 1.5, **form}
    found, drafted = (engine.generate(prompt, mode=mode, **options) for mode in ("causal", "speculative"))
    assert found.finish_reason == "stop" and found.text == drafted.text and found.tokens == drafted.tokens
    if "regex" in form:
        assert re.fullmatch(form["regex"], found.text)
    else:
        value = json.loads(found.text)
        assert (
            isinstance(value["name"], str) and isinstance(value["age"], int) and set(value) <= set(SCHEMA["properties"])
        )
    assert "raise it" in refusal(
        OptionError, engine.generate, prompt, mode="causal", **{**options, "max_tokens": least - 1}
    )


def test_a_thought_may_stand_before_the_text_and_leaves_it_room(engine):
    options = {"regex": "[0-9]+ ok", "mode": "causal", "temperature": 0, "thinking": True}
    whole = engine.generate("What is 28 + 15?", **options)
    assert whole.thinking and re.fullmatch("[0-9]+ ok", whole.text)
    short = engine.generate("What is 28 + 15?", **options, max_tokens=14)
    assert re.fullmatch("[0-9]+ ok", short.text) and short.finish_reason == "stop"


def test_the_tokens_that_may_follow_are_those_that_leave_a_way_out(engine):
    """Against every token's own walk, in all states and for every room."""
    language = Language("ab(c|dé)*e", engine.builder.token_bytes)
    ends, marks = (1, 16), (9, 10)
    following = NextTokens(language, ends, marks)
    length = language.token_bytes.length
    for state in range(len(language.distance)):
        for left in range(1, 9):
            if language.distance[state] + 1 > left:
                continue
            right = {
                token
                for token in range(len(length))
                if length[token] and language.distance[language.state_after([token], state)] + 2 <= left
            }
            right |= set(ends) if language.accepting[state] else set()
            allowed = following.allowed(state, left)
            assert set(allowed.nonzero()[0].tolist()) == right and right
    least = int(language.distance[0])
    assert following.allowed(THINKING, least + 2).nonzero()[0].tolist() == [10]
    assert following.allowed(THINKING, least + 3).sum() > 1000
    assert not following.allowed(FRESH, least + 2)[9] and following.allowed(FRESH, least + 3)[9]
    assert following.after(FRESH, 9) == following.after(THINKING, 500) == THINKING
    assert following.after(THINKING, 10) == 0


def test_what_needs_a_canvas_is_refused_and_what_does_not_goes_token_by_token(engine):
    assert "mode is 'causal'" in refusal(OptionError, engine.infill, "Once ", " end.", mode="causal")
    found = engine.infill("Once there was a fro", "", mode="causal", temperature=0, length=6)
    assert found.stats.mode == "causal" and found.stats.denoising_steps == 0 and len(found.tokens) <= 6
    filled = engine.fill("{name} is {age}", {"name": ["Anna", "Bob"], "age": "[0-9]{2}"}, mode="speculative", seed=0)
    assert re.fullmatch("(Anna|Bob) is [0-9]{2}", filled.text)
    edited = engine.edit("The cat saw a cat.", "Replace cat with dog", mode="speculative", temperature=0)
    assert edited.text == engine.edit("The cat saw a cat.", "Replace cat with dog", mode="causal", temperature=0).text


NUMBER = {"type": "integer", "minimum": 0, "maximum": 30}
UNIQUE = {"type": "array", "items": NUMBER, "uniqueItems": True, "minItems": 5}
LONG = {"type": "array", "items": {"type": "string", "maxLength": 70}, "minItems": 1, "maxItems": 40}


@pytest.mark.parametrize(("schema", "seed"), [(UNIQUE, 0), (UNIQUE, 1), ({"type": "object"}, 0), (LONG, 1)], ids=str)
def test_what_states_do_not_tell_is_checked_token_by_token(engine, schema, seed):
    """Items and names that must differ, long texts and arrays; drafts change nothing."""
    language = engine.builder.language(schema, "It", "schema")
    assert language.scanner() is not None
    options = {"schema": schema, "seed": seed, "temperature": 1.2, "max_tokens": 150}
    found, drafted = (engine.generate(PERSON, mode=mode, **options) for mode in ("causal", "speculative"))
    value = json.loads(found.text)
    assert found.tokens == drafted.tokens and found.finish_reason == "stop"
    if schema is UNIQUE:
        assert 5 <= len(value) == len(set(value)) and set(value) <= set(range(31))
    elif schema is LONG:
        assert max(map(len, value)) <= 70 and len(value) <= 40


def test_a_token_behind_which_a_text_can_only_repeat_itself_is_not_drawn(engine):
    language = engine.builder.language(UNIQUE, "It", "schema")
    following = NextTokens(language, (1,))
    spelt = {language.token_bytes.to_bytes([token]): token for token in range(len(language.token_bytes.length))}

    def goes_on(text):
        scanner, state = following.scanner, 0
        for byte in text:
            token = spelt[bytes([byte])]
            if (scanner := following.scan(scanner, state, token)) is None:
                return False
            state = following.after(state, token)
        return True

    assert goes_on(b"[1,11,3,30,12,13]") and goes_on(b"[1, 1") and goes_on(b"[30,3")
    assert not goes_on(b"[1,1,") and not goes_on(b"[2,2 ") and not goes_on(b"[11,11") and not goes_on(b"[30,3,3")


def test_a_text_that_can_only_repeat_itself_is_an_error(engine):
    """Which key comes second is known too late: nothing that was written is taken back."""
    item = {"type": "object", "properties": {"a": {"enum": [1]}}, "additionalProperties": False}
    schema = {"type": "array", "items": item, "uniqueItems": True, "minItems": 3}
    told = refusal(LanguageError, engine.generate, PERSON, mode="causal", temperature=0, schema=schema, max_tokens=60)
    assert "nothing can be taken back" in told or "no way was found" in told
