"""Languages over canvases: spellings, automata and walks against naive ones, best texts against every canvas."""

import re
import subprocess
import sys
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
from support import engine_of, refusal

from mlx_dgemma.constraints import dfa
from mlx_dgemma.constraints import language as language_module
from mlx_dgemma.constraints.dfa import build_dfa
from mlx_dgemma.constraints.language import Language, accepts_every_line
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.constraints.search import FRESH, THINKING, Marginals, best_text, exact_text
from mlx_dgemma.constraints.tokens import MAX_TOKEN_BYTES, TokenBytes
from mlx_dgemma.errors import OptionError
from mlx_dgemma.tasks.constrained import Constrained

PIECES = ("<pad>", "<end>", "<stop>", "<open>", "<close>", "a", "b", "ab", "▁", "c▁")
PAD, END, STOP, OPEN, CLOSE, A, B, AB, BLANK, C_BLANK = range(10)
ENDS, MARKS = (END, STOP), (OPEN, CLOSE)


class Pieces:
    """A tokenizer that is its pieces."""

    def __init__(self, *pieces, special=0):
        self.pieces, self.all_special_ids = pieces, list(range(special))

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


SMALL = TokenBytes(Pieces(*PIECES, special=5), len(PIECES))


@lru_cache(maxsize=64)
def language_of(pattern, spelling=SMALL):
    return Language(python_regex_to_plain(pattern), spelling)


@pytest.fixture(scope="module")
def tokenizer(demo):
    return engine_of(demo).tokenizer


@pytest.fixture(scope="module")
def spelling(demo):
    return engine_of(demo).spelling


# TokenBytes.


def test_tokens_spell_what_the_tokenizer_decodes(tokenizer, spelling):
    spelt = np.flatnonzero(spelling.length)
    assert len(spelt) > 1500
    for token in spelt:
        piece = tokenizer.convert_ids_to_tokens(int(token))
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # alone most are no text
            assert spelling.to_bytes([token]) == bytes([int(piece[3:5], 16)])
        else:
            assert spelling.to_bytes([token]) == tokenizer.decode([int(token)]).encode()


def test_texts_are_spelt_as_they_are_encoded(tokenizer, spelling):
    for text in (
        '{"name": "Anna", "age": 31}',
        "def add(a, b):\n    return a + b",
        "  Größe 日本 \U0001f600",
        "\t\n\n ",
    ):
        assert spelling.to_bytes(tokenizer.encode(text, add_special_tokens=False)).decode() == text


def test_special_and_unused_tokens_spell_nothing(tokenizer, spelling):
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    unused = [token for token, piece in enumerate(pieces) if re.fullmatch(r"<unused\d+>", piece)]
    assert len(unused) > 100
    added = [token for token, one in tokenizer.added_tokens_decoder.items() if one.special]
    silent = {*tokenizer.all_special_ids, *unused, *added, 1, 16, 9}
    assert set(np.flatnonzero(spelling.length == 0).tolist()) == silent
    assert spelling.to_bytes(sorted(silent)) == b""
    starting = np.concatenate([spelling.starting_with(byte) for byte in range(256)])
    assert sorted(starting.tolist()) == np.flatnonzero(spelling.length).tolist()


def test_tokens_that_end_an_answer_spell_nothing(demo, spelling):
    """Or a text could hold a token at which its answer ends."""
    assert spelling.to_bytes(engine_of(demo).options.end_tokens) == b""


