"""The search beside its slow oracle: the same tokens, of equals the same one, in long canvases of random automata."""

import random

import numpy as np
import pytest
from naive_search import Naive
from pieces import ENDS, PIECES, SMALL, THOUGHT, Pieces, language_of
from test_fuzz import random_pattern

from mlx_dgemma.constraints import lattice, search
from mlx_dgemma.constraints.language import Language
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.constraints.search import FRESH, THINKING, Marginals, best_text, exact_text
from mlx_dgemma.constraints.tokens import TokenBytes
from mlx_dgemma.errors import OptionError

LONG_FIRST = Pieces(*PIECES[:5], "aab", "ab1", "bb", "ab", "ba", "é", "b", "a", "1", "A", "▁", special=5)

FORM = r'\{"name": "[^"\n]{0,40}", "age": (?:\d|[1-9]\d), "tags": \[(?:"[^"\n]*"(?:, "[^"\n]*"){0,3})?\]\}'


def canvas(language, draws, length, vocab, ends, thought, ties, kind, count=4):
    """Random numbers of a canvas; with `ties` few different ones."""

    def log_p(*shape):
        values = draws.normal(size=shape) * 2 - 4
        return (np.round(values / 2) * 2 if ties else values).astype(kind)

    likely = draws.integers(0, vocab, (length, count))
    always, last = log_p(length, len(language.always_scored_tokens)), log_p(length, len(ends)) - 4 * draws.integers(2)
    marks = log_p(length, len(thought))
    return Marginals(likely, log_p(length, count), likely[:, 0].astype(np.int32), log_p(length), always, last, marks)


def same(language, draws, length, vocab, ends, thought=(), kind=np.float64):
    """Compare with the oracle, with and without ties, from any state; returns the texts."""
    naive, texts = Naive(language), []
    states = np.flatnonzero(np.isfinite(language.distance))
    for ties in (False, True, True):
        state = int(draws.choice([FRESH, THINKING, 0] if thought else states))
        begun = max(state, 0)
        room = int(language.distance[begun]) + 2 + int(draws.choice([0, 1, length, 3 * length]))
        seen = canvas(language, draws, length, vocab, ends, thought, ties, kind)
        got = best_text(language, seen, state, ends, room, thought)
        assert got.tolist() == naive.best_text(seen, state, ends, room, thought).tolist()
        start, stop = sorted(draws.integers(0, length + 1, 2))
        tokens, score = exact_text(language, seen, start, stop, begun, int(room > length))
        expected, most = naive.exact_text(seen, start, stop, begun, int(room > length))
        assert (tokens.tolist(), score) == (expected.tolist(), most)
        texts.append(got)
    return texts


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_random_automata_have_the_texts_of_the_oracle(kind):
    source, draws, found = random.Random(3), np.random.default_rng(3), 0
    long_first = TokenBytes(LONG_FIRST, len(LONG_FIRST.pieces))
    while found < 40:
        token_bytes = (SMALL, long_first)[found % 2]
        try:
            language = language_of(random_pattern(source), token_bytes)
        except OptionError:
            continue
        length, thought = int(draws.choice([1, 5, 20])), THOUGHT if found % 3 == 0 else ()
        same(language, draws, length, len(token_bytes.length), ENDS, thought, kind)
        found += 1


@pytest.mark.parametrize("thought", [(), (1, 2)])
def test_a_form_of_many_states_has_the_texts_of_the_oracle(thought, token_bytes):
    language, draws = language_of(FORM, token_bytes), np.random.default_rng(0)
    assert len(language.distance) > 80
    length = lattice.BLOCK + 9
    for kind in (np.float32, np.float64):
        texts = same(language, draws, length, len(token_bytes.length), (3,), thought, kind)
        assert len({text.tobytes() for text in texts}) == len(texts)


def test_positions_behind_a_text_that_has_ended_are_not_searched(monkeypatch):
    """And those before its end are: the bound is one of every text that goes on."""
    seen, extend = [], lattice.Lattice.extend
    monkeypatch.setattr(lattice.Lattice, "extend", lambda self, i: (seen.append(i), extend(self, i)))
    language, draws = Language(python_regex_to_plain("[ab ]+"), SMALL), np.random.default_rng(1)
    length, naive, counts = 6 * search.LOOK, Naive(language), set()
    for end in (0, 3, search.LOOK, 2 * search.LOOK + 1, length - 1):
        marginals = canvas(language, draws, length, len(PIECES), ENDS, (), False, np.float32)
        marginals.argmax_log_p[:] = -1e-3
        marginals.always_scored_log_p[:end] = marginals.end_log_p[end] = -1e-3
        marginals.always_scored_log_p[end:] -= 9
        marginals.likely_log_p[end:] -= 9
        seen.clear()
        got = best_text(language, marginals, 0, ENDS, 2 * length)
        assert got.tolist() == naive.best_text(marginals, 0, ENDS, 2 * length).tolist()
        assert seen == list(range(len(seen)))
        assert len(seen) > end - 1
        counts.add(len(seen))
    assert len(counts) > 2
    assert min(counts) < length // 2
