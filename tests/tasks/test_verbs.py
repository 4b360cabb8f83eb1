"""Schemas, regular expressions, infill, templates and edits through the engine, on the demo."""

import json
import re
import warnings
from dataclasses import replace
from functools import partial

import pytest
from support import engine_of, refusal

from mlx_dgemma import Block, Draft, Finished, OptionError, PromptError
from mlx_dgemma.decoding.control import fitting_size
from mlx_dgemma.tasks import edit as edit_
from mlx_dgemma.tasks import fill as fill_
from mlx_dgemma.tasks import infill
from mlx_dgemma.tasks.infill import HoleContext

PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
ANSWER = '{"name": "Anna", "age": 31, "city": "Oslo"}'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
}
SUM = "What is 25 + 31?"
ADDING = "Write a Python function that adds two numbers left and right."
CODE = "def add(left, right):\n    return left + right"
LEO = "Tell a story about a cat named Leo."
STORY = "Once there was a cat named Leo. Leo lived in a meadow. One day Leo found a blue ball. The cat was happy."
ONCE = {"max_denoising_steps": 1}
TOOL = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture
def few_lengths(monkeypatch):
    """A hole without a length has 8 tokens at most, all in one pass."""
    monkeypatch.setattr("mlx_dgemma.tasks.infill.LONGEST", 8)


def count_of(engine, text):
    return len(engine.tokenizer.encode(text, add_special_tokens=False))


def is_person(text):
    value = json.loads(text)
    return list(value) == ["name", "age", "city"] and [type(one) for one in value.values()] == [str, int, str]


# Schemas and regular expressions.


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
    supported = (
        "type, enum, const, properties, required, additionalProperties, items, prefixItems, minItems, maxItems, "
        "minLength, maxLength, pattern, format, minimum, maximum, exclusiveMinimum, exclusiveMaximum, anyOf, allOf, "
        "$ref"
    )
    assert told(schema={"type": "integer", "multipleOf": 3}) == (
        f"The schema at # has multipleOf, which is not supported; supported are {supported}."
    )
    assert told(schema={}) == "The schema at # allows any JSON, which is not supported; give it a type."
    assert told(schema={"type": "string", "pattern": "(?!a)"}).startswith("The pattern '(?!a)' has a negative")
    assert told(regex="(") == (
        "The pattern '(' is not a regular expression: missing ), unterminated subpattern at position 0."
    )
    assert told(regex="[^\\s\\S]") == "The pattern '[^\\\\s\\\\S]' matches nothing; give one that some text matches."
    for pattern in (".*", "(?s).*", "[^\n]*", ".*\n?", "(?:.|x)*"):
        assert told(regex=pattern) == (
            f"The regex {pattern!r} matches every line of text, so it asks for nothing; leave it out."
        )
    assert told(regex="a{20000}") == (
        "The constraint takes an automaton of about 20,001 states, and 20,000 are the most: ask for smaller bounds "
        "(maxLength, maxItems, {m,n})."
    )
    assert told(regex=r"a\b") == r"The pattern 'a\\b' has \b, which is not supported; write it without."


def test_languages_are_kept(engine):
    first = engine.builder.language("abc", "The regex")
    assert engine.builder.language("abc", "The regex") is first
    for i in range(15):
        engine.builder.language(f"x{i}", "The regex")
    assert engine.builder.language("abc", "The regex") is first
    for i in range(16):
        engine.builder.language(f"y{i}", "The regex")
    assert engine.builder.language("abc", "The regex") is not first
    assert len(engine._languages) == 16


# Infill.