def test_pieces_of_a_tokenizer_are_spelt():
    long, longer = "é" * 32, "é" * 32 + "x"
    tokenizer = Pieces(
        "<s>", "▁a▁", "<0xC3>", "<0x61>", "a", "<0xc3>", "<unused7>", "<unusedx>", None, long, longer, ""
    )
    tokenizer.all_special_ids = [0]
    spelling = TokenBytes(tokenizer, 14)  # the vocabulary may be longer than the tokenizer
    expected = [b"", b" a ", b"\xc3", b"a", b"a", b"<0xc3>", b"", b"<unusedx>", b"", long.encode(), b"", b"", b"", b""]
    assert [spelling.to_bytes([token]) for token in range(14)] == expected
    assert spelling.length.tolist() == [len(one) for one in expected]
    assert MAX_TOKEN_BYTES == 64 == len(long.encode())
    assert spelling.starting_with(ord("a")).tolist() == [4, 3]  # a bare byte comes last
    assert spelling.starting_with(0xC3).tolist() == [9, 2]
    assert spelling.to_bytes([4, 1, 9, 0, 2]) == b"a a " + long.encode() + b"\xc3"
    assert TokenBytes(tokenizer, 3).length.tolist() == [0, 3, 1]  # or shorter


# Automata.

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
    """The library's search may begin at any zero byte, so a class with one in it takes a power of two of them."""
    code = "from mlx_dgemma.constraints.dfa import *; from mlx_dgemma.constraints.patterns import *; "
    code += "print(len(build_dfa(python_regex_to_plain('[^\\\\n]{1,30}'))[0]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=5)
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


# Languages.

WALKED = ["a|ab", r'\{"name": "[^"\n]{1,3}", "age": \d+\}', "(?:é|日本)+ ?x", ".*the end", "", "(?:ab)*c?"]


def plain_walk(language, spelling, tokens):
    """Every (token, state, state behind it), byte by byte."""
    table, found = language.table, set()
    for token in tokens:
        spelt = spelling.to_bytes([token])
        for source in range(len(table) - 1) if spelt else ():
            state = source
            for byte in spelt:
                state = table[state, byte]
            if state != len(table) - 1:
                found.add((int(token), source, int(state)))
    return found


def as_triples(tokens, transitions):
    columns = np.asarray(tokens)[transitions.index], transitions.source, transitions.target
    return list(zip(*(column.tolist() for column in columns)))


@pytest.mark.parametrize("pattern", WALKED)
def test_walks_equal_a_walk_byte_by_byte(pattern, spelling):
    language, tokens = language_of(pattern, spelling), np.arange(len(spelling.length))
    found = as_triples(tokens, language.transitions_of(tokens))
    assert set(found) == plain_walk(language, spelling, tokens)
    assert len(set(found)) == len(found)
    assert language.transitions_of(tokens[:0]).index.tolist() == []
    assert language.transitions_of(np.array([1, 2])).index.tolist() == []  # special tokens


@pytest.mark.parametrize("pattern", WALKED)
def test_distances_are_those_of_a_search_over_anchors(pattern, spelling):
    language = language_of(pattern, spelling)
    into = {}
    for token, source, target in plain_walk(language, spelling, language.always_scored_tokens):
        into.setdefault(target, []).append((source, token))
    distance, edge, onward = dict.fromkeys(np.flatnonzero(language.accepting).tolist(), 0), True, {}
    while edge:
        level = max(distance.values())
        edge = [(s, token, target) for target, d in distance.items() if d == level for s, token in into.get(target, ())]
        edge = [one for one in edge if one[0] not in distance]
        for source, token, target in edge:
            distance[source], onward[source] = level + 1, (token, target)
    expected = [distance.get(state, np.inf) for state in range(len(language.distance))]
    assert language.distance.tolist() == expected
    for state in distance:  # and from there the text can be finished in so many tokens
        tokens, at = [], state
        while not language.accepting[at]:
            token, at = onward[at]
            tokens.append(token)
        assert len(tokens) == language.distance[state]
        assert language.accepting[language.state_after(tokens, state)]
    assert np.isinf(language.distance[-1])
    assert np.isfinite(language.distance[0])


def test_the_shortest_text_is_spelt_with_long_tokens(tokenizer, spelling):
    text = '{"name": "'
    least = len(tokenizer.encode(text, add_special_tokens=False))
    assert language_of(re.escape(text), spelling).distance[0] <= least < len(text)
    assert language_of("", spelling).distance[0] == 0
    assert language_of("日", spelling).distance[0] == 3  # bytes


