"""A constrained text over several canvases."""

import re

import numpy as np
import pytest
from pieces import CLOSE, ENDS, OPEN, SMALL, THOUGHT, language_of, marginals, random_log_p

from mlx_dgemma.tasks.constrained import Constrained


def chosen(guide, language, log_p):
    """The tokens that a guide chooses on a canvas with these log-probabilities [C, V]."""
    seen = marginals(language, log_p)
    told = {name: getattr(seen, name) for name in ("likely", "likely_log_p", "argmax", "argmax_log_p")}
    return guide.choose(0, {**told, "asked": log_p[:, np.array(guide.tokens)]}).tolist()


@pytest.mark.parametrize("pattern", ["a{5}|b{6,9}", "(?:ab ){2}", "[ab]*b c ", "(?:a|b)c (?:a| )*"])
def test_states_are_carried_over_canvases(pattern):
    """The canvases together are a text of the language, and its end comes within the room."""
    language, over = language_of(pattern), set()
    least = int(language.distance[0]) + 1
    for seed in range(60):
        random = np.random.default_rng(seed)
        left = random.integers(least, least + 6)
        control, said = Constrained(language, ENDS), []
        while True:
            log_p = random_log_p(random, 3)
            guide = control.guide(left - len(said))
            tokens = chosen(guide, language, log_p)
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
        control, said = Constrained(language, ENDS, THOUGHT), []
        while not set(said) & set(ENDS):
            log_p = random_log_p(random, 3)
            log_p[:, CLOSE] -= 1
            guide = control.guide(left - len(said))
            tokens = chosen(guide, language, log_p)
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