HOLES = [
    (CODE, "left, right", 3, ADDING),
    (CODE, "add", 1, ADDING),
    (CODE, "def add(left, right):", 8, ADDING),
    (STORY, "named Leo", 2, LEO),
    (STORY, "amed Le", 2, LEO),  # both context inside of words
    (STORY, "Once", 1, LEO),
    (STORY, "nce there wa", 3, LEO),
    (ANSWER, "Anna", 1, PERSON),
    (ANSWER, 'me": "Anna", "age": 31, "ci', 20, PERSON),
    ("for i in range(5):\n    print(i)", "ange", 1, "Write a Python loop that prints 0 to 4."),
    ("for i in range(5):\n    print(i)", "(5):\n    pr", 8, "Write a Python loop that prints 0 to 4."),
]


def around(text, hole):
    prefix, _, suffix = text.partition(hole)
    assert prefix + hole + suffix == text
    return prefix, suffix


@pytest.mark.parametrize(("text", "hole", "length", "prompt"), HOLES)
def test_holes_of_a_given_length_are_filled_as_they_were(engine, text, hole, length, prompt):
    prefix, suffix = around(text, hole)
    result = engine.infill(prefix, suffix, prompt=prompt, length=length, seed=0)
    assert (result.text, result.finish_reason, result.thinking) == (hole, "stop", "")
    assert len(result.tokens) == result.stats.generated_tokens == length
    context = HoleContext.of(engine.tokenizer, prefix, suffix)
    assert engine.tokenizer.decode(result.tokens) == context.tail + hole + context.head


@pytest.mark.parametrize(("text", "hole", "length", "prompt"), [HOLES[i] for i in (1, 3, 4, 6)])
def test_lengths_are_found(engine, few_lengths, text, hole, length, prompt):
    result = engine.infill(*around(text, hole), prompt=prompt, seed=0)
    assert (result.text, len(result.tokens)) == (hole, length)


@pytest.mark.parametrize(
    ("text", "hole", "prompt"),
    [
        (CODE, "left + right", ADDING),
        (CODE, "urn left + right", ADDING),
        (STORY, "cat was happy.", LEO),
        (STORY, "appy.", LEO),
    ],
)
def test_without_a_suffix_the_text_goes_on_to_its_end(engine, text, hole, prompt):
    assert text.endswith(hole)
    result = engine.infill(text.removesuffix(hole), "", prompt=prompt, seed=0)
    assert (result.text, result.finish_reason) == (hole, "stop")


@pytest.mark.parametrize("name", ["length", "max_tokens"])
def test_a_hole_without_a_suffix_has_room_for_the_word_that_it_begins_with(engine, name):
    """Or is refused: one token, and the end."""
    prefix, given = CODE.removesuffix("left + right"), 0
    for most in (1, 2, 3):
        try:
            result = engine.infill(prefix, "", prompt=ADDING, seed=0, **{name: most}, **ONCE)
        except OptionError:
            continue
        given += 1
        assert 1 <= len(result.tokens) <= most
        assert engine.tokenizer.decode(result.tokens).startswith(" ")  # the blank at the prefix's end
    assert given >= 2


def test_prefix_and_suffix_stay_whatever_comes_between(engine):
    for prefix, suffix in (
        ("Größ", "ße"),
        ("a  ", "  b"),
        ("\n", "\n"),
        ("", "x"),
        ("日", "本"),
        ("(", ")"),
        ("don'", "t"),
    ):
        context = HoleContext.of(engine.tokenizer, prefix, suffix)
        assert engine.tokenizer.decode(context.before) + context.tail == prefix
        assert context.head + engine.tokenizer.decode(context.behind) == suffix
        least = int(engine.builder.language(context.pattern(), "The hole").distance[0])
        result = engine.infill(prefix, suffix, prompt="Hi", length=max(least, 1) + 1, seed=0, **ONCE)
        spelt = engine.builder.token_bytes.to_bytes([*context.before, *result.tokens, *context.behind]).decode()
        assert spelt == prefix + result.text + suffix


