"""Automata of bytes against `re`, and the bounds on their size."""

import re
import subprocess
import sys
from itertools import product

import outlines_core
import pytest
from support import refusal

from mlx_dgemma.constraints import dfa, dfa_size
from mlx_dgemma.constraints.dfa import build_dfa, parse_plain
from mlx_dgemma.constraints.dfa_size import dfa_size_exceeds
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


def accepts(table, accepting, text):
    state = 0
    for byte in text:
        state = table[state, byte]
    return bool(accepting[state])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_automaton_accepts_what_re_matches(pattern):
    table, accepting = build_dfa(python_regex_to_plain(pattern))
    texts = PATTERNS[pattern]
    expected = [re.fullmatch(pattern, text) is not None for text in texts]
    assert [accepts(table, accepting, text.encode()) for text in texts] == expected
    assert True in expected
    assert False in expected
    assert table.shape == (len(accepting), 256)
    assert (table[-1] == len(table) - 1).all()  # the last state is dead
    assert not accepting[-1]
    assert not accepts(table, accepting, b"\xff")


@pytest.mark.parametrize(
    "pattern", ["a|ab", "(?:a|ab)(?:c|bcd)*", "a*b|c{2}", "(?:ab|a)*c?", "[^a]b?|", "a{2,3}(?:b|)"]
)
def test_an_automaton_accepts_every_short_text_as_re_does(pattern):
    table, accepting = build_dfa(python_regex_to_plain(pattern))
    for length in range(6):
        for characters in product("abcd", repeat=length):
            text = "".join(characters)
            assert accepts(table, accepting, text.encode()) == (re.fullmatch(pattern, text) is not None), text


def test_too_large_automata_are_refused(monkeypatch):
    assert refusal(OptionError, build_dfa, "a{20000}") == (
        "The constraint takes an automaton of about 20,001 states, and 20,000 are the most: ask for smaller bounds "
        "(maxLength, maxItems, {m,n})."
    )
    monkeypatch.setattr(dfa, "MAX_STATES", 4)
    assert len(build_dfa("ab")[0]) == 4
    assert refusal(OptionError, build_dfa, "abcd") == (
        "The constraint takes an automaton of about 5 states, and 4 are the most: ask for smaller bounds "
        "(maxLength, maxItems, {m,n})."
    )


def test_counted_free_text_takes_states_in_proportion():
    """Without marks around the pattern, a class with the zero byte would take a power of two: a library's search may
    begin at every zero byte. That build would not end."""
    code = "from mlx_dgemma.constraints.dfa import *; from mlx_dgemma.constraints.patterns import *; "
    code += "print(len(build_dfa(python_regex_to_plain('[^\\\\n]{1,30}'))[0]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
    assert 30 < int(done.stdout) < 500


def test_what_the_library_refuses_is_told():
    text = refusal(OptionError, build_dfa, "(")
    assert text.startswith("The pattern cannot be made into an automaton (")
    assert text.endswith("); simplify it.")


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    assert refusal(OptionError, build_dfa, "a") == (
        'schema, regex, infill and fill need the package outlines-core: pip install "mlx-dgemma[constrain]".'
    )


@pytest.mark.parametrize("pattern", ["[ab]*a[ab]{30}", "[ab]*a[ab]{5000}", "(?:[a-z]{1,200} ?){1,20}"])
def test_automata_that_explode_are_never_built(pattern, monkeypatch):
    built = []
    monkeypatch.setattr(outlines_core, "Index", lambda *arguments: built.append(arguments))
    assert refusal(OptionError, build_dfa, python_regex_to_plain(pattern)).startswith(
        "The constraint takes an automaton of "
    )
    assert built == []


def test_counting_states_ends_after_the_work_that_is_allowed(monkeypatch):
    """However many states are allowed."""
    visited = []
    bits = dfa_size._bits
    monkeypatch.setattr(dfa_size, "_bits", lambda number: (visited.append(1) or bit for bit in bits(number)))
    tree = parse_plain("[ab]*a[ab]{300}")
    dfa_size._Positions(tree)
    construction = len(visited)
    visited.clear()
    monkeypatch.setattr(dfa_size, "MAX_WORK", 10_000)
    assert dfa_size_exceeds(tree, 10**9)
    assert 10_000 < len(visited) - construction < 12_000


@pytest.mark.parametrize("pattern", ["abc", "a|ab", "(?:ab|a)*c?", "(?:a?){20}", "(?:a{1,5}){1,5}", "(?:a|b|ab){2,}c"])
def test_what_is_counted_is_at_most_what_the_library_builds(pattern):
    plain = python_regex_to_plain(pattern)
    assert not dfa_size_exceeds(parse_plain(plain), len(build_dfa(plain)[0]) - 1)


def test_states_are_counted():
    tree = parse_plain("[ab]*a[ab]{6}")
    assert dfa_size_exceeds(tree, 63)
    assert not dfa_size_exceeds(tree, 128)


def test_states_are_never_overestimated():
    """What is counted is at most what the library makes, so that nothing is refused which would fit."""
    for pattern in ("abc", "a|ab", "(?:ab|a)*c?", "[ab]*a[ab]{6}", "(?:a?){20}", "(?:a{1,5}){1,5}", "(?:a|b|ab){2,}c"):
        tree = parse_plain(python_regex_to_plain(pattern))
        assert not dfa_size_exceeds(tree, len(build_dfa(python_regex_to_plain(pattern))[0]) - 1), pattern
    assert dfa_size_exceeds(parse_plain(python_regex_to_plain("[ab]*a[ab]{6}")), 63)
    assert not dfa_size_exceeds(parse_plain(python_regex_to_plain("[ab]*a[ab]{6}")), 64)
