"""Schemas and regular expressions through the engine, on the demo."""

import json
import re
from dataclasses import replace

import pytest
from prompts import ANSWER, LEO, ONCE, PERSON, SCHEMA, SUM, TOOL, is_person
from support import refusal

from mlx_dgemma import OptionError, PromptError


@pytest.mark.parametrize("mode", [{}, {"fast": True}, ONCE])
def test_a_schema_leaves_a_valid_answer_as_it_is(engine, mode):
    result = engine.generate(PERSON, seed=0, schema=SCHEMA, **mode)
    assert (result.text, result.finish_reason, result.thinking, result.holes) == (ANSWER, "stop", "", {})
    assert engine.tokenizer.decode(result.tokens) == ANSWER


@pytest.mark.parametrize("prompt", ["Hi", LEO])
@pytest.mark.parametrize("mode", [ONCE, {"fast": True, "max_denoising_steps": 2}])
def test_answers_are_valid_whatever_is_asked(engine, prompt, mode):
    assert is_person(engine.generate(prompt, seed=1, schema=SCHEMA, max_tokens=100, **mode).text)


@pytest.mark.parametrize(
    "pattern",
    [
        "a|ab",
        "(?:yes|no)!?",
        " a",
        "  a \n",
        "\n\n\t?x",
        "é+x|日本",
        "[\x80-\uffff]{4}",
        "x\x00y",
        "(?i)paris",
        r"\d{3}-\d{4}",
        "[^a-zA-Z ]{1,9}",
        "",
        r"^(?:a|b){12,}$",
        "a 's n't ,x",
    ],
)
def test_answers_match_their_regex(engine, pattern):
    result = engine.generate("What is the capital of France?", seed=1, regex=pattern, **ONCE)
    assert re.fullmatch(pattern, result.text)
    assert result.finish_reason == "stop"
    assert engine.builder.token_bytes.to_bytes(result.tokens).decode() == result.text


def test_a_text_like_a_special_token_is_spelt_out(engine):
    for text in ("<|tool_response>", "<eos>", "<|channel>"):
        result = engine.generate("Hi", seed=0, regex=re.escape(text), **ONCE)
        assert result.text == text


def test_rows_of_a_batch_equal_rows_alone(engine):
    prompts, seeds = [PERSON, "Hi"], [1, 2]
    options = {"schema": SCHEMA, "max_tokens": 60, "max_denoising_steps": 2}
    together = engine.generate_batch(prompts, seeds=seeds, **options)
    alone = [engine.generate(prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.stats.denoising_steps for r in together] == [r.stats.denoising_steps for r in alone] == [1, 2]
    assert all(is_person(r.text) for r in together)
    assert together[0].text == ANSWER != together[1].text


def test_a_batch_goes_on_where_each_row_stands(engine):
    """Rows of one and of two canvases: those that are left keep their own states."""
    pattern = "x{3}|(?:[a-d]{4} ){9,}[a-d]{4}[.]"
    prompts = ["Hi", LEO, PERSON]
    together = engine.generate_batch(prompts, seeds=[1, 2, 3], regex=pattern, **ONCE)
    alone = [engine.generate(prompt, seed=seed, regex=pattern, **ONCE) for prompt, seed in zip(prompts, (1, 2, 3))]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert all(re.fullmatch(pattern, r.text) for r in together)


def test_thinking_stays_apart(engine):
    result = engine.generate(SUM, seed=0, thinking=True, regex=r"25 \+ 31 = \d+\.")
    assert result.thinking == "Ones: 5 + 1 = 6. No carry. Tens: 2 + 3 = 5."
    assert result.text == "25 + 31 = 56."
    some = engine.generate(SUM, seed=1, thinking=True, schema={"type": "integer"}, **ONCE)
    assert isinstance(json.loads(some.text), int)
    assert some.thinking
    assert some.finish_reason == "stop"
    without = engine.generate(SUM, seed=0, schema={"type": "integer"}, **ONCE)
    assert (type(json.loads(without.text)), without.thinking) == (int, "")


def test_little_room_ends_a_thought(engine):
    for max_tokens in (2, 4, 12):
        result = engine.generate(SUM, seed=0, thinking=True, regex="56", max_tokens=max_tokens + 1, **ONCE)
        assert (result.text, result.finish_reason) == ("56", "stop")


def test_canvases_carry_the_text_on(engine):
    """More items than a canvas has tokens; and few tokens more than the shortest text takes."""
    schema = {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 99}, "minItems": 30}
    result = engine.generate("Sort these numbers: 31, 25, 77", seed=0, schema=schema, max_tokens=400, **ONCE)
    assert result.stats.blocks > 1
    items = json.loads(result.text)
    assert len(items) >= 30
    assert all(10 <= item <= 99 for item in items)
    least = refusal(OptionError, engine.stream, "Hi", schema=schema, max_tokens=1)
    least = int(re.search("needs room for ([0-9]+) tokens", least)[1])
    assert least > 64
    tight = engine.generate("Hi", seed=0, schema=schema, max_tokens=least, **ONCE)
    assert len(json.loads(tight.text)) == 30
    assert (len(tight.tokens), tight.finish_reason) == (least - 1, "stop")


