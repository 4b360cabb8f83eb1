"""The most probable text of a regular language on a canvas.

Given the canvas, a denoiser's positions are independent, so the best text is found by dynamic programming over
positions and automaton states (DINGO, arXiv 2505.23061).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import LanguageError
from .language import Language
from .lattice import Lattice

LOOK = 16  # positions after which the search looks whether to go on
ROUNDING = 1e-6  # nats, far above the error of a sum of log-probabilities
FRESH, THINKING = -2, -1  # states before the language: nothing is written yet, and in the middle of a thought


@dataclass(frozen=True)
class Marginals:
    """What one row's positions say of tokens. C is the canvas's length; log-probabilities are float, in nats."""

    likely: np.ndarray  # [C, K] tokens
    likely_log_p: np.ndarray  # [C, K]
    argmax: np.ndarray  # [C] int32, the most probable token
    argmax_log_p: np.ndarray  # [C]
    always_scored_log_p: np.ndarray  # [C, S], of the language's `always_scored_tokens`
    end_log_p: np.ndarray  # [C, E], of the end tokens
    thought_log_p: np.ndarray  # [C, 2] or [C, 0], of the tokens that open and close a thought


def best_text(
    language: Language,
    marginals: Marginals,
    state: int,
    end_tokens: Sequence[int],
    room: int,
    thought_tokens: Sequence[int] = (),
) -> np.ndarray:
    """The most probable canvas that begins, or goes on with, a text of the language and its end token.

    Args:
        language: of the text.
        marginals: of the canvas.
        state: of the language before the canvas, or `FRESH` or `THINKING` if a thought may come before the text.
        end_tokens: one of them ends the text. Behind it every position has its argmax.
        room: tokens that are left for the text, its end token included, on this canvas and later ones.
        thought_tokens: those that open and close a thought; empty if there is none.

    Returns:
        [C] int32 tokens.
    """
    length, begun = len(marginals.argmax), None if state == THINKING else max(state, 0)
    thought = _Thought(language, marginals, state, end_tokens, thought_tokens) if thought_tokens else None
    entry = thought.closed if thought else None
    lattice = Lattice(language, marginals.always_scored_log_p, marginals.likely, marginals.likely_log_p, begun, entry)
    inside = thought.score if thought else np.full(length + 1, -np.inf)
    ends = _Ends(language, marginals, room)
    for i in range(length):
        if i % LOOK == 0 and ends.none_better(lattice.scores, inside, i):
            break
        lattice.extend(i)
    stop, at = ends.best(lattice.scores, inside[length])
    tokens = marginals.argmax.copy()
    if stop < length:
        tokens[stop] = end_tokens[int(marginals.end_log_p[stop].argmax())]
    if at == THINKING:
        begin = length + 1
    else:
        begin, text = lattice.trace(stop, at)
        tokens[begin:stop] = text
    if thought and begin > 0:
        tokens[: begin - 1] = thought.tokens[: begin - 1]
        tokens[begin - 1 : begin] = thought_tokens[1]
        if state == FRESH:
            tokens[0] = thought_tokens[0]
    return tokens


class _Thought:
    """The thought before a text.

    Attributes:
        tokens: [C] the token that goes on with the thought: the best likely one that is text.
        score: [C + 1] float64, of still being inside it before each position.
        closed: [C] float64, of closing it at each position.
    """

    def __init__(
        self,
        language: Language,
        marginals: Marginals,
        state: int,
        end_tokens: Sequence[int],
        thought_tokens: Sequence[int],
    ):
        # Behind the model's own end padding is the most probable, which would make the thought as long as the canvas.
        never_inside = np.isin(marginals.likely, [*end_tokens, *thought_tokens])
        never_inside |= language.token_bytes.length[marginals.likely] == 0
        inside = np.where(never_inside, -np.inf, marginals.likely_log_p)
        self.tokens = marginals.likely[np.arange(len(inside)), inside.argmax(axis=1)]
        steps = np.concatenate([[0.0 if state == THINKING else -np.inf], inside.max(axis=1)])
        if state == FRESH:
            steps[1] = marginals.thought_log_p[0, 0]
            self.score = np.concatenate([steps[:1], np.cumsum(steps[1:])])
        else:
            self.score = np.cumsum(steps)
        self.closed = self.score[:-1] + marginals.thought_log_p[:, 1]


class _Ends:
    """Where the text may end."""

    def __init__(self, language: Language, marginals: Marginals, room: int):
        self._language, self._room, length = language, room, len(marginals.argmax)
        self._column = language.scored_moves.column
        self._accepting = self._column[language.accepting]
        self._end_log_p = marginals.end_log_p.max(axis=1)
        # Of all positions from each one on.
        self._rest = np.concatenate([np.cumsum(marginals.argmax_log_p[::-1])[::-1], [0.0]])
        self._allowed = np.arange(length) < room
        parts = marginals.always_scored_log_p, marginals.likely_log_p, marginals.end_log_p, marginals.thought_log_p
        most = np.max([part.max(axis=1, initial=-np.inf) for part in parts], axis=0).astype(np.float64)
        self._most = np.cumsum(np.maximum(most, marginals.argmax_log_p)[::-1])[::-1]

    def none_better(self, scores: np.ndarray, inside: np.ndarray, i: int) -> bool:
        """Whether no text that takes position i can be as probable as one that ends before it."""
        ended = self._ended(scores[:i], slice(i)).max(initial=-np.inf)
        return bool(max(scores[i].max(), inside[i]) + self._most[i] < ended - ROUNDING)

    def best(self, scores: np.ndarray, thought_score: float) -> tuple[int, int]:
        """The position of the end token and the column of the state before it, where all is most probable.

        If the text goes on behind the canvas the position is the canvas's length.

        Args:
            scores: of the `Lattice`.
            thought_score: of being inside a thought behind the canvas, which is then the state.
        """
        length = len(scores) - 1
        ended = self._ended(scores[:length], slice(length))
        room_behind, distance = self._room - length, self._language.distance
        going_on = np.where(distance + 1 <= room_behind, scores[length, self._column], -np.inf)
        if room_behind <= distance[0] + 1:  # a thought needs one token more, which closes it
            thought_score = -np.inf
        if max(ended.max(), going_on.max(), thought_score) == -np.inf:
            raise LanguageError(f"No text of the constraint fits into {self._room} tokens; this is a fault, report it.")
        if ended.max() >= max(going_on.max(), thought_score):
            stop = int(ended.argmax())
            return stop, int(self._accepting[scores[stop, self._accepting].argmax()])
        return length, int(self._column[going_on.argmax()]) if going_on.max() >= thought_score else THINKING

    def _ended(self, scores: np.ndarray, at: slice) -> np.ndarray:
        """The score of the whole canvas where the text ends at each position."""
        ended = scores[:, self._accepting].max(axis=1) + self._end_log_p[at] + self._rest[1:][at]
        return np.where(self._allowed[at], ended, -np.inf)


def exact_text(
    language: Language, marginals: Marginals, start: int, stop: int, state: int = 0, room: int = 0
) -> tuple[np.ndarray, float]:
    """The most probable text that takes the positions from `start` to `stop`, and its score.

    Args:
        language: of the text.
        marginals: of the canvas.
        start: the text's first position.
        stop: the position behind its last.
        state: of the language before the first position.
        room: tokens that the text has on later canvases. With 0 it ends at `stop`.

    Returns:
        tokens: [stop - start] int32; the argmax of each position if there is no such text.
        score: their log-probability; minus infinity if there is no such text.
    """
    window, column = slice(start, stop), language.scored_moves.column
    likely, likely_log_p = marginals.likely[window], marginals.likely_log_p[window]
    lattice = Lattice(language, marginals.always_scored_log_p[window], likely, likely_log_p, state)
    for i in range(stop - start):
        lattice.extend(i)
    final = np.where(language.distance <= room, lattice.scores[-1, column], -np.inf)
    best = int(final.argmax())
    tokens, score, at = marginals.argmax[window].copy(), float(final[best]), int(column[best])
    if np.isfinite(score):
        _, tokens = lattice.trace(stop - start, at)
    return tokens, score
