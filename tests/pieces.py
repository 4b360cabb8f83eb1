"""A tokenizer of ten pieces, small languages over it, and random probabilities of its tokens."""

from functools import lru_cache

import numpy as np

from mlx_dgemma.constraints.language import Language
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.constraints.search import Marginals
from mlx_dgemma.constraints.tokens import TokenBytes

PIECES = ("<pad>", "<end>", "<stop>", "<open>", "<close>", "a", "b", "ab", "▁", "c▁")
PAD, END, STOP, OPEN, CLOSE, A, B, AB, BLANK, C_BLANK = range(10)
ENDS, THOUGHT = (END, STOP), (OPEN, CLOSE)


class Pieces:
    """A tokenizer that is its pieces."""

    def __init__(self, *pieces, special=0):
        self.pieces, self.all_special_ids = pieces, list(range(special))

    def get_vocab(self):
        return {piece: token for token, piece in enumerate(self.pieces)}

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


SMALL = TokenBytes(Pieces(*PIECES, special=5), len(PIECES))


@lru_cache(maxsize=64)
def language_of(pattern, token_bytes=SMALL):
    return Language(python_regex_to_plain(pattern), token_bytes)


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
        log_p[:, list(THOUGHT)],
    )


def random_log_p(random, length, spread=1.5):
    values = random.normal(size=(length, len(PIECES))) * spread
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)
