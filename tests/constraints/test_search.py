"""The best text of a small canvas against all canvases."""

import re
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
from pieces import (
    AB,
    BLANK,
    C_BLANK,
    CLOSE,
    END,
    ENDS,
    OPEN,
    PAD,
    PIECES,
    SMALL,
    THOUGHT,
    A,
    B,
    language_of,
    marginals,
    random_log_p,
)

from mlx_dgemma.constraints.search import FRESH, THINKING, best_text, exact_text


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
        first = next((i for i, token in enumerate(inner) if token in (PAD, *ENDS, *THOUGHT)), None)
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
        check(pattern, 3, max(left, least), before, range(20), THOUGHT)


def test_thoughts_are_chosen_and_left_out_and_closed():
    """Otherwise the test before would not reach them."""
    found = set()
    for seed in range(60):
        language = language_of("a|ab")
        seen = marginals(language, random_log_p(np.random.default_rng(seed), 3))
        first, *rest = best_text(language, seen, FRESH, ENDS, 100, THOUGHT).tolist()
        found.add((first == OPEN, CLOSE in rest))
        without = best_text(language, seen, 0, ENDS, 100)
        assert first == OPEN or [first, *rest] == without.tolist()
    assert found == {(True, True), (True, False), (False, True), (False, False)}  # behind an end anything may stand


@pytest.mark.parametrize("pattern", ["a|ab", "[ab ]{2,}", "a*b"])
@pytest.mark.parametrize("before", ["", FRESH])
def test_likely_tokens_and_anchors_are_looked_at(pattern, before):
    """With few likely tokens the best canvas is that of these and of the anchors."""
    language = language_of(pattern)
    allowed, marks = all_allowed(pattern, 3, 100, before), THOUGHT if before == FRESH else ()
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