def test_states_after_tokens(tokenizer, spelling):
    language = language_of("(?:ab)*c?", spelling)
    tokens = tokenizer.encode("ababc", add_special_tokens=False)
    assert language.accepting[language.state_after(tokens)]
    assert language.state_after(tokens[1:], language.state_after(tokens[:1])) == language.state_after(tokens)
    assert language.state_after([*tokens, *tokens]) == len(language.distance) - 1  # dead
    assert language.state_after([]) == 0


def test_what_cannot_be_spelt_is_refused():
    assert refusal(OptionError, Language, python_regex_to_plain("z+"), SMALL) == (
        "The constraint has no text that this tokenizer can spell; change it."
    )
    assert refusal(OptionError, Language, python_regex_to_plain("az|é"), SMALL, "The regex 'az|é'") == (
        "The regex 'az|é' has no text that this tokenizer can spell; change it."
    )
    assert language_of("z|a").distance[0] == 1


def test_characters_without_a_token_are_spelt_in_bytes():
    """Behind free text too, where nothing leads from a narrow state into them."""
    pieces = Pieces("<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "é", special=1)
    spelling = TokenBytes(pieces, 258)
    assert Language(python_regex_to_plain("é"), spelling).distance[0] == 1
    assert Language(python_regex_to_plain("日é"), spelling).distance[0] == 4
    assert 1 <= Language(python_regex_to_plain("[^x]*é"), spelling).distance[0] <= 2


# The best text of a canvas against all canvases.


def marginals(language, log_p, likely=None):
    """What a canvas with these log-probabilities [C, V] gives; `likely` [C, K], every token without."""
    if likely is None:
        likely = np.tile(np.arange(log_p.shape[1])[::-1], (len(log_p), 1))
    best = log_p.argmax(axis=1).astype(np.int32)
    return Marginals(
        likely,
        np.take_along_axis(log_p, likely, axis=1),
        best,
        log_p.max(axis=1),
        log_p[:, language.always_scored_tokens],
        log_p[:, list(ENDS)],
        log_p[:, list(MARKS)],
    )


def random_log_p(random, length, spread=1.5):
    values = random.normal(size=(length, len(PIECES))) * spread
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)


@lru_cache(maxsize=8)
def every_canvas(length):
    return np.array(list(product(range(len(PIECES)), repeat=length)))


def is_allowed(pattern, canvas, left, before):
    """Whether a canvas goes on with a text, read token by token.

    `before`: the text so far, or FRESH or THINKING.
    """
    language, rest, offset = language_of(pattern), list(canvas), 0
    if before == THINKING or (before == FRESH and rest[0] == OPEN):
        inner = rest[before == FRESH :]
        first = next((i for i, token in enumerate(inner) if token in (*ENDS, *MARKS)), None)
        if first is None:  # then the mark, a text and its end come later
            return left - len(rest) >= 1 + language.distance[0] + 1
        if inner[first] != CLOSE:
            return False
        rest = inner[first + 1 :]
        offset = len(canvas) - len(rest)
    said = "" if before in (FRESH, THINKING) else before
    for i, token in enumerate(rest):
        if token in ENDS:
            return offset + i < left and re.fullmatch(pattern, said.replace("▁", " ")) is not None
        if token < A:
            return False
        said += PIECES[token]
    return language.distance[state_of(pattern, said)] + 1 <= left - len(canvas)


@lru_cache(maxsize=128)
def all_allowed(pattern, length, left, before):
    """[N, C] canvases."""
    canvases = every_canvas(length)
    return canvases[[is_allowed(pattern, canvas, left, before) for canvas in canvases.tolist()]]


def score_of(log_p, canvases):
    return log_p[np.arange(len(log_p)), canvases].sum(axis=-1)