def test_context_are_cut_where_words_are_whole(engine):
    def cut(prefix, suffix):
        context = HoleContext.of(engine.tokenizer, prefix, suffix)
        return (
            engine.tokenizer.decode(context.before),
            context.tail,
            context.head,
            engine.tokenizer.decode(context.behind),
        )

    assert cut("Once there was a cat n", "amed Leo.") == ("Once there was a cat", " n", "amed", " Leo.")
    assert cut("return left", " + right") == ("return", " left", "", " + right")
    assert cut("a cat ", "named Leo.") == ("a cat", " ", "named", " Leo.")
    assert cut("", "") == ("", "", "", "")
    assert cut("def add(", ") + 1") == ("def add(", "", "", ") + 1")


def test_without_a_prompt_the_gap_is_shown(engine):
    result = engine.infill("Once there was a cat", " in a meadow.", length=2, seed=0)
    shown = "Write this text with something that fits in the place of [...]:\n\nOnce there was a cat[...] in a meadow."
    asked = count_of(engine, f"<bos><|turn>user\n{shown}<turn|>\n<|turn>model\n")
    assert result.stats.prompt_tokens == asked  # what stands before the hole is on the canvas
    assert len(result.tokens) == 2


def test_a_long_prefix_is_encoded_and_the_hole_still_filled(engine):
    long = "Leo lived in a meadow. " * 16 + "One day Leo found a"
    result = engine.infill(long, " ball. The cat was happy.", prompt=LEO, length=2, seed=0)
    assert result.stats.prompt_tokens > count_of(engine, f"<bos><|turn>user\n{LEO}<turn|>\n<|turn>model\n") + 63
    assert engine.tokenizer.decode(result.tokens) == " a" + result.text
    assert len(result.tokens) == 2


