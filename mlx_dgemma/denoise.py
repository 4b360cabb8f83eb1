"""One canvas, from noise until it settles: the denoising steps of a block.

A step is built as a graph before anything of it is computed. While the device works on one, the host builds the
next; it learns whether to go on, and how many positions are diffuse, once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from . import head, memory, sampler

if TYPE_CHECKING:
    from .generate import GenerationOptions
    from .model import DiffusionGemma
    from .prefix import Prefix

DENSE = 64  # diffuse positions are counted in steps of so many: each count is a graph of its own
UNLIKE = 1.0  # nats that a position counts for whose text is not the model's own: it has not settled
CONFIDENT = 0.9  # probability at which fast mode keeps a position's best token for good


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch: arrays [B, C], `done` and `steps` per row."""

    best: mx.array  # int32, argmax; a row that has settled keeps its own
    accepted: mx.array  # bool
    entropy: mx.array  # float32, nats
    done: list[bool]
    steps: list[int]


@dataclass(frozen=True)
class Layout:
    """What a canvas begins with instead of noise; arrays [B, C], where C may be less than the model's canvas."""

    tokens: mx.array  # int32
    pinned: mx.array  # bool, keep their token, count as certain, and are left out of acceptance and stop rules
    drafted: mx.array  # bool, begin with their token


class Guide(Protocol):
    """Chooses every step's text among those that are allowed."""

    tokens: mx.array  # [N] int32, whose log-probabilities it must know at every position

    def choose(self, row: int, reading: dict[str, np.ndarray]) -> np.ndarray:
        """The text of a row of the batch, [C] int32.

        Args:
            row: its place in the batch.
            reading: "best" [C] with "top" [C], its log-probability; "likely" [C, K] with "log_p" [C, K]; and
                "asked" [C, N], log-probabilities of `tokens`.
        """


class _Forward(NamedTuple):
    """A step that is under way: arrays [B, C], nothing of it known to the host yet."""

    reading: head.Reading | head.WholeReading
    best: mx.array
    accepted: mx.array
    canvas: mx.array  # of the next step
    done: mx.array  # [B] bool
    known: mx.array  # [B + 1] int32, what the host must learn: `done`, and how many positions are diffuse


@dataclass
class _Canvas:
    """Builds the steps of a canvas per row; computes nothing."""

    model: DiffusionGemma
    prefix: Prefix
    options: GenerationOptions
    draws: mx.array  # [2 * steps + 1, B, 2] random keys
    room: mx.array  # [B] tokens that each row's text has room for
    layout: Layout | None = None
    earlier: list[mx.array] = field(default_factory=list)  # argmaxes of the steps before, oldest first

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.model.config.canvas_length if self.layout is None else self.layout.tokens.shape[1]

    def forward(self, step: int, last: _Forward | None, diffuse: int) -> _Forward:
        """The step after `last`, in which `diffuse` positions need the whole vocabulary for their conditioning."""
        return self.settle(step, last, self.read(step, last, diffuse))

    def read(self, step: int, last: _Forward | None, diffuse: int) -> head.Reading | head.WholeReading:
        """What the model makes of the canvas that `last` left."""
        model, options, positions = self.model, self.options, self.room.size * self.length
        canvas, conditioning = self._first(), None
        if last is not None:
            dense = min(_rounded(diffuse), positions)
            canvas, conditioning = last.canvas, last.reading.condition(model, dense)
        hidden, total = model.denoise(canvas, self.prefix, conditioning), options.max_denoising_steps
        t = sampler.temperature(total - step, total, options.t_min, options.t_max)
        if options.exact:
            return head.read_whole(model, hidden, t, self.draws[2 * step + 1])
        reading = head.read(model, hidden, t, self.draws[2 * step + 1], whole=2 * diffuse > positions)
        return reading if self.layout is None else reading.pin(self.layout.tokens, self.layout.pinned)

    def settle(
        self,
        step: int,
        last: _Forward | None,
        reading: head.Reading | head.WholeReading,
        chosen: mx.array | None = None,
    ) -> _Forward:
        """Take what was read: accept, draw, and see whether it is enough.

        Args:
            chosen: [B, C], the best text that a guide allows.
        """
        options, uncertainty, unlike = self.options, reading.entropy, None
        best = reading.best if last is None else mx.where(last.done[:, None], last.best, reading.best)
        drawn = reading.drawn
        if chosen is not None:
            chosen = chosen if last is None else mx.where(last.done[:, None], last.best, chosen)
            unlike = chosen != reading.best
            best, drawn = chosen, mx.where(unlike, chosen, drawn)
        if isinstance(reading, head.Reading) and options.fast:
            kept = self._pinned(best.shape) if last is None else last.accepted
            accepted = sampler.accept_confident(reading.confidence, kept, CONFIDENT)
            before = self._first() if last is None else last.canvas
            held = mx.where(kept, before, best)
            drawn = held if unlike is None else mx.where(unlike, best, held)
            uncertainty = mx.where(accepted, 0, uncertainty)
        elif self.layout is not None:
            free = mx.where(self.layout.pinned, mx.inf, uncertainty)
            accepted = sampler.accept(free, options.entropy_bound) | self.layout.pinned
        else:
            accepted = sampler.accept(uncertainty, options.entropy_bound)
        if unlike is not None and isinstance(reading, head.Reading):
            uncertainty = mx.where(unlike, mx.maximum(uncertainty, UNLIKE), uncertainty)
            reading = reading.pin(best, unlike & accepted)
        done = self._settled(best, uncertainty)
        if last is not None:
            done = done | last.done
        known = mx.concatenate([done.astype(mx.int32), reading.diffuse.sum(keepdims=True).flatten()])
        canvas = mx.where(accepted, drawn, self._noise(2 * step + 2))
        return _Forward(reading, best, accepted, canvas, done, known)

    def remember(self, best: mx.array) -> None:
        """Keep as many argmaxes as the stop rules look back."""
        depth = max(self.options.stability_threshold, self.options.patience or 0, 1)
        self.earlier = [*self.earlier, best][-depth:]

    def _settled(self, best: mx.array, uncertainty: mx.array) -> mx.array:
        options = self.options
        thresholds = options.stability_threshold, options.confidence_threshold
        if options.exact:
            return sampler.settled(best, self.earlier, uncertainty, *thresholds)
        text = sampler.text(best, mx.array(options.end_tokens, mx.int32), self.room)
        if self.layout is not None:
            text = text & ~self.layout.pinned
        done = sampler.settled(best, self.earlier, uncertainty, *thresholds, text)
        done = done | sampler.certain(uncertainty, options.certainty_threshold or 0, text)
        if options.patience:
            done = done | sampler.unchanged(best, self.earlier, options.patience, text)
        return done

    def _first(self) -> mx.array:
        noise = self._noise(0)
        if self.layout is None:
            return noise
        return mx.where(self.layout.pinned | self.layout.drafted, self.layout.tokens, noise)

    def _pinned(self, shape: tuple[int, ...]) -> mx.array:
        return mx.zeros(shape, mx.bool_) if self.layout is None else self.layout.pinned

    def _noise(self, draw: int) -> mx.array:
        return sampler.noise(self.length, self.model.config.text.vocab_size, self.draws[draw])


