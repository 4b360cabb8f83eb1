"""Regular languages over the canvas: the most probable text of a language, given every position's distribution.

A denoiser's positions are independent given the canvas, so the best string of a language is found by dynamic
programming over positions and automaton states (DINGO, arXiv 2505.23061). The automaton reads bytes; tokens walk
through it. Only tokens that matter are looked at: the likely ones of each position, and for every state the tokens
that a narrow way through the language is spelt with, so that there is always a way to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .language import Language


@dataclass(frozen=True)
class Marginals:
    """What one row's canvas gives a guide.

    C is the canvas's length, K the number of likely tokens of a position.
    """

    likely: np.ndarray
    likely_log_p: np.ndarray
    argmax: np.ndarray  # the most probable token
    argmax_log_p: np.ndarray  # its log-probability
    always_scored_log_p: np.ndarray  # [C, S], of the language's anchors
    end_log_p: np.ndarray  # [C, E], of the end tokens
    thought_log_p: np.ndarray  # [C, 2] or [C, 0], of the tokens that open and close thinking


FRESH, THINKING = -2, -1  # states before the language: nothing written yet, and in the middle of a thought


def best_text(
    language: Language, seen: Marginals, state: int, ends: Sequence[int], left: int, marks: Sequence[int] = ()
) -> np.ndarray:
    """The most probable canvas that begins with, or goes on with, a text of the language and its end token.

    Args:
        language: what the text must be in.
        seen: the positions that it has.
        state: where it stands before the first of them; `FRESH` and `THINKING` where a thought may come first.
        ends: tokens one of which ends the text; behind it every position takes its best token.
        left: tokens that the text has room for, its end token included.
        marks: the tokens that open and close a thought.

    Returns:
        [C] int32 tokens.
    """
    length, count = len(seen.argmax), len(language.distance)
    scores = np.full((length + 1, count), -np.inf)
    thought = np.full(length + 1, -np.inf)  # of still being in a thought
    closed = np.zeros(length + 1, bool)  # whether state 0 is reached best by closing a thought
    if state != THINKING:
        scores[0, max(state, 0)] = 0.0
    if state == THINKING:
        thought[0] = 0.0
    within = (
        np.where(np.isin(seen.likely, [*ends, *marks]), -np.inf, seen.likely_log_p) if len(marks) else seen.likely_log_p
    )
    likely = list(language.likely_transitions(seen.likely, seen.likely_log_p))
    for i, (source, target, log_p, _) in enumerate(likely):
        language.extend_scores(scores[i], scores[i + 1], seen.always_scored_log_p[i])
        np.maximum.at(scores[i + 1], target, scores[i][source] + log_p)
        if len(marks):
            thought[i + 1] = thought[i] + within[i].max()
            if i == 0 and state == FRESH:
                thought[1] = seen.thought_log_p[0, 0]
            if (over := thought[i] + seen.thought_log_p[i, 1]) > scores[i + 1, 0]:
                scores[i + 1, 0], closed[i + 1] = over, True
    stop, at = _where_to_stop(language, seen, scores, thought[length], left)
    tokens = seen.argmax.copy()
    if stop < length:
        tokens[stop] = ends[int(seen.end_log_p[stop].argmax())]
    for i in range(stop - 1, -1, -1):
        if at == THINKING:
            tokens[i] = marks[0] if i == 0 and state == FRESH else seen.likely[i, within[i].argmax()]
        elif at == 0 and closed[i + 1]:
            tokens[i], at = marks[1], THINKING
        else:
            tokens[i], at = language.backtrack(scores[i], seen.always_scored_log_p[i], likely[i], at)
    return tokens


def _where_to_stop(
    language: Language, seen: Marginals, scores: np.ndarray, thought: float, left: int
) -> tuple[int, int]:
    """(position of the end token, or the canvas's length where the text goes on; the state before it)."""
    length = len(seen.argmax)
    rest = np.concatenate([np.cumsum(seen.argmax_log_p[::-1])[::-1], [0.0]])  # of all positions from here on
    accepted = np.where(language.accepting, scores[:-1], -np.inf)
    ended = accepted.max(axis=1) + seen.end_log_p.max(axis=1) + rest[1:]
    ended = np.where(np.arange(length) < left, ended, -np.inf)
    going = np.where(language.distance + 1 <= left - length, scores[length], -np.inf)
    if left - length <= language.distance[0] + 1:
        thought = -np.inf
    if ended.max() >= max(going.max(), thought):
        stop = int(ended.argmax())
        return stop, int(accepted[stop].argmax())
    return length, int(going.argmax()) if going.max() >= thought else THINKING


def exact_text(
    language: Language, seen: Marginals, start: int, stop: int, state: int = 0, room: int = 0
) -> tuple[np.ndarray, float]:
    """The most probable text that takes the positions from `start` to `stop`, and its score.

    Args:
        language: what the text is in.
        seen: the canvas.
        start, stop: the text's positions.
        state: where it stands before the first of them.
        room: tokens that it has afterwards, in canvases to come; without any it ends with these positions.

    Returns:
        [stop - start] int32 tokens and their log-probability; minus infinity where there is none.
    """
    scores = np.full((stop - start + 1, len(language.distance)), -np.inf)
    scores[0, state] = 0.0
    likely = list(language.likely_transitions(seen.likely[start:stop], seen.likely_log_p[start:stop]))
    for i, (source, target, log_p, _) in enumerate(likely):
        language.extend_scores(scores[i], scores[i + 1], seen.always_scored_log_p[start + i])
        np.maximum.at(scores[i + 1], target, scores[i][source] + log_p)
    final = np.where(language.distance <= room, scores[-1], -np.inf)
    at = int(final.argmax())
    tokens, score = seen.argmax[start:stop].copy(), float(final[at])
    if np.isfinite(score):
        for i in range(stop - start - 1, -1, -1):
            tokens[i], at = language.backtrack(scores[i], seen.always_scored_log_p[start + i], likely[i], at)
    return tokens, score
