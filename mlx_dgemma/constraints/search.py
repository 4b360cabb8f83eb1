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
    """Log-probabilities of a row's positions, and tokens: `likely` and `log_p` [C, K], `best` and `top` [C]."""

    likely: np.ndarray
    log_p: np.ndarray
    best: np.ndarray  # the most probable token
    top: np.ndarray  # its log-probability
    anchors: np.ndarray  # [C, S], of the language's anchors
    ends: np.ndarray  # [C, E], of the end tokens
    marks: np.ndarray  # [C, 2] or [C, 0], of the tokens that open and close thinking


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
    length, count = len(seen.best), len(language.distance)
    scores = np.full((length + 1, count), -np.inf)
    thought = np.full(length + 1, -np.inf)  # of still being in a thought
    closed = np.zeros(length + 1, bool)  # whether state 0 is reached best by closing a thought
    if state != THINKING:
        scores[0, max(state, 0)] = 0.0
    if state == THINKING:
        thought[0] = 0.0
    within = np.where(np.isin(seen.likely, [*ends, *marks]), -np.inf, seen.log_p) if len(marks) else seen.log_p
    likely = list(language._likely_ways(seen.likely, seen.log_p))
    for i, (source, target, log_p, _) in enumerate(likely):
        language.advance(scores[i], scores[i + 1], seen.anchors[i])
        np.maximum.at(scores[i + 1], target, scores[i][source] + log_p)
        if len(marks):
            thought[i + 1] = thought[i] + within[i].max()
            if i == 0 and state == FRESH:
                thought[1] = seen.marks[0, 0]
            if (over := thought[i] + seen.marks[i, 1]) > scores[i + 1, 0]:
                scores[i + 1, 0], closed[i + 1] = over, True
    stop, at = _where_to_stop(language, seen, scores, thought[length], left)
    tokens = seen.best.copy()
    if stop < length:
        tokens[stop] = ends[int(seen.ends[stop].argmax())]
    for i in range(stop - 1, -1, -1):
        if at == THINKING:
            tokens[i] = marks[0] if i == 0 and state == FRESH else seen.likely[i, within[i].argmax()]
        elif at == 0 and closed[i + 1]:
            tokens[i], at = marks[1], THINKING
        else:
            tokens[i], at = language.step_back(scores[i], seen.anchors[i], likely[i], at)
    return tokens


def _where_to_stop(
    language: Language, seen: Marginals, scores: np.ndarray, thought: float, left: int
) -> tuple[int, int]:
    """(position of the end token, or the canvas's length where the text goes on; the state before it)."""
    length = len(seen.best)
    rest = np.concatenate([np.cumsum(seen.top[::-1])[::-1], [0.0]])  # of all positions from here on
    accepted = np.where(language.accepting, scores[:-1], -np.inf)
    ended = accepted.max(axis=1) + seen.ends.max(axis=1) + rest[1:]
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
    likely = list(language._likely_ways(seen.likely[start:stop], seen.log_p[start:stop]))
    for i, (source, target, log_p, _) in enumerate(likely):
        language.advance(scores[i], scores[i + 1], seen.anchors[start + i])
        np.maximum.at(scores[i + 1], target, scores[i][source] + log_p)
    final = np.where(language.distance <= room, scores[-1], -np.inf)
    at = int(final.argmax())
    tokens, score = seen.best[start:stop].copy(), float(final[at])
    if np.isfinite(score):
        for i in range(stop - start - 1, -1, -1):
            tokens[i], at = language.step_back(scores[i], seen.anchors[start + i], likely[i], at)
    return tokens, score