def state_of(pattern, before):
    if before in (FRESH, THINKING):
        return before
    language, state = language_of(pattern), 0
    for byte in before.replace("▁", " ").encode():
        state = int(language.table[state, byte])
    return state


def check(pattern, length, left, before, seeds, marks=()):
    language, allowed = language_of(pattern), all_allowed(pattern, length, left, before)
    for seed in seeds:
        log_p = random_log_p(np.random.default_rng(seed), length)
        got = best_text(language, marginals(language, log_p), state_of(pattern, before), ENDS, left, marks)
        assert got.shape == (length,)
        assert got.dtype == np.int32
        assert (allowed == got).all(axis=1).any(), (seed, got)
        assert score_of(log_p, got[None])[0] == pytest.approx(score_of(log_p, allowed).max(), abs=1e-9), (seed, got)


SMALL_PATTERNS = ["a|ab", "(?:ab)*", "a*b", "[ab ]{2,}", "", "(?:a|b)c ?a*", "ab ab", "[^a]*"]


@pytest.mark.parametrize("pattern", SMALL_PATTERNS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_best_text_is_the_best_of_all_canvases(pattern, length):
    least = int(language_of(pattern).distance[0]) + 1
    for left in sorted({max(least, length + more) for more in (-2, -1, 0, 1, 2, 3, 100)}):
        check(pattern, length, left, "", range(12))


@pytest.mark.parametrize("pattern", ["a|ab", "a*b", "(?:a|b)c ?a*", "[^a]*"])
def test_the_best_text_of_a_longer_canvas(pattern):
    for left in (4, 100):
        check(pattern, 4, left, "", range(30))


@pytest.mark.parametrize(
    ("pattern", "before"), [("ab ab", "ab"), ("(?:ab)*", "a"), ("a*b", "aa"), ("(?:a|b)c ?a*", "bc▁")]
)
def test_a_text_goes_on_where_it_stands(pattern, before):
    least = int(language_of(pattern).distance[state_of(pattern, before)]) + 1
    for left in {least, 3, 4, 6, 100}:
        check(pattern, 3, max(left, least), before, range(25))


@pytest.mark.parametrize("pattern", ["a|ab", "a*", "", "ab ab"])
@pytest.mark.parametrize("before", [FRESH, THINKING])
def test_a_thought_may_come_first(pattern, before):
    least = int(language_of(pattern).distance[0]) + 1 + (before == THINKING)
    for left in sorted({least, max(least, 3), 4, 5, 6, 7, 100}):
        check(pattern, 3, max(left, least), before, range(20), MARKS)


def test_thoughts_are_chosen_and_left_out_and_closed():
    """Otherwise the test before would not reach them."""
    found = set()
    for seed in range(60):
        language = language_of("a|ab")
        seen = marginals(language, random_log_p(np.random.default_rng(seed), 3))
        first, *rest = best_text(language, seen, FRESH, ENDS, 100, MARKS).tolist()
        found.add((first == OPEN, CLOSE in rest))
        without = best_text(language, seen, 0, ENDS, 100)
        assert first == OPEN or [first, *rest] == without.tolist()
    assert found == {(True, True), (True, False), (False, True), (False, False)}  # behind an end anything may stand


@pytest.mark.parametrize("pattern", ["a|ab", "[ab ]{2,}", "a*b"])
@pytest.mark.parametrize("before", ["", FRESH])
def test_likely_tokens_and_anchors_are_looked_at(pattern, before):
    """With few likely tokens the best canvas is that of these and of the anchors."""
    language = language_of(pattern)
    allowed, marks = all_allowed(pattern, 3, 100, before), MARKS if before == FRESH else ()
    for seed in range(30):
        random = np.random.default_rng(seed)
        log_p = random_log_p(random, 3)
        likely = np.argsort(-log_p, axis=1)[:, :2]
        offered = np.zeros(log_p.shape, bool)
        np.put_along_axis(offered, likely, True, axis=1)
        reached = offered.copy()
        reached[:, language.always_scored_tokens] = True

        def can_be(canvas, log_p=log_p, offered=offered, reached=reached):
            inside, at = False, 0
            for at, token in enumerate(canvas):
                if marks and token == OPEN and at == 0:
                    inside = True
                elif inside and token == CLOSE:
                    inside = False
                elif token in ENDS:
                    break
                elif not (offered if inside else reached)[at, token]:
                    return False
            behind = canvas[at + 1 :]
            return behind == log_p.argmax(axis=1)[at + 1 :].tolist()

        mine = allowed[[can_be(canvas) for canvas in allowed.tolist()]]
        seen = marginals(language, log_p, likely)
        got = best_text(language, seen, state_of(pattern, before), ENDS, 100, marks)
        assert (mine == got).all(axis=1).any()
        assert score_of(log_p, got[None])[0] == pytest.approx(score_of(log_p, mine).max(), abs=1e-9)


def test_faint_tokens_are_anchors_or_not_looked_at():
    """Of two texts the one without a token below the bound, unless nothing else is allowed."""
    language = language_of("[^a]*|ab ab")
    assert C_BLANK not in language.always_scored_tokens.tolist()
    for p, expected in ((1.1e-5, C_BLANK), (0.9e-5, B)):
        values = np.full((2, len(PIECES)), 1e-9)
        values[0, [C_BLANK, B]], values[1, END] = (p, 1e-7), 1
        assert best_text(language, marginals(language, np.log(values)), 0, ENDS, 9)[0] == expected
    values = np.full((5, len(PIECES)), 1e-12)
    values[:, PAD], values[:, B] = 1, 1e-13
    narrow = language_of("ab ab")
    assert best_text(narrow, marginals(narrow, np.log(values)), 0, ENDS, 9)[:3].tolist() == [AB, BLANK, AB]


@pytest.mark.parametrize("pattern", ["a{5}|b{6,9}", "(?:ab ){2}", "[ab]*b c ", "(?:a|b)c (?:a| )*"])
def test_states_are_carried_over_canvases(pattern):
    """Whatever the room, what came of all canvases is a text; with an end where it is due."""
    language, over = language_of(pattern), set()
    least = int(language.distance[0]) + 1
    for seed in range(60):
        random = np.random.default_rng(seed)
        left = random.integers(least, least + 6)
        control, said = Constrained(language, ENDS), []
        while True:
            log_p = random_log_p(random, 3)
            guide = control.guide(left - len(said))
            asked = log_p[:, np.array(guide.tokens)]
            seen = marginals(language, log_p)
            reading = {
                "likely": seen.likely,
                "log_p": seen.likely_log_p,
                "best": seen.argmax,
                "top": seen.argmax_log_p,
                "asked": asked,
            }
            tokens = guide.choose(0, reading).tolist()
            ends = [i for i, token in enumerate(tokens) if token in ENDS]
            if ends:
                said += tokens[: ends[0]]
                break
            said += tokens
            control.commit(tokens)
        over.add(len(said) // 3)
        assert len(said) < left
        assert re.fullmatch(pattern, SMALL.to_bytes(said).decode())
    assert len(over) > 1


def test_thoughts_are_carried_over_canvases():
    language, over = language_of("a|ab"), set()
    for seed in range(60):
        random = np.random.default_rng(seed)
        left = random.integers(2, 14)
        control, said = Constrained(language, ENDS, MARKS), []
        while not set(said) & set(ENDS):
            log_p = random_log_p(random, 3)
            log_p[:, CLOSE] -= 1
            guide = control.guide(left - len(said))
            seen = marginals(language, log_p)
            asked = log_p[:, np.array(guide.tokens)]
            reading = {
                "likely": seen.likely,
                "log_p": seen.likely_log_p,
                "best": seen.argmax,
                "top": seen.argmax_log_p,
                "asked": asked,
            }
            tokens = guide.choose(0, reading).tolist()
            said += tokens
            control.commit(tokens)
        said = said[: next(i for i, token in enumerate(said) if token in ENDS)]
        assert len(said) < left
        if said[0] == OPEN:
            close = said.index(CLOSE)
            assert OPEN not in said[1:close]
            over.add(close // 3)
            said = said[close + 1 :]
        assert SMALL.to_bytes(said) in (b"a", b"ab")
        assert OPEN not in said
    assert {0, 1, 2} <= over


# Texts that take all of a window.


@pytest.mark.parametrize("pattern", SMALL_PATTERNS)
@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 4), (2, 3)])
@pytest.mark.parametrize("room", [0, 1, 4])
def test_exact_texts_are_the_best_of_all(pattern, start, stop, room):
    language = language_of(pattern)
    for before in ("", "a"):
        state = state_of(pattern, before)
        texts = [
            tokens
            for tokens in product(range(A, len(PIECES)), repeat=stop - start)
            if language.distance[language.state_after(tokens, state)] <= room
        ]
        if room == 0:
            spelt = [(before + SMALL.to_bytes(tokens).decode()) for tokens in texts]
            assert all(re.fullmatch(pattern, text) for text in spelt)
        for seed in range(6):
            log_p = random_log_p(np.random.default_rng(seed), 5)
            got, score = exact_text(language, marginals(language, log_p), start, stop, state, room)
            assert got.shape == (stop - start,)
            if not texts:
                assert score == -np.inf
                assert got.tolist() == log_p.argmax(axis=1)[start:stop].tolist()
                continue
            scores = log_p[np.arange(start, stop), np.array(texts, int).reshape(len(texts), -1)].sum(axis=1)
            assert score == pytest.approx(scores.max(), abs=1e-9)
            assert scores[texts.index(tuple(got.tolist()))] == pytest.approx(score, abs=1e-9)


