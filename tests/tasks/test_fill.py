"""Templates through the engine, on the demo."""

import re

import pytest
from prompts import ANSWER, ONCE, PERSON, count_of
from support import refusal

from mlx_dgemma import OptionError, PromptError
from mlx_dgemma.errors import LanguageError
from mlx_dgemma.tasks.fill import divide


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


def test_holes_are_told_apart_in_bounded_time(engine, monkeypatch):
    """`re` would try 2**30 ways for the first, and the ways of 12 holes multiply."""
    assert fill(engine, "{n}c", {"n": "(?:a|a){30}"}).holes == {"n": "a" * 30}
    names = "abcdefghijkl"
    template = "{" + "}{".join(names) + "}"
    holes = fill(engine, template, {**dict.fromkeys(names, "a{0,20}"), "l": "a{20}"}).holes
    assert holes["l"] == "a" * 20
    parts = ["", "x", "", "y", ""]
    assert divide("aaa", parts, {"x": "a*", "y": "a*"}) == {"x": "aaa", "y": ""}
    assert divide("aab", parts, {"x": "a*", "y": "ab"}) == {"x": "a", "y": "ab"}
    assert divide("aab", parts, {"x": "(?=a$)a|^aa", "y": "(?!b)ab|b"}) == {"x": "aa", "y": "b"}  # each by itself
    assert divide("aab", parts, {"x": "(?=a$)a|^ab", "y": "(?!b)ab|b"}) == {"x": "a", "y": "ab"}
    assert divide("aac", parts, {"x": "a*", "y": "ab"}) is None
    monkeypatch.setattr("mlx_dgemma.tasks.fill.DIVIDE_STEPS", 10)
    assert refusal(LanguageError, fill, engine, "{n}c", {"n": "(?:a|a){30}"}) == (
        "The text cannot be divided into its holes: it takes too many steps to match; simplify their patterns."
    )


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
