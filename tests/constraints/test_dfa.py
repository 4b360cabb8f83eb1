"""Automata of bytes against `re`, and the bounds on their size."""

import re
from itertools import product

import pytest
from automata import accepts
from support import refusal

from mlx_dgemma.constraints import nfa
from mlx_dgemma.constraints.dfa import build_dfa
from mlx_dgemma.constraints.expressions import byte_ranges, characters, graph, marked, optional, repeat, sequence, text
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.errors import OptionError

PATTERNS = {
    "a|ab": ["", "a", "ab", "abb", "b", "aab"],
    "ab|a": ["", "a", "ab", "abb", "b"],
    "(?:a|ab)(?:c|bcd)": ["ac", "abc", "abcd", "abbcd", "acd", "bcd"],
    "": ["", "a", "\0"],
    "a?": ["", "a", "aa"],
    "(?:ab)*": ["", "a", "ab", "aba", "abab"],
    "(?:|a)b": ["b", "ab", "a", ""],
    "(?i)é[à-ü]": ["éà", "Éü", "éÀ", "e", "é", "éz"],
    "日本|日": ["日", "日本", "本", "日日"],
    "[^a]{2}": ["bc", "\n\0", "éé", "😀b", "ab", "b", "bcd"],
    ".*x": ["x", "axx", "a\nx", "xa", ""],
    r"\d{2,3}": ["1", "12", "123", "1234", "٣٤", "x1"],
    "\x00?a": ["a", "\0a", "\0\0a", "\0"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_automaton_accepts_what_re_matches(pattern):
    dfa = build_dfa(python_regex_to_plain(pattern))
    table, accepting = dfa.table, dfa.accepting
    texts = PATTERNS[pattern]
    expected = [re.fullmatch(pattern, text) is not None for text in texts]
    assert [accepts(dfa, text) for text in texts] == expected
    assert True in expected
    assert False in expected
    assert table.shape == (len(accepting), 256)
    assert (table[-1] == len(table) - 1).all()  # the last state is dead
    assert not accepting[-1]
    assert not accepts(dfa, b"\xff")


@pytest.mark.parametrize(
    "pattern", ["a|ab", "(?:a|ab)(?:c|bcd)*", "a*b|c{2}", "(?:ab|a)*c?", "[^a]b?|", "a{2,3}(?:b|)"]
)
def test_an_automaton_accepts_every_short_text_as_re_does(pattern):
    dfa = build_dfa(python_regex_to_plain(pattern))
    for length in range(6):
        for letters in product("abcd", repeat=length):
            text = "".join(letters)
            assert accepts(dfa, text) == (re.fullmatch(pattern, text) is not None), text


def test_too_large_automata_are_refused(monkeypatch):
    assert refusal(OptionError, build_dfa, "a{60000}") == (
        "The constraint takes an automaton of about 120,001 states, and 20,000 are the most: ask for smaller bounds "
        "(maxLength, maxItems, {m,n})."
    )
    monkeypatch.setattr(nfa, "MAX_STATES", 4)
    assert len(build_dfa("abc")[0]) == 5
    assert refusal(OptionError, build_dfa, "abcd") == (
        "The constraint takes an automaton of about 5 states, and 4 are the most: ask for smaller bounds "
        "(maxLength, maxItems, {m,n})."
    )


def test_counted_free_text_takes_states_in_proportion():
    assert 30 < len(build_dfa(python_regex_to_plain("[^\\n]{1,30}")).table) < 500


@pytest.mark.parametrize("pattern", ["(", r"\x{110000}"])
def test_what_is_no_plain_pattern_is_told(pattern):
    told = refusal(OptionError, build_dfa, pattern)
    assert told.startswith("The pattern cannot be made into an automaton (")
    assert told.endswith("); simplify it.")


@pytest.mark.parametrize(
    "pattern",
    [
        "[ab]*a[ab]{30}",
        "[ab]*a[ab]{5000}",
        "(?:[a-z]{1,200} ?){1,20}",
        "(a?){9000}",
        "((a?){90}){90}",
        "(?:a|){4294967294}",
        "(?:(?:a?){1000}){1000}",
        ".{15000}",
        "(?=(?:.{300}a)*)(?=(?:.{299}b)*).*",
    ],
)
def test_work_is_bounded_whatever_is_asked(pattern, monkeypatch):
    """In steps that are the same on every machine; the last few, of one state, may go beyond the bound."""
    monkeypatch.setattr(nfa, "MAX_WORK", 100_000)
    kept = []
    counted = nfa.Work.__init__
    monkeypatch.setattr(nfa.Work, "__init__", lambda work: (counted(work), kept.append(work))[0])
    told = refusal(OptionError, build_dfa, python_regex_to_plain(pattern))
    assert told.startswith("The constraint takes an automaton of ")
    assert all(work.done < 150_000 for work in kept)


@pytest.mark.parametrize(
    "pattern",
    ["(?:){4294967294}", "(?:|){4000000}", "(?:a{0}){4000000}", "(?:(?:){1000}){1000}", "(?:(?:|()){9}){4000000}"],
)
def test_repeats_of_nothing_are_nothing(pattern):
    """Their sizes multiply to nothing, however often each part is looked at."""
    dfa = build_dfa(python_regex_to_plain(pattern))
    assert [accepts(dfa, text) for text in ("", "a")] == [True, False]
    assert len(dfa.table) == 2


@pytest.mark.parametrize(
    ("pattern", "fits", "other"),
    [
        ("(?=.*b)[ab]{2}", "ab ba bb", "aa b abb"),
        ("(?!ab)[ab]*", "ba b aab", "ab abb abba"),
        ("^(?!.*aa)(?=.{2,3}$)[ab]+$", "ab bab", "aab a abab"),
        ("a(?!b)[abc]", "aa ac", "ab a"),
        ("(?:x|(?=a)[ab]+)", "x a ab", "b ba xa"),
    ],
)
def test_lookaheads_are_products(pattern, fits, other):
    dfa = build_dfa(python_regex_to_plain(pattern))
    for one in [*fits.split(), *other.split()]:
        assert accepts(dfa, one) == bool(re.fullmatch(pattern, one)) == (one in fits.split()), one


def test_graphs_go_round():
    words = graph(3, [(0, text(""), 1), (1, text("ab"), 2), (2, text(","), 1)])
    dfa = build_dfa(sequence(words, optional(text("!"))))
    assert [accepts(dfa, one) for one in ("ab", "ab,ab!", "", "ab,", ",ab")] == [True, True, False, False, False]


def test_marks_stay_where_every_way_has_one():
    dfa = build_dfa(sequence(text("x"), repeat(marked(text("ab"), 4), 0, None), text("c")))
    behind = dfa.table[0, ord("x")]
    assert (dfa.marks[0] == 0).all()
    assert [dfa.marks[behind, ord(one)] for one in "ac"] == [4, 0]
    shared = build_dfa("(?:ab|ac)").marks
    assert shared is None
    both = build_dfa(graph(2, [(0, marked(text("a"), 8), 1), (0, text("ab"), 1)]))
    assert both.marks is None


@pytest.mark.parametrize(
    "intervals", [((0, 0xD7FF), (0xE000, 0x10FFFD)), ((0x61, 0x7FF),), ((0xE9, 0x2345),), ((0xFFFF, 0x10000),)]
)
def test_characters_are_spelt_in_utf8(intervals):
    dfa, edges = build_dfa(characters(intervals)), byte_ranges(intervals)
    ends = {at + step for pair in intervals for at in pair for step in (-1, 0, 1)} | set(range(0x20, 0x900, 7))
    for at in ends:
        if 0 <= at <= 0x10FFFF and not 0xD800 <= at <= 0xDFFF:
            assert accepts(dfa, chr(at)) == any(low <= at <= high for low, high in intervals), hex(at)
    assert len(edges) < 25