def test_a_hole_longer_than_a_canvas_is_told(engine):
    with pytest.warns(UserWarning) as caught:
        result = engine.infill("Once there was a", " The end.", prompt=LEO, length=70, seed=0, **ONCE)
    assert [str(one.message) for one in caught] == [
        "The hole of 70 tokens takes 2 canvases of 64; only the last one sees what stands behind it."
    ]
    assert (len(result.tokens), result.stats.blocks, result.finish_reason) == (70, 2, "stop")
    before = count_of(engine, "Once there was")
    assert result.stats.canvas_positions == 64 + fitting_size(before + 70 + 4 - 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(engine.infill("x(", ") The end.", prompt=LEO, length=40, seed=0, **ONCE).tokens) == 40


def test_the_last_canvas_of_a_hole_sees_what_stands_behind_it(engine):
    """Or it is told that none does: here the hole ends where a canvas does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = {
            engine.infill("", suffix, prompt=LEO, length=64, seed=0, max_denoising_steps=2).text
            for suffix in (" The end.", ' "city": "Oslo"}')
        }
    assert len(texts) == 2 or caught


def test_mistakes_of_infill(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))

    def told(*arguments, **options):
        return refusal(OptionError, engine.infill, *arguments, **options)

    assert told(1, "a") == "prefix is 1; it should be a text."
    assert told("a", None) == "suffix is None; it should be a text."
    assert refusal(PromptError, engine.infill, "", "") == (
        "There is no text before or behind the hole, and no prompt; give one of them."
    )
    assert refusal(PromptError, engine.infill, "a", "b", prompt=" ") == "The prompt is empty; say what you want."
    for length in (0, -1, 1.5, True, "3"):
        assert told("a", "b", length=length) == (
            f"length is {length!r}; it should be a whole number of tokens, at least 1."
        )
    assert told("The rab", "fox bit", length=1) == (
        "length is 1, but the pieces of words at the hole's ends take 2 tokens; give that many."
    )
    assert told("a", "b", exact=True) == "exact is True, but the reference's sampler knows no infill; leave it out."
    assert told("a", "b", stop="x") == "stop is ('x',), but infill has an end of its own; leave it out."
    assert told("a", "b", fats=True) == "fats is not an option; did you mean fast?"
    assert told("a", "b", seed=-1) == "seed is -1; it should be a whole number from 0 to 2**64 - 1."


def test_texts_that_the_context_has_no_room_for(engine):
    for prefix, suffix in (("cat " * 5000, "end"), ("a ", "cat " * 5000), ("cat " * 5000, "")):
        for prompt in (None, "Hi"):
            text = refusal(PromptError, engine.infill, prefix, suffix, prompt=prompt)
            assert re.fullmatch(
                "The texts before and behind the hole have [0-9]{4} tokens, but the context has 4096; shorten them.",
                text,
            )


# Templates.


def fill(engine, template, holes, **options):
    result = engine.fill(template, holes, seed=0, **{**ONCE, **options})
    assert template.format(**result.holes) == result.text
    assert set(result.holes) == set(holes)
    assert result.finish_reason == "stop"
    return result


def test_a_template_is_filled_as_the_answer_would_be(engine):
    template = '{{"name": "{name}", "age": {age}, "city": "{city}"}}'
    holes = {"city": 12, "age": r"\d+", "name": ["Anna", "Bob", "Anna Maria"]}
    result = fill(engine, template, holes, prompt=PERSON)
    assert result.text == ANSWER
    assert result.holes == {"name": "Anna", "age": "31", "city": "Oslo"}
    assert list(result.holes) == ["name", "age", "city"]
    assert result.stats.prompt_tokens == engine.generate(PERSON, seed=0, **ONCE).stats.prompt_tokens


def test_holes_are_numbers_choices_and_patterns(engine):
    some = fill(engine, "{a}.", {"a": 3})
    assert re.fullmatch(r"[^\n]{1,3}", some.holes["a"])
    choices = ["a+b", "(c)", "a", "ab", "日本 \n"]
    assert fill(engine, "<{x}>", {"x": tuple(choices)}, prompt="Hi").holes["x"] in choices
    assert re.fullmatch("(?i)cat|dog", fill(engine, "a {x}!", {"x": "(?i)cat|dog"}).holes["x"])
    assert re.fullmatch("(?s)a.b", fill(engine, "{x}{y}", {"x": "(?s)a.b", "y": "z"}).holes["x"])
    assert fill(engine, "{x}", {"x": "a|ab|b"}).text in ("a", "ab", "b")


def test_a_template_without_holes_and_braces(engine):
    assert fill(engine, "no {{holes}}", {}).text == "no {holes}"
    assert fill(engine, "{{{x}}}", {"x": ["y"]}).text == "{y}"
    shown = "Write this text with something that fits in the place of every {name}:\n\nHi {x}"
    asked = count_of(engine, f"<bos><|turn>user\n{shown}<turn|>\n<|turn>model\n")
    assert fill(engine, "Hi {x}", {"x": ["y"]}).stats.prompt_tokens == asked


def test_groups_of_a_holes_pattern_are_its_own(engine):
    assert fill(engine, "{a}-{b}", {"a": "(x)(y)", "b": "z"}).holes == {"a": "xy", "b": "z"}


def test_names_of_groups_are_each_holes_own(engine):
    assert fill(engine, "{a}-{b}", {"a": "(?P<n>x)", "b": "(?P<n>y)"}).holes == {"a": "x", "b": "y"}


def test_anchors_of_a_holes_pattern_are_the_holes(engine):
    assert fill(engine, "Name: {x}.", {"x": "^a$"}).holes == {"x": "a"}


def test_verbose_patterns_may_end_in_a_comment(engine):
    assert fill(engine, "{x}-", {"x": "(?x) a b  # a comment"}).holes == {"x": "ab"}


def test_mistakes_of_fill(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))

    def told(template, holes, **options):
        return refusal(OptionError, engine.fill, template, holes, **options)

    assert told("{a}", {"a": 1, "b": 2}) == "The template has no hole 'b'; it has a."
    assert told("a", {"b": 2}) == "The template has no hole 'b'; it has none."
    assert told("{c} {a}", {"b": 2}) == "The template has no hole 'b'; it has c, a."
    assert told("{a} {b}", {"a": 2}) == "holes has nothing for 'b', which stands in the template; give its texts."
    for template, why in (
        ("{a", "expected '}' before end of string"),
        ("a}", "Single '}' encountered in format string"),
        ("{", "Single '{' encountered in format string"),
    ):
        assert told(template, {"a": 2}) == (
            f"The template {template!r} is broken ({why}); write {{{{ and }}}} for braces."
        )
    for hole in (0, -1, True, 1.5, None, [], [""], ["a", 1], b"ab", {"a": 1}):
        assert told("{a}", {"a": hole}) == (
            f"The hole 'a' is {hole!r}; give a number of characters, a list of texts, or a regular expression."
        )
    assert told("a", ["b"]) == "template is a text and holes a mapping of their names; these are 'a', ['b']."
    assert told(1, {}) == "template is a text and holes a mapping of their names; these are 1, {}."
    assert told("{a}", {"a": r"(a)\1"}).endswith("has a backreference, which is not supported; write it without.")
    assert told("{a}", {"a": ["b"]}, exact=True) == (
        "exact is True, but the reference's sampler knows no fill; leave it out."
    )
    assert told("{a}", {"a": ["b"]}, stop=["x"]) == "stop is ('x',), but fill has an end of its own; leave it out."
    least = int(engine.builder.language("abcabc", "The template").distance[0]) + 1
    assert told("abc{a}", {"a": "abc"}, max_tokens=least - 1) == (
        f"The template needs room for {least} tokens, its end included, but max_tokens is {least - 1}; raise it."
    )
    assert refusal(PromptError, engine.fill, "{a}", {"a": 1}, prompt="") == "The prompt is empty; say what you want."


def test_holes_of_a_template_are_names_that_stand_once(engine):
    def told(template):
        return refusal(OptionError, engine.fill, template, {"a": 2})

    assert told("{a} {a}") == "The hole {a} of the template stands twice; change the template."
    for template, name in (("{a:>3}", "{a}"), ("{a!r}", "{a}"), ("{}", "{}"), ("{:d}", "{}")):
        assert told(template) == (
            f"The hole {name} of the template should be a name alone, such as {{city}}; change the template."
        )


# Edits.

SAW = "The cat saw a cat in the meadow."


@pytest.mark.parametrize("strength", [0, 0.25, 0.5, 1])
def test_an_edit_changes_what_it_should(engine, strength):
    result = engine.edit(SAW, "Replace cat with dog", strength=strength, seed=0)
    assert (result.text, result.finish_reason) == ("The dog saw a dog in the meadow.", "stop")
    assert result.stats.canvas_positions == 16 * result.stats.denoising_steps


def test_edits_of_other_texts(engine):
    text = "In the forest the dog took the ball from a dog."
    for instruction in ("Replace dog with fox", "Replace dog with fox:  "):
        assert engine.edit(text, instruction, seed=0).text == "In the forest the fox took the ball from a fox."
    asked = count_of(engine, f"<bos><|turn>user\nReplace dog with fox: {text}<turn|>\n<|turn>model\n")
    assert engine.edit(text, "Replace dog with fox", seed=0).stats.prompt_tokens == asked


def test_an_edit_of_a_long_text_has_room_for_it(engine):
    text = "The cat saw a cat in the meadow. " * 8
    draft = count_of(engine, text.rstrip())
    assert 64 < draft < 128
    brief = replace(engine, options=engine.options.override(max_tokens=40))
    result = brief.edit(text, "Replace cat with dog", seed=0, strength=0, **ONCE)
    assert 40 < len(result.tokens) <= 2 * draft
    assert result.stats.blocks > 1
    for one, limit in ((engine, 20), (brief, 64)):
        cut = one.edit(text, "Replace cat with dog", seed=0, strength=0, max_tokens=limit, **ONCE)
        assert (len(cut.tokens), cut.finish_reason, cut.stats.blocks) == (limit, "length", 1)


def test_a_seed_repeats_an_edit(engine):
    def ask(seed):
        return engine.edit(SAW, "Say nothing about it", seed=seed, max_tokens=16, **ONCE).tokens

    assert ask(1) == ask(1)
    assert len({tuple(ask(seed)) for seed in range(4)}) > 1


def test_mistakes_of_edits(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))

    def told(*arguments, **options):
        return refusal(OptionError, engine.edit, *arguments, **options)

    assert told("", "b") == "text is ''; it should be a text that is not empty."
    assert told(3, "b") == "text is 3; it should be a text that is not empty."
    assert told("a", " \n") == "instruction is ' \\n'; it should be a text that is not empty."
    for strength in (-0.1, 1.1, "1", True, None, float("nan")):
        assert told("a", "b", strength=strength) == (
            f"strength is {strength!r}; it should be a number from 0 (the draft) to 1 (all noise)."
        )
    assert told("a", "b", exact=True) == "exact is True, but the reference's sampler knows no edit; leave it out."
    assert told("a", "b", stop="x") == "stop is ('x',), but edit has an end of its own; leave it out."
    text = refusal(PromptError, engine.edit, "cat " * 5000, "Replace cat with dog")
    assert text.endswith(" tokens, but the context leaves room for 4032 beside a canvas of 64; shorten it.")


# Streams and statistics.

VERBS = {
    "schema": ("stream", (PERSON,), {"schema": SCHEMA}),
    "regex": ("stream", ("Hi",), {"regex": "[a-z]{5,40}", "max_denoising_steps": 2}),
    "infill": ("infill", around(STORY, "named Leo"), {"prompt": LEO, "length": 2}),
    "infill without a length": ("infill", around(STORY, "named Leo"), {"prompt": LEO}),
    "infill at the end": ("infill", (CODE.removesuffix("left + right"), ""), {"prompt": ADDING}),
    "fill": ("fill", ("A {x}.", {"x": ["cat", "dog"]}), {"max_denoising_steps": 2}),
    "edit": ("edit", (SAW, "Replace cat with dog"), {}),
}


@pytest.mark.parametrize("name", VERBS)
def test_streams_end_in_the_result(engine, few_lengths, name):
    verb, arguments, options = VERBS[name]
    prepare = (
        engine.prepare
        if verb == "stream"
        else partial(getattr({"infill": infill, "fill": fill_, "edit": edit_}[verb], verb), engine.builder)
    )
    *events, finished = engine.run(prepare(*arguments, seed=4, **options))
    *blocks, quiet = engine.run(prepare(*arguments, seed=4, **options), drafts=False)
    steps = finished.result.stats.denoising_steps
    assert isinstance(finished, Finished)
    assert [type(event) for event in events] == [Draft] * steps + [Block]
    assert [type(event) for event in blocks] == [Block]
    assert events[-1] == blocks[-1]
    assert events[-1].text == finished.result.text
    assert events[-2].tokens.tolist() == list(events[-1].tokens)
    one, other = finished.result, quiet.result
    assert (one.text, one.tokens, one.holes) == (other.text, other.tokens, other.holes)
    assert one.stats.canvas_positions == other.stats.canvas_positions
    assert one.text


def test_statistics_count_short_canvases_and_lengths_that_were_tried(engine, few_lengths):
    prefix, suffix = around(CODE, "add")
    given = engine.infill(prefix, suffix, prompt=ADDING, length=1, seed=0)
    behind = count_of(engine, suffix) + 1
    assert behind < 16  # all of it is in view
    size = fitting_size(count_of(engine, "def") + 1 + behind, 64)
    assert size < 64
    assert given.stats.canvas_positions == size * given.stats.denoising_steps
    found = engine.infill(prefix, suffix, prompt=ADDING, seed=0)
    tried = fitting_size(count_of(engine, "def") + 8 + behind, 64) * 8
    assert found.stats.canvas_positions == tried + size * found.stats.denoising_steps
    assert found.stats.denoising_steps == given.stats.denoising_steps