@pytest.mark.parametrize(
    ("what", "constraint", "text"),
    [
        ("The schema", {"schema": {"const": "abc"}}, '"abc"'),
        ("The regex 'abcabc'", {"regex": "abcabc"}, "abcabc"),
        ("The regex ''", {"regex": ""}, ""),
    ],
)
def test_texts_need_room(engine, what, constraint, text):
    """At the limit there is a text, and one below it is refused."""
    pattern = re.escape(text)
    least = int(engine.builder.language(re.sub(r'[^a-z"]', "", pattern), what).distance[0]) + 1
    result = engine.generate("Hi", seed=0, max_tokens=least, **constraint, **ONCE)
    assert (result.text, result.finish_reason) == (text, "stop")
    if least > 1:
        assert refusal(OptionError, engine.stream, "Hi", max_tokens=least - 1, **constraint) == (
            f"{what} needs room for {least} tokens, its end included, but max_tokens is {least - 1}; raise it."
        )


def test_a_text_that_the_context_has_no_room_for_is_refused(engine):
    """A text is valid always: what the context would cut off must not be begun."""
    model = engine.model
    config, pattern = model.config, "[0-9]{150}"
    model.config = replace(config, text=replace(config.text, max_position_embeddings=140))
    try:
        text = replace(engine).generate("Hi", seed=0, regex=pattern, **ONCE).text
    except (OptionError, PromptError):
        return
    finally:
        model.config = config
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("call", ["generate", "stream", "generate_batch"])
def test_mistakes_are_told_at_once(engine, call, monkeypatch):
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))
    ask, prompt = getattr(engine, call), ["Hi"] if call == "generate_batch" else "Hi"

    def told(**arguments):
        return refusal(OptionError, ask, prompt, **arguments)

    assert told(schema=SCHEMA, regex="a") == "Both schema and regex are given; leave one out."
    assert told(schema="a") == "schema is 'a'; it should be a JSON Schema as a dict."
    assert told(schema=[]) == "schema is []; it should be a JSON Schema as a dict."
    assert told(regex=7) == "regex is 7; it should be a text."
    for name, given in (("schema", SCHEMA), ("regex", "a")):
        for other, value in (("exact", True), ("stop", ("x",)), ("tools", [TOOL])):
            assert told(**{name: given, other: value}) == (
                f"{name} is given and {other} is {value!r}; they cannot be together: leave one out."
            )
    assert told(schema={"type": "integer", "multipleOf": 0}) == (
        "The schema at # has multipleOf 0; it should be above 0."
    )
    assert told(schema={"type": "string", "pattern": "(?<=a)b"}).startswith("The pattern '(?<=a)b' has a lookbehind")
    assert told(schema={"type": "string", "pattern": "^a(?!.)b"}) == (
        "The schema has no text that this tokenizer can spell; change it."
    )
    assert told(regex="(") == (
        "The pattern '(' is not a regular expression: missing ), unterminated subpattern at position 0."
    )
    assert told(regex="[^\\s\\S]") == "The pattern '[^\\\\s\\\\S]' matches nothing; give one that some text matches."
    for pattern in (".*", "(?s).*", "[^\n]*", ".*\n?", "(?:.|x)*"):
        assert told(regex=pattern) == (
            f"The regex {pattern!r} matches every line of text, so it asks for nothing; leave it out."
        )
    assert told(regex="a{50000}") == (
        "The constraint takes an automaton of about 100,001 states, and 20,000 are the most: ask for smaller bounds "
        "(maxLength, maxItems, {m,n})."
    )
    assert told(regex=r"a\b") == r"The pattern 'a\\b' has \b, which is not supported; write it without."


def items(values):
    return {"type": "array", "items": values, "uniqueItems": True, "minItems": 2}


@pytest.mark.parametrize(
    ("schema", "holds"),
    [
        (items({"type": "string", "pattern": "^(?:a|ab){1,9}$"}), lambda found: len(found) == len(set(found)) >= 2),
        (
            {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 2},
            lambda found: len(found) >= 2,
        ),
        ({"type": "string", "minLength": 70, "maxLength": 75}, lambda found: 70 <= len(found) <= 75),
        (
            {"type": "array", "items": {"type": "string", "minLength": 60, "maxLength": 66}, "maxItems": 30},
            lambda found: len(found) <= 30 and all(60 <= len(one) <= 66 for one in found),
        ),
    ],
    ids=["unique", "keys", "characters", "items"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_checked_while_it_is_written_is_valid(engine, schema, holds, seed):
    """Over several canvases too, and also where the model would write on."""
    for prompt in ("Count from 1 to 30.", "Hi"):
        result = engine.generate(prompt, schema=schema, seed=seed, max_tokens=200, **ONCE)
        assert holds(json.loads(result.text)), result.text
        assert result.finish_reason == "stop"


def test_a_schema_that_refers_to_itself_says_how_deep_it_goes(engine):
    tree = {"type": "object", "properties": {"v": {"type": "integer"}, "below": {"$ref": "#"}}, "required": ["v"]}
    with pytest.warns(UserWarning, match="The schema refers to itself; answers follow it 6 levels deep at most."):
        result = engine.generate("Hi", schema=tree, seed=0, max_tokens=100, **ONCE)
    assert isinstance(json.loads(result.text)["v"], int)


def test_languages_are_kept(engine):
    first = engine.builder.language("abc", "The regex")
    assert engine.builder.language("abc", "The regex") is first
    for i in range(15):
        engine.builder.language(f"x{i}", "The regex")
    assert engine.builder.language("abc", "The regex") is first
    for i in range(16):
        engine.builder.language(f"y{i}", "The regex")
    assert engine.builder.language("abc", "The regex") is not first
    assert len(engine.builder._languages._made) == 16
