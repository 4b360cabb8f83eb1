"""Bounded matching of Python's patterns, against `re`."""

import random
import re

import pytest

from mlx_dgemma.constraints.matching import Pattern, PatternError, Steps

ATOMS = [
    "a",
    "b",
    "[ab]",
    "[^a]",
    ".",
    r"\w",
    r"\.",
    "(?i:A)",
    "^",
    "$",
    r"\b",
    r"\B",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    "(?<!b.)",
]
REPEATS = ["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "+?", "{0}"]


def random_pattern(draw, depth=3):
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(ATOMS)
    parts = [random_pattern(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    kind = draw.randint(0, 3)
    if kind == 0:
        return "(?:" + "|".join(parts) + ")"
    if kind == 1:
        return f"({''.join(parts)}){draw.choice(REPEATS)}"
    return "".join(parts)


def test_random_patterns_match_what_re_matches():
    draw, matched, patterns = random.Random(0), 0, 0
    texts = ["".join(draw.choice("aabB.\n") for _ in range(length % 8)) for length in range(60)]
    while patterns < 300:
        text = random_pattern(draw)
        try:
            theirs = re.compile(text)
        except re.error:  # a lookbehind of several widths
            continue
        mine, patterns = Pattern(text), patterns + 1
        for one in texts:
            expected = theirs.fullmatch(one) is not None
            assert mine.fullmatch(one) == expected, (text, one)
            matched += expected
            reached = [end for end in range(len(one) + 1) if re.fullmatch(f"(?:{text})", one[:end])]
            if not any(sign in text for sign in ("$", "(?=", "(?!", r"\b", r"\B")):  # these look at what follows
                assert mine.ends(one) == reached, (text, one)
    assert matched > 1000


@pytest.mark.parametrize(
    "text",
    [
        "(([a-z._0-9]+)+)+X",
        "(?:){4294967294}",
        "(?:(?:){1000}){1000}",
        "((((a{1,9}){1,9}){1,9}){1,9}){1,9}b",
        "((a{0,5000}){0,5000}){0,5000}b",
        "(?=(a+)+b)" * 9,
    ],
)
def test_patterns_on_which_re_hangs_take_few_steps(text):
    steps = Steps(1000)
    assert Pattern(text, steps).fullmatch("") == (text.startswith("(?:"))
    assert not Pattern(text, steps).fullmatch("a" * 60)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(q", "missing ), unterminated subpattern at position 0"),
        ("a{99999999999999}", "it repeats too often"),
        ("(" * 3000 + ")" * 3000, "it is nested too deeply"),
        (r"(a)\1", "it has a backreference, which is not supported here"),
        ("(a)?(?(1)b|c)", "it has a condition on a group, which is not supported here"),
        ("(?<=a+)b", "look-behind requires fixed-width pattern"),
    ],
)
def test_what_cannot_be_matched_is_refused(text, reason):
    with pytest.raises(PatternError) as caught:
        Pattern(text)
    assert str(caught.value) == reason


def test_steps_are_counted_over_all_matches_and_lengths():
    steps = Steps(30)
    pattern = Pattern("[ab]b", steps)
    with pytest.raises(PatternError, match=r"^it takes too many steps to match$"):
        while True:
            pattern.fullmatch("ab")
    with pytest.raises(PatternError):
        Pattern(".{0,2000}b", Steps(1000)).fullmatch("a" * 4000)
