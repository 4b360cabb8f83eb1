"""Plain patterns against `re`: whole texts through an automaton of bytes, classes over all code points."""

import json
import random
import re
import sys
import unicodedata

import pytest
from automata import Automaton

from mlx_dgemma.constraints.patterns import character_class, literal, python_regex_to_plain, subtract
from mlx_dgemma.errors import OptionError

# Without surrogates, the noncharacters at the end, and the insides of ten planes that hold no character.
EMPTY = range(0x40100, 0xDFF00)
ALL_CODE_POINTS = "".join(map(chr, [*range(0xD800), *range(0xE000, EMPTY[0]), *range(EMPTY[-1], sys.maxunicode - 1)]))


PATTERNS = [
    "",
    "a",
    "a|ab",
    "ab|a",
    "(?:|a)b",
    "(a|ab)(c|bcd)?",
    "a*",
    "a*?b+?",
    "(?:a?b?){2,3}",
    "(ab){2,}",
    "x{0}y",
    "[a-c]{2}",
    "[^a-c]+",
    r"\d+$",
    r"^\d{1,3}(\.\d{3})*$",
    r"\A-?\d+\Z",
    r"(^a|b)c",
    r"(?:^|,)x(?:,|$)",
    r"^$",
    "^",
    "$",
    "^a|b$",
    "^(?:a|b)$|c",
    r"[\w.+-]+@\w+\.(com|org)",
    r"\s*\S+\s*",
    r"[^\W\d_]+",
    ".+",
    "(?s:.)b",
    "(?i)straße",
    "(?i)[k-s]+",
    "(?i:a)b",
    "(?i)ǆ|Σ",
    "(?i)[^k]",
    r"(?a)\w+\s\d",
    r"(?a:\w)\w",
    r"(?x) a \  b # a comment",
    r"é+|日本|😀{2}",
    r"\"\\\n|[\"x]",
    r"[\]\-^&~|]+",
    r"\x00?\x7f",
    r"\{\}\(\)\[\]\.\*\+\?\^\$\|#",
    r"(?P<year>\d{4})-(?P<month>0[1-9]|1[0-2])",
    r"a$|\n",
    r"^(?!\.)(?!.*\.\.)[a-z.]+@\w+$",
    "(?=.*b)a+b?|c",
    "a(?=b).*",
    r"^(?:x|(?!ab)\w+)$",
    "a(?!$)b*|(?!)",
    "^a(?:b(?=c)c?)?$",
]
TEXTS = [
    *["", "a", "b", "c", "x", "y", "ab", "ac", "bc", "abc", "abcd", "abbcd", "aab", "bb", "abab", "ababab", "aa"],
    *["12", "1234", "1.234", "12.345.678", "-7", "٣", "12\n", "a\n", "b\n", "\n", "c\n", "\n\n", "a\nb", "x,", ",x"],
    *[",x,", ",x,\n", "x,y", "a.b+c@mail.com", "ä@ö.org", " a ", "a b", "\u00a0é\u2003", "_é", "Ab", "aB", "STRASSE"],
    *["straße", "ſTRAẞE", "STRAßE", "K", "\u212a", "k", "ſ", "ǅ", "Ǆ", "ǆ", "σ", "ς", "é", "éé", "日本", "😀😀", "ı"],
    *['"\\\n', '"', "]-^&~|", "\x00\x7f", "\x7f", "{}()[].*+?^$|#", "2024-12", "2024-13", "z 1", "b c", "ac\n", "İ"],
]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_automaton_accepts_what_re_matches(pattern, search):
    automaton = Automaton(python_regex_to_plain(pattern, search=search))
    match = re.compile(pattern).search if search else re.compile(pattern).fullmatch
    rng = random.Random(1)
    samples = [automaton.sample(rng, 12) for _ in range(40)]
    for text in samples:
        assert match(text), text
    changed = []
    for text in samples:
        at = rng.randrange(len(text) + 1)
        changed += [text[:at] + text[at + 1 :], text[:at] + rng.choice("aB1,\n é") + text[at:], text + "\n"]
    for text in [*TEXTS, *changed]:
        assert automaton.matches(text) == bool(match(text)), text


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_safe_leaves_out_what_json_strings_escape(pattern, search):
    match = re.compile(pattern).search if search else re.compile(pattern).fullmatch
    try:
        automaton = Automaton(python_regex_to_plain(pattern, json_safe=True, search=search))
    except OptionError as error:
        assert "needs characters that JSON strings escape" in str(error)
        automaton = None
    for text in TEXTS:
        found = automaton is not None and automaton.matches(json.dumps(text, ensure_ascii=False)[1:-1])
        if re.search(r'["\\\x00-\x1f]', text):
            assert not found or match(text), text
        else:
            assert found == bool(match(text)), text


@pytest.mark.parametrize(
    "pattern",
    r". (?s:.) \d \w \s \D \W \S [^\W\d_] (?a)\w (?a)\s (?a)[^\d] (?i)k (?i)s (?i)[^k] (?i)[a-z] (?i)[^a-z] (?i)ß "
    r"(?i)[à-ÿ] (?ai)k (?ai)[a-z] (?i)ǅ (?i)[α-ω] (?i)ı (?i)[^\W\d_] [^a] (?i)µ ſ (?i)ſ a [\s\S]".split(),
)
def test_a_class_is_exact(pattern):
    def as_python(plain):
        return re.sub(r"\\x\{([0-9a-f]+)\}", lambda match: f"\\U{int(match[1], 16):08x}", plain)

    def spans(of):
        return [match.span() for match in re.finditer(f"{of}+", ALL_CODE_POINTS)]

    assert {unicodedata.category(chr(point)) for point in EMPTY[::251]} == {"Cn"}
    assert spans(as_python(python_regex_to_plain(pattern))) == spans(pattern)


