"""`Hole`: canvases whose text is fixed around a hole.

How many tokens a hole takes is not known. One denoising step of a canvas that is free behind the text before the hole
says where the model expects what follows it. If it is sure, that is the length; else the likeliest lengths are tried in
one more step, a row each: where the length is right, what follows the hole is what the model expects there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..constraints.language import Language
from ..constraints.next_token import NextTokens
from ..constraints.search import Marginals, exact_text
from ..decoding.control import Control, Layout, fitting_size, rows_of
from ..decoding.events import ScoredToken, scored
from ..decoding.lookahead import denoise_block
from ..decoding.options import GenerationOptions
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from .constrained import LanguageGuide

TOGETHER = 8  # lengths compared in one pass
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
        ahead: write what lies before the last canvas token by token, the most probable ones.
        notes: takes a sentence on what is to be known of the text.

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
        notes: list[str] | None = None,
        ahead: bool = False,
    ):
        self._notes = [] if notes is None else notes
        self._language, self._before, self._behind = language, list(before), list(behind)
        self._lengths, self._canvas, self._otherwise = list(lengths), canvas_length, otherwise
        self._ahead = ahead
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

    def prepare(
        self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array
    ) -> Iterator[int]:
        """Choose the length at which hole and surroundings are most probable after a single denoising step."""
        if len(self._lengths) > 1 or self._otherwise is not None:
            yield from self._choose_length(model, prefix, options.override(max_denoising_steps=1), key)
        begin, canvases = 0, 1
        while begin + (size := self._size(begin)) < len(self._before) + self._lengths[0]:
            begin, canvases = begin + size, canvases + 1
        if canvases > 1 and self._ahead and self._before:
            yield from self._write_ahead(model, prefix, begin)
        elif canvases > 1:
            self._notes.append(
                f"The hole of {self._lengths[0]} tokens takes {canvases} canvases of {self._canvas}; only the last one "
                "sees what stands behind it."
            )
            warnings.warn(self._notes[-1], stacklevel=2)

    def _write_ahead(self, model: DiffusionGemma, prefix: Prefix, begin: int) -> Iterator[int]:
        """Write the hole up to the position where the last canvas begins, and extend the prefix by it."""
        words, count = NextTokens(self._language, ()), begin - len(self._before)
        new = self._before[:begin]
        for i in range(count + 1):
            hidden = model.encode_ahead(mx.array([new], mx.int32), [prefix])
            prefix.accept(len(new))
            if i < count:
                logits = model.logits(hidden[:, -1:])[0, 0]
                allowed = mx.array(words.allowed(self._state, self._lengths[0] - i + 1))
                token = mx.argmax(mx.where(allowed, logits, -mx.inf)).astype(mx.int32)
                log_prob = logits[token] - mx.logsumexp(logits)
                mx.async_eval(token, log_prob, prefix.state)
                new = [int(np.asarray(token))]
                self._state = words.after(self._state, new[0])
                self.found += scored(new, [float(np.asarray(log_prob))])
            yield 0
        self._begin = begin
        self._notes.append(f"The first {count} tokens of the hole were written token by token, the rest on one canvas.")

    def _choose_length(
        self, model: DiffusionGemma, prefix: Prefix, once: GenerationOptions, key: mx.array
    ) -> Iterator[int]:
        """Find the length, and the text at it if it was tried: the likeliest lengths first, several in a pass."""
        lengths, together = self._lengths, TOGETHER
        if len(lengths) > TOGETHER:
            expected, size = self._expected(model, prefix, once, key)
            yield size
            lengths = sorted(lengths, key=lambda length: -expected[length])
            if expected[lengths[0]] > CERTAIN and expected[lengths[0]] - expected[lengths[1]] > APART:
                if self._language.shortest_length == 0:  # any text fits
                    self._lengths = lengths[:1]
                    return
                together = 1
        while lengths:
            group, lengths, together = lengths[:together], lengths[together:], TOGETHER
            tried = Hole(self._language, self._before, self._behind, group, self._canvas)
            keys, layout = mx.stack([key] * len(group)), tried.layout()
            for _ in denoise_block(model, rows_of(prefix, len(group)), once, keys, None, layout, tried.guide(0)):
                pass
            yield layout.tokens.size
            best = int(np.argmax(tried.score))
            if tried.score[best] > -np.inf:
                self._lengths, self._kept = [group[best]], {0: tried._kept[best]}
                return
        self._lengths = [self._otherwise or self._lengths[0]]

    def _expected(
        self, model: DiffusionGemma, prefix: Prefix, once: GenerationOptions, key: mx.array
    ) -> tuple[dict[int, float], int]:
        """By length the log-probability of what is in view behind the hole, on one canvas that leaves it free.

        The second is the canvas's size.
        """
        view, expected = self._behind[:IN_VIEW], {}
        size = fitting_size(len(self._before) + max(self._lengths) + len(view), self._canvas)
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(self._before)] = self._before
        fixed = np.arange(size)[None] < len(self._before)
        columns = [self._asked.index(token) for token in view]

        def read(_: int, seen: Marginals) -> np.ndarray:
            for length in self._lengths:
                at = len(self._before) + length
                expected[length] = float(seen.end_log_p[np.arange(at, at + len(view)), columns].sum())
            return seen.argmax

        layout = Layout(mx.array(tokens), mx.array(fixed), mx.zeros(fixed.shape, mx.bool_))
        guide = LanguageGuide(np.array([], np.int32), self._asked, (), read)
        for _ in denoise_block(model, prefix, once, key[None], None, layout, guide):
            pass
        return expected, size

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
