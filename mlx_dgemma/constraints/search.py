"""The most probable text of a regular language on a canvas.

Given the canvas, a denoiser's positions are independent, so the best text is found by dynamic programming over
positions and automaton states (DINGO, arXiv 2505.23061). `scores[i]` holds, for each state, the log-probability of the
best tokens for the first i positions that lead to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .language import Language

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
    length = len(marginals.argmax)
    scores = np.full((length + 1, len(language.distance)), -np.inf)
    thought_score = np.full(length + 1, -np.inf)  # of still being inside the thought
    by_closing = np.zeros(length + 1, bool)  # whether the best way to state 0 closes the thought
    if state == THINKING:
        thought_score[0] = 0.0
    else:
        scores[0, max(state, 0)] = 0.0
    inside_log_p = marginals.likely_log_p
    if thought_tokens:
        never_inside = np.isin(marginals.likely, [*end_tokens, *thought_tokens])
        inside_log_p = np.where(never_inside, -np.inf, inside_log_p)
    likely = list(language.likely_transitions(marginals.likely, marginals.likely_log_p))
    for i in range(length):
        scores[i + 1] = language.extend_scores(scores[i], marginals.always_scored_log_p[i], likely[i])
        if thought_tokens:
            thought_score[i + 1] = thought_score[i] + inside_log_p[i].max()
            if i == 0 and state == FRESH:
                thought_score[1] = marginals.thought_log_p[0, 0]
            closed = thought_score[i] + marginals.thought_log_p[i, 1]
            if closed > scores[i + 1, 0]:
                scores[i + 1, 0], by_closing[i + 1] = closed, True
    stop, at = _where_to_stop(language, marginals, scores, thought_score[length], room)
    tokens = marginals.argmax.copy()
    if stop < length:
        tokens[stop] = end_tokens[int(marginals.end_log_p[stop].argmax())]
    for i in reversed(range(stop)):
        if at == THINKING and i == 0 and state == FRESH:
            tokens[i] = thought_tokens[0]
        elif at == THINKING:
            tokens[i] = marginals.likely[i, inside_log_p[i].argmax()]
        elif at == 0 and by_closing[i + 1]:
            tokens[i], at = thought_tokens[1], THINKING
        else:
            tokens[i], at = language.backtrack(scores[i], marginals.always_scored_log_p[i], likely[i], at)
    return tokens


def _where_to_stop(
    language: Language, marginals: Marginals, scores: np.ndarray, thought_score: float, room: int
) -> tuple[int, int]:
    """The position of the end token and the state before it, where the whole canvas is most probable.

    If the text goes on behind the canvas the position is the canvas's length.
    """
    length = len(marginals.argmax)
    rest = np.concatenate([np.cumsum(marginals.argmax_log_p[::-1])[::-1], [0.0]])  # of all positions from here on
    accepted = np.where(language.accepting, scores[:-1], -np.inf)
    ended = accepted.max(axis=1) + marginals.end_log_p.max(axis=1) + rest[1:]
    ended = np.where(np.arange(length) < room, ended, -np.inf)
    room_behind = room - length
    going_on = np.where(language.distance + 1 <= room_behind, scores[length], -np.inf)
    if room_behind <= language.distance[0] + 1:  # a thought needs one token more, which closes it
        thought_score = -np.inf
    if ended.max() >= max(going_on.max(), thought_score):
        stop = int(ended.argmax())
        return stop, int(accepted[stop].argmax())
    return length, int(going_on.argmax()) if going_on.max() >= thought_score else THINKING


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
    always_scored_log_p = marginals.always_scored_log_p[start:stop]
    scores = np.full((stop - start + 1, len(language.distance)), -np.inf)
    scores[0, state] = 0.0
    likely = list(language.likely_transitions(marginals.likely[start:stop], marginals.likely_log_p[start:stop]))
    for i in range(stop - start):
        scores[i + 1] = language.extend_scores(scores[i], always_scored_log_p[i], likely[i])
    final = np.where(language.distance <= room, scores[-1], -np.inf)
    at = int(final.argmax())
    tokens, score = marginals.argmax[start:stop].copy(), float(final[at])
    if np.isfinite(score):
        for i in reversed(range(stop - start)):
            tokens[i], at = language.backtrack(scores[i], always_scored_log_p[i], likely[i], at)
    return tokens, score
