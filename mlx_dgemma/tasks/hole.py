"""`Hole`: canvases whose text is fixed around a hole.

How many tokens a hole takes is not known, so likely lengths are tried in one denoising step each, several in a batch.
Where the length is right, what follows the hole is what the model expects there.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..constraints.language import Language
from ..constraints.search import Marginals, exact_text
from ..decoding.control import Control, Layout, fitting_size
from ..decoding.events import ScoredToken, scored
from ..decoding.lookahead import denoise_block
from ..decoding.options import GenerationOptions
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from .constrained import LanguageGuide

TOGETHER = 8  # lengths tried in one pass
CERTAIN, APART = -1.0, 5.0  # nats: a length is taken that is this likely and so far ahead of every other
IN_VIEW = 16  # tokens behind the hole by which lengths are compared


class Hole(Control):
    """Canvases around a hole: one row, or several that differ in the hole's length while that is looked for.

    Args:
        language: of the hole.
        before: tokens on the canvas before it.
        behind: tokens behind it, the end token among them.
        lengths: that the hole may have, tokens.
        canvas_length: of the model.
        otherwise: the length that is taken where none of these has a text; None: one of them always has.

    Attributes:
        found: the hole's tokens so far, each with its log-probability.
        score: log-probability of each row's hole and of up to `IN_VIEW` tokens behind it, in the last step.
    """

    def __init__(
        self,
        language: Language,
        before: Sequence[int],
        behind: Sequence[int],
        lengths: Sequence[int],
        canvas_length: int,
        otherwise: int | None = None,
    ):
        self._language, self._before, self._behind = language, list(before), list(behind)
        self._lengths, self._canvas, self._otherwise = list(lengths), canvas_length, otherwise
        self._asked = sorted(set(self._behind[:IN_VIEW]))
        self._begin, self._state = 0, 0  # of the canvas: its first position, and where the hole's text stands
        self.found: list[ScoredToken] = []
        self.score = [float("-inf")] * len(self._lengths)
        self._kept: dict[int, np.ndarray] = {}  # the last text of each row on this canvas

    @property
    def full(self) -> bool:
        """Whether the hole is filled."""
        return len(self.found) == self._lengths[0]

    @property
    def spelt(self) -> bool:
        """Whether it begins and ends as it must."""
        return bool(self._language.accepting[self._state])

    def prepare(self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array) -> int:
        """Choose the length at which hole and surroundings are most probable after a single denoising step."""
        unknown = len(self._lengths) > 1 or self._otherwise is not None
        positions = self._choose_length(model, prefix, options, key) if unknown else 0
        begin, canvases = 0, 1
        while begin + (size := self._size(begin)) < len(self._before) + self._lengths[0]:
            begin, canvases = begin + size, canvases + 1
        if canvases > 1:
            warnings.warn(
                f"The hole of {self._lengths[0]} tokens takes {canvases} canvases of {self._canvas}; only the last one "
                "sees what stands behind it.",
                stacklevel=2,
            )
        return positions

    def _choose_length(self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array) -> int:
        """Try lengths, several in a pass, until one is certain; returns the positions that were denoised."""
        scores: dict[int, float] = {}
        texts: dict[int, np.ndarray] = {}
        once, positions = options.override(max_denoising_steps=1), 0
        for start in range(0, len(self._lengths), TOGETHER):
            group = self._lengths[start : start + TOGETHER]
            tried = Hole(self._language, self._before, self._behind, group, self._canvas)
            if prefix.batch_size != len(group):
                prefix.select_rows([0] * len(group))
            keys, layout = mx.stack([key] * len(group)), tried.layout()
            for _ in denoise_block(model, prefix, once, keys, None, layout, tried.guide(0)):
                positions += layout.tokens.size
            scores.update(zip(group, tried.score))
            texts.update((group[row], text) for row, text in tried._kept.items())
            best, *others = sorted(scores.values(), reverse=True)
            if best > CERTAIN and best - max(others, default=-np.inf) > APART:
                break
        prefix.select_rows([0])
        best_length = max(scores, key=scores.__getitem__)
        none = self._otherwise is not None and scores[best_length] == -np.inf
        self._lengths = [self._otherwise if none and self._otherwise else best_length]
        if self._lengths[0] in texts:
            self._kept = {0: texts[self._lengths[0]]}
        return positions

    def layout(self) -> Layout:
        """Everything but the hole is fixed; a row for each length."""
        size = self._size(self._begin)
        rows = len(self._lengths)
        tokens, fixed = np.zeros((rows, size), np.int32), np.ones((rows, size), bool)
        for row, length in enumerate(self._lengths):
            stream = [*self._before, *[0] * length, *self._behind][self._begin : self._begin + size]
            tokens[row, : len(stream)] = stream
            fixed[row, slice(*self._window(row, size))] = False
        return Layout(mx.array(tokens), mx.array(fixed), mx.zeros(fixed.shape, mx.bool_))

    def guide(self, left: int) -> LanguageGuide:
        """The most probable text of the hole that fits."""

        def choose(row: int, seen: Marginals) -> np.ndarray:
            tokens, size = seen.argmax.copy(), len(seen.argmax)
            start, stop = self._window(row, size)
            room = self._lengths[row] - len(self.found) - (stop - start)  # in later canvases
            text, score = exact_text(self._language, seen, start, stop, self._state, room)
            if score > -np.inf:
                self._kept[row] = text
            elif row in self._kept and len(self._kept[row]) == stop - start:
                text = self._kept[row]  # it needed likely tokens that are no more
            tokens[start:stop] = text
            view = [self._asked.index(token) for token in self._behind[: min(IN_VIEW, size - stop)]]
            self.score[row] = score + float(seen.end_log_p[np.arange(stop, stop + len(view)), view].sum())
            return tokens

        return LanguageGuide(self._language.always_scored_tokens, self._asked, (), choose)

    def take(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Take the hole's part of a finished canvas."""
        start, stop = self._window(0, len(tokens))
        self.found += scored(tokens, log_probs)[start:stop]
        self._state = self._language.state_after(tokens[start:stop], self._state)
        self._begin += len(tokens)
        self._kept.clear()

    def _size(self, begin: int) -> int:
        """Positions of the canvas that begins there; the last one has a view of what stands behind the hole."""
        left, view = len(self._before) + max(self._lengths) - begin, min(len(self._behind), IN_VIEW)
        if left + view <= self._canvas or left > self._canvas:
            shown = view if len(self._lengths) > 1 else len(self._behind)  # lengths are compared on short canvases
            return fitting_size(left + shown, self._canvas)
        return self._canvas // 2

    def _window(self, row: int, size: int) -> tuple[int, int]:
        """The hole's part of a canvas."""
        start = max(len(self._before) - self._begin, 0)
        return start, min(len(self._before) + self._lengths[row] - self._begin, size)


def divide(before: Sequence[int], behind: int, longest: int, canvas_length: int) -> int:
    """How many tokens before the hole are encoded rather than fixed on the canvas.

    Canvases begin at multiples of their length, as the model learned it, unless the hole and what is in view behind
    it would not fit.
    """
    aligned = len(before) // canvas_length * canvas_length
    room = canvas_length - min(longest, canvas_length // 2) - min(behind, IN_VIEW)
    return max(aligned, len(before) - max(room, 0))