def test_plain_patterns():
    assert python_regex_to_plain("a.b|c") == r"(?:a[\x{0}-\x{9}\x{b}-\x{d7ff}\x{e000}-\x{10fffd}]b|c)"
    assert python_regex_to_plain(r"^x+?[a-c_]{2,}\$") == r"(?:x)+(?:[\x{5f}a-c]){2,}\x{24}"
    safe = r"[\x{20}-\x{21}\x{23}-\x{5b}\x{5d}-\x{d7ff}\x{e000}-\x{10fffd}]*"
    assert python_regex_to_plain("a", json_safe=True, search=True) == f"{safe}a{safe}"
    assert literal('a "é"\n{') == r'a "\x{e9}"\x{a}\x{7b}'
    assert character_class([(0, 9), (97, 97), (98, 100)]) == r"[\x{0}-\x{9}ab-d]"
    assert subtract([(0, 10), (20, 30)], (5, 6), (9, 25)) == [(0, 4), (7, 8), (26, 30)]


def test_portable_patterns_mean_the_same_to_others():
    """To those for whom \\d, \\w and \\s are ASCII, and to those for whom they are not."""
    for pattern in (r"^\d\w\s$", r"^\D\W\S$", r"^[^\w]$", r"^(?!\d)..$", r"^(?<year>\d)$"):
        automaton = Automaton(python_regex_to_plain(pattern, search=True, portable=True))
        named = pattern.replace("(?<y", "(?P<y")
        for text in ("1a ", "٣a ", "1é ", "é-x", "a٣", "--x", "é", "-", "1", "٣", "ab", "xé1"):
            both = re.search(named, text) and re.search(named, text, re.ASCII)
            assert automaton.matches(text) == bool(both), (pattern, text)


def test_case_is_folded_for_few_characters(monkeypatch):
    monkeypatch.setattr("mlx_dgemma.constraints.patterns.MAX_FOLDED", 3)
    assert Automaton(python_regex_to_plain("(?i)kabba")).matches("\u212aABBA")
    with pytest.raises(OptionError, match="more than 3 different characters or classes without regard to case"):
        python_regex_to_plain("(?i)kabc")


UNSUPPORTED = {
    r"(a)\1": "a backreference",
    r"(a)?(?(1)b|c)": "a condition on a group",
    "(?:(?=a).)*": "a lookahead in a group that something follows",
    "((?!ab).)a": "a lookahead in a group that something follows",
    "(?<=a)": "a lookbehind",
    "(?<!a)b": "a lookbehind",
    r"\bfoo": r"\b",
    r"foo\B": r"\B",
    "a^": "^ elsewhere than where a match starts",
    "(?:^a)?": "^ elsewhere than where a match starts",
    r"a\Ab": r"\A elsewhere than where a match starts",
    "$a": "$ elsewhere than where a match ends",
    "a$\n": "$ elsewhere than where a match ends",
    r"(?:a\Z|b)c": r"\Z elsewhere than where a match ends",
    "(?m)^a": "^ with the flag MULTILINE",
    "(?m:a$)": "$ with the flag MULTILINE",
}
if sys.version_info >= (3, 11):
    UNSUPPORTED |= {"(?>a)": "an atomic group", "a++": "a possessive repeat"}


@pytest.mark.parametrize("pattern", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(pattern):
    with pytest.raises(OptionError) as error:
        python_regex_to_plain(pattern)
    assert str(error.value) == (
        f"The pattern {pattern!r} has {UNSUPPORTED[pattern]}, which is not supported; write it without."
    )


@pytest.mark.parametrize(
    ("pattern", "json_safe", "message"),
    [
        (
            "a(",
            False,
            "The pattern 'a(' is not a regular expression: missing ), unterminated subpattern at position 1.",
        ),
        ("[b-a]", False, "The pattern '[b-a]' is not a regular expression: bad character range b-a at position 1."),
        (
            "a{99999999999}",
            False,
            "The pattern 'a{99999999999}' repeats too often; write a smaller number.",
        ),
        (
            "(" * 3000 + ")" * 3000,
            False,
            "The pattern is nested too deeply; write it with fewer groups in groups.",
        ),
        (r"[^\s\S]", False, "The pattern '[^\\\\s\\\\S]' matches nothing; give one that some text matches."),
        (r"a[^\s\S]+b", True, "The pattern 'a[^\\\\s\\\\S]+b' matches nothing; give one that some text matches."),
        ("\ud800", False, "The pattern '\\ud800' matches nothing; give one that some text matches."),
        (
            'say ["\x01]hi',
            True,
            "The pattern 'say [\"\\x01]hi' needs characters that JSON strings escape (\", \\ or control characters); "
            "give one that does without them.",
        ),
    ],
)
def test_errors(pattern, json_safe, message):
    with pytest.raises(OptionError) as error:
        python_regex_to_plain(pattern, json_safe=json_safe)
    assert str(error.value) == message


def test_what_matches_nothing_may_be_a_part():
    assert Automaton(python_regex_to_plain(r"a|[^\s\S]b|(?:[^\s\S])*c{0}")).matches("")
    assert python_regex_to_plain(r'a|b["\x00]', json_safe=True) == python_regex_to_plain(r"a|b[^\s\S]") == "(?:a)"