def denoise_block(
    model: DiffusionGemma,
    prefix: Prefix,
    options: GenerationOptions,
    keys: mx.array,
    left: Sequence[int] | None = None,
    layout: Layout | None = None,
    guide: Guide | None = None,
) -> Iterator[Step]:
    """Denoise one canvas per row until all rows have settled or the steps are used up.

    Args:
        keys: [B, 2], one random key per row for this block.
        left: tokens that each row's text has room for; None: the canvas and more.
        layout: what the canvas begins with; not in exact mode.
        guide: chooses the text of every step, which costs a second host read a step; not in exact mode.

    Yields:
        A `Step` per forward; a row that has settled keeps its argmax while others go on.
    """
    total, rows = options.max_denoising_steps, prefix.batch_size
    room = mx.array([2**30] * rows if left is None else list(left))
    canvas = _Canvas(model, prefix, options, sampler.split(keys, 2 * total + 1), room, layout)
    if guide is not None:
        yield from _guided(canvas, guide)
        return
    diffuse, steps, finished = 0 if options.exact else rows * canvas.length, [0] * rows, [False] * rows
    queue = memory.Queue()
    current = canvas.forward(0, None, diffuse)
    queue.add(*prefix.stages)
    for step in range(1, total + 1):
        canvas.remember(current.best)
        handles = prefix.handles()
        following = canvas.forward(step, current, diffuse) if step < total else None
        reading, shown = current.reading, (current.best, current.accepted, current.reading.entropy)
        queue.add(*reading.stages, [current.known, *shown, *reading.held])
        queue.finish()
        known = np.asarray(current.known)
        steps = [n + (not over) for n, over in zip(steps, finished)]
        finished = [bool(one) for one in known[:-1]]
        guess, diffuse = diffuse, int(known[-1])
        over = all(finished) or following is None
        fits = reading.whole is not None or _rounded(guess) == _rounded(diffuse)
        if over or not fits:  # what was built is of no use, and must not be computed for its side effects
            prefix.restore(handles)
            following = None if over else canvas.forward(step, current, diffuse)
        del handles  # or the next write would copy the buffers
        if following is not None:
            queue.add(*prefix.stages)
        yield Step(*shown, finished, steps)
        if following is None:
            return
        current = following


def _guided(canvas: _Canvas, guide: Guide) -> Iterator[Step]:
    """As `denoise_block`, where a guide must see a step before the next one can be built."""
    model, total = canvas.model, canvas.options.max_denoising_steps
    rows = canvas.room.size
    diffuse, steps, finished = rows * canvas.length, [0] * rows, [False] * rows
    queue, last = memory.Queue(), None
    for step in range(total):
        reading = canvas.read(step, last, diffuse)
        assert isinstance(reading, head.Reading)
        seen = {
            "best": reading.best,
            "top": mx.log(reading.confidence),
            "likely": reading.likely,
            "log_p": mx.log(reading.probability),
            "asked": reading.log_p(model, guide.tokens),
        }
        queue.add(*canvas.prefix.stages, *reading.stages, [*reading.held, seen])
        queue.finish()
        read = {name: np.asarray(array) for name, array in seen.items()}
        chosen = np.asarray(read["best"]).copy()
        for row in range(rows):
            if not finished[row]:
                chosen[row] = guide.choose(row, {name: array[row] for name, array in read.items()})
        current = canvas.settle(step, last, reading, mx.array(chosen))
        canvas.remember(current.best)
        known = np.asarray(current.known)
        steps = [n + (not over) for n, over in zip(steps, finished)]
        finished, diffuse = [bool(one) for one in known[:-1]], int(known[-1])
        last = current
        yield Step(current.best, current.accepted, reading.entropy, finished, steps)
        if all(finished):
            return


def _rounded(diffuse: int) -> int:
    return -(-diffuse // DENSE) * DENSE