def test_exact_texts_cover_both_cases():
    for pattern, found in (("a|ab", True), ("ab ab", True), ("", False)):
        log_p = random_log_p(np.random.default_rng(0), 3)
        stop = 3 if pattern == "ab ab" else 1
        language = language_of(pattern)
        assert np.isfinite(exact_text(language, marginals(language, log_p), 0, stop)[1]) == found


# What asks for nothing.


@pytest.mark.parametrize(
    ("pattern", "covers"),
    [
        (".*", True),
        ("(?s).*", True),
        (r"[^\n]*", True),
        (r"[^\n]*\n?", True),
        (".*|x", True),
        ("(?:.|ab)*", True),
        (".{0,3}.*", True),
        (r"[\s\S]*", True),
        ("x.*", False),
        (".+", False),
        (".*x", False),
        (".{0,9}", False),
        ("[^é]*", False),
        ("[^\U0001f600]*", False),
        (r"(?a)[\x00-\x7f]*", False),
        ("", False),
        (r"\w*", False),
    ],
)
def test_languages_of_every_line(pattern, covers, spelling):
    assert accepts_every_line(language_of(pattern, spelling)) is covers


# Forgetting.


@pytest.mark.parametrize("known", [0, 1, 3, 7])
def test_what_is_forgotten_is_learned_again(monkeypatch, known):
    expected, got = [], []
    for results, limit in ((expected, language_module.MAX_CACHED_TOKENS), (got, known)):
        monkeypatch.setattr(language_module, "MAX_CACHED_TOKENS", limit)
        language = Language(python_regex_to_plain("[ab ]{2,}|(?:a|b)c ?a*"), SMALL)
        for seed in range(40):
            random = np.random.default_rng(seed)
            log_p = random_log_p(random, 4)
            likely = np.argsort(random.random(log_p.shape), axis=1)[:, :3]
            seen = marginals(language, log_p, likely)
            results.append(best_text(language, seen, 0, ENDS, 9).tolist())
            tokens, score = exact_text(language, seen, 1, 4)
            results.append((tokens.tolist(), score))
    assert got == expected
