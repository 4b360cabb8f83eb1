"""Canvases, from noise until they settle: the denoising steps of blocks.

A step is built as a graph before anything of it is computed. While the device works on one, the host builds the
next; it learns which rows go on, and how many positions are diffuse, once a step. Rows may be at different steps:
one that joins begins while others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..model import device, head, rng
from ..model.kv_cache import Prefix
from . import sampler
from .control import Guide, Layout, Step

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from .options import GenerationOptions


DENSE = 64  # diffuse positions are counted in steps of so many: each count is a graph of its own
UNLIKE = 1.0  # nats that a position counts for whose text is not the model's own: it has not settled
CONFIDENT = 0.9  # probability at which fast mode keeps a position's best token for good


class _Forward(NamedTuple):
    """A step that is under way: arrays [B, C], nothing of it known to the host yet."""

    reading: head.Prediction | head.FullPrediction
    argmax: mx.array
    accepted: mx.array
    canvas: mx.array  # of the next step
    done: mx.array  # [B] bool

    @property
    def known(self) -> mx.array:
        """[B + 1] int32, what the host must learn: `done`, and how many positions are diffuse."""
        return mx.concatenate([self.done.astype(mx.int32), self.reading.needs_full_vocab.sum(keepdims=True).flatten()])

    def map(self, function: Callable[..., mx.array], *others: _Forward) -> _Forward:
        """The same with every array changed, together with the arrays of others."""
        reading = self.reading.map(function, *(one.reading for one in others))  # type: ignore[arg-type]
        rest = (function(*arrays) for arrays in zip(self[1:], *(one[1:] for one in others)))
        return _Forward(reading, *rest)


class Canvases:
    """Canvases that are denoised together, one per row, each at a step of its own.

    Args:
        model: the model.
        prefix: of B rows, or B prefixes of one row each.
        options: of all rows.
        keys: [B, 2], one random key per row for this block; a row's draws depend on it alone.
        left: tokens that each row's text has room for; None: the canvas and more.
        layout: what the canvases begin with; not in exact mode.
        guide: chooses the text of every step, which costs a second host read a step; not in exact mode.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        prefix: Prefix | Sequence[Prefix],
        options: GenerationOptions,
        keys: mx.array,
        left: Sequence[int] | None = None,
        layout: Layout | None = None,
        guide: Guide | None = None,
    ):
        rows, total = keys.shape[0], options.max_denoising_steps
        self.model, self.options = model, options
        self.prefixes = [prefix] if isinstance(prefix, Prefix) else list(prefix)
        self.steps, self.finished = [0] * rows, [False] * rows
        self._draws = rng.split(keys, 2 * total + 1).swapaxes(0, 1)  # [B, 2 * total + 1, 2]
        self._room = mx.array([2**30] * rows if left is None else list(left))
        self._layout = layout
        self._guides = [] if guide is None else [(guide, row) for row in range(rows)]
        self._earlier: list[mx.array] = []  # argmaxes of the steps before, oldest first; -1 where a row had none
        self._last: _Forward | None = None  # known
        self._ahead: _Forward | None = None  # under way
        self._diffuse = 0 if options.exact else rows * self.length
        self._queue = device.Queue()

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.model.config.canvas_length if self._layout is None else self._layout.tokens.shape[1]

    @property
    def ahead(self) -> bool:
        """Whether the next step is under way, so that no row can join before it."""
        return self._ahead is not None

    def step(self, ahead: bool = True) -> Step:
        """Denoise every row once; a row that has settled keeps its argmax while others go on.

        Args:
            ahead: start the next step before this one is read, where no row can end with this one.
        """
        if self._guides:
            return self._guided_step()
        current = self._ahead
        if current is None:
            self._queue = device.Queue()
            current = self._build(self._last, self.steps, self._diffuse)
            self._queue.add(*self._stages())
        self._remember(current.argmax)
        steps = [n + (not over) for n, over in zip(self.steps, self.finished)]
        following, guess = None, self._diffuse
        handles = [prefix.handles() for prefix in self.prefixes]
        if ahead and not any(self.finished) and max(steps) < self.options.max_denoising_steps:
            following = self._build(current, steps, guess)
        reading = current.reading
        shown = current.argmax, current.accepted, reading.entropy, reading.confidence
        known = current.known
        self._queue.add(*reading.stages, [known, *shown, *reading.carried])
        self._queue.finish()
        self._know(current, known, steps)
        over = any(self.finished)
        fits = getattr(reading, "expected_embedding", True) is not None or _rounded(guess) == _rounded(self._diffuse)
        if following is not None and (over or not fits):
            # what was built is of no use, and must not be computed for its side effects
            for prefix in self.prefixes:
                prefix.restore(handles.pop(0))
            following = None if over else self._build(current, steps, self._diffuse)
        del handles  # or the next write would copy the buffers
        self._queue = device.Queue()
        if following is not None:
            self._queue.add(*self._stages())
        self._ahead = following
        return Step(*shown, list(self.finished), steps)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, of prefixes of one row each."""
        index = mx.array(list(rows))

        def kept(array: mx.array) -> mx.array:
            return array[index]

        self.prefixes = [self.prefixes[row] for row in rows]
        self.steps, self.finished = [self.steps[row] for row in rows], [self.finished[row] for row in rows]
        self._draws, self._room = kept(self._draws), kept(self._room)
        self._layout = self._layout and Layout(*map(kept, _fields(self._layout)))
        self._guides = [self._guides[row] for row in rows] if self._guides else []
        self._earlier = [kept(one) for one in self._earlier]
        self._last, self._ahead = (one and one.map(kept) for one in (self._last, self._ahead))
        self._count()

    def join(self, other: Canvases) -> None:
        """Take in rows with the same options and length; not while a step is under way."""
        both = (self, other)
        for one, beside in (both, both[::-1]):
            if one._last is None and beside._last is not None:
                one._last = one._blank(beside._last.reading)
        while len(self._earlier) != len(other._earlier):
            shorter = min(both, key=lambda one: len(one._earlier))
            shorter._earlier.insert(0, mx.full((len(shorter.steps), self.length), -1, mx.int32))

        def joined(mine: mx.array, new: mx.array) -> mx.array:
            return mx.concatenate([mine, new])

        self.prefixes += other.prefixes
        self.steps, self.finished = self.steps + other.steps, self.finished + other.finished
        self._draws, self._room = joined(self._draws, other._draws), joined(self._room, other._room)
        if self._layout is not None and other._layout is not None:
            self._layout = Layout(*map(joined, _fields(self._layout), _fields(other._layout)))
        self._guides += other._guides
        self._earlier = list(map(joined, self._earlier, other._earlier))
        if self._last is not None and other._last is not None:
            self._last = self._last.map(joined, other._last)
        self._count()

    def _build(self, last: _Forward | None, steps: list[int], diffuse: int) -> _Forward:
        """The step after `last`, in which `diffuse` positions need the whole vocabulary for their conditioning."""
        return self._settle(last, steps, self._read(last, steps, diffuse))

    def _read(self, last: _Forward | None, steps: list[int], diffuse: int) -> head.Prediction | head.FullPrediction:
        """What the model makes of the canvases that `last` left."""
        model, options, positions = self.model, self.options, len(steps) * self.length
        canvas, conditioning = self._first(), None
        if last is not None:
            dense = min(_rounded(diffuse), positions)
            canvas, conditioning = last.canvas, last.reading.condition(model.head, dense)
            if 0 in steps:  # rows that have just joined
                conditioning = mx.where(mx.array(steps)[:, None, None] == 0, 0, conditioning)
        hidden, total = model.denoise(canvas, self.prefixes, conditioning), options.max_denoising_steps
        now = [sampler.temperature(total - step, total, options.t_min, options.t_max) for step in steps]
        t = mx.array(now, mx.float32)[:, None, None]
        keys = self._keys([2 * step + 1 for step in steps])
        if options.exact:
            return model.head.predict_full(hidden, t, keys)
        reading = model.head.predict(hidden, t, keys, expected_embedding=2 * diffuse > positions)
        return reading if self._layout is None else reading.fix(self._layout.tokens, self._layout.pinned)

    def _settle(
        self,
        last: _Forward | None,
        steps: list[int],
        reading: head.Prediction | head.FullPrediction,
        chosen: mx.array | None = None,
    ) -> _Forward:
        """Take what was read: accept, draw, and see whether it is enough.

        Args:
            chosen: [B, C], the best text that a guide allows.
        """
        options, uncertainty, unlike = self.options, reading.entropy, None
        best = reading.argmax if last is None else mx.where(last.done[:, None], last.argmax, reading.argmax)
        drawn = reading.sample
        if chosen is not None:
            chosen = chosen if last is None else mx.where(last.done[:, None], last.argmax, chosen)
            unlike = chosen != reading.argmax
            best, drawn = chosen, mx.where(unlike, chosen, drawn)
        if isinstance(reading, head.Prediction) and options.fast:
            kept = self._pinned(best.shape) if last is None else last.accepted
            accepted = sampler.accept_confident(reading.confidence, kept, CONFIDENT)
            before = self._first() if last is None else last.canvas
            held = mx.where(kept, before, best)
            drawn = held if unlike is None else mx.where(unlike, best, held)
            uncertainty = mx.where(accepted, 0, uncertainty)
        elif self._layout is not None:
            free = mx.where(self._layout.pinned, mx.inf, uncertainty)
            accepted = sampler.accept(free, options.entropy_bound) | self._layout.pinned
        else:
            accepted = sampler.accept(uncertainty, options.entropy_bound)
        if unlike is not None and isinstance(reading, head.Prediction):
            uncertainty = mx.where(unlike, mx.maximum(uncertainty, UNLIKE), uncertainty)
            reading = reading.fix(best, unlike & accepted)
        done = self._settled(best, uncertainty)
        if last is not None:
            done = done | last.done
        canvas = mx.where(accepted, drawn, self._noise([2 * step + 2 for step in steps]))
        return _Forward(reading, best, accepted, canvas, done)

    def _guided_step(self) -> Step:
        """As `step`, where guides must see what was read before it can be settled."""
        steps = [n + (not over) for n, over in zip(self.steps, self.finished)]
        reading = self._read(self._last, self.steps, self._diffuse)
        assert isinstance(reading, head.Prediction)
        log_p = {"top": mx.log(reading.confidence), "likely": reading.top_tokens, "log_p": mx.log(reading.top_probs)}
        seen = {"best": reading.argmax, **log_p}
        asked = [
            reading.map(lambda a, row=row: a[row : row + 1]).log_probs(self.model.head, guide.tokens)
            for row, (guide, _) in enumerate(self._guides)
        ]
        self._queue = device.Queue()
        self._queue.add(*self._stages(), *reading.stages, [*reading.carried, seen, asked])
        self._queue.finish()
        read = {name: np.asarray(array) for name, array in seen.items()}
        chosen = np.asarray(read["best"]).copy()
        for row, (guide, number) in enumerate(self._guides):
            if not self.finished[row]:
                found = {name: array[row] for name, array in read.items()}
                chosen[row] = guide.choose(number, {**found, "asked": np.asarray(asked[row])[0]})
        current = self._settle(self._last, self.steps, reading, mx.array(chosen))
        self._remember(current.argmax)
        self._know(current, current.known, steps)
        return Step(current.argmax, current.accepted, reading.entropy, reading.confidence, list(self.finished), steps)

    def _know(self, current: _Forward, known: mx.array, steps: list[int]) -> None:
        *done, self._diffuse = np.asarray(known).tolist()
        self._last, self.steps, self.finished = current, steps, list(map(bool, done))

    def _count(self) -> None:
        """See how many positions are diffuse after rows came or went."""
        if self._last is None:
            self._diffuse = 0 if self.options.exact else len(self.steps) * self.length
        else:
            self._diffuse = int(np.asarray(self._last.known)[-1])

    def _remember(self, best: mx.array) -> None:
        """Keep as many argmaxes as the stop rules look back."""
        depth = max(self.options.stability_threshold, self.options.patience or 0, 1)
        self._earlier = [*self._earlier, best][-depth:]

    def _settled(self, best: mx.array, uncertainty: mx.array) -> mx.array:
        options = self.options
        thresholds = options.stability_threshold, options.confidence_threshold
        if options.exact:
            return sampler.settled(best, self._earlier, uncertainty, *thresholds)
        text = sampler.text(best, mx.array(options.end_tokens, mx.int32), self._room)
        if self._layout is not None:
            text = text & ~self._layout.pinned
        done = sampler.settled(best, self._earlier, uncertainty, *thresholds, text)
        done = done | sampler.certain(uncertainty, options.certainty_threshold or 0, text)
        if options.patience:
            done = done | sampler.unchanged(best, self._earlier, options.patience, text)
        return done

    def _blank(self, like: head.Prediction | head.FullPrediction) -> _Forward:
        """What stands in for the step before a row's first; nothing of it is used but the canvas."""
        canvas = self._first()
        reading, over = head.placeholder_rows(like, len(self.steps)), mx.zeros((len(self.steps),), mx.bool_)
        return _Forward(reading, canvas, self._pinned(canvas.shape), canvas, over)

    def _first(self) -> mx.array:
        noise = self._noise([0] * len(self.steps))
        if self._layout is None:
            return noise
        return mx.where(self._layout.pinned | self._layout.drafted, self._layout.tokens, noise)

    def _pinned(self, shape: tuple[int, ...]) -> mx.array:
        return mx.zeros(shape, mx.bool_) if self._layout is None else self._layout.pinned

    def _keys(self, draws: list[int]) -> mx.array:
        """[B, 2], each row's key of its own draw."""
        return self._draws[mx.arange(len(draws)), mx.array(draws)]

    def _noise(self, draws: list[int]) -> mx.array:
        return rng.noise(self.length, self.model.config.text.vocab_size, self._keys(draws))

    def _stages(self) -> list[list[Any]]:
        """What the prefixes have to be evaluated for, layer by layer: every start of an evaluation has its price."""
        return [list(stages) for stages in zip_longest(*(prefix.stages for prefix in self.prefixes))]


def denoise_block(
    model: DiffusionGemma,
    prefix: Prefix | Sequence[Prefix],
    options: GenerationOptions,
    keys: mx.array,
    left: Sequence[int] | None = None,
    layout: Layout | None = None,
    guide: Guide | None = None,
) -> Iterator[Step]:
    """Denoise one canvas per row until all rows have settled or the steps are used up; takes what `Canvases` takes.

    Yields:
        A `Step` per forward; a row that has settled keeps its argmax while others go on.
    """
    canvases = Canvases(model, prefix, options, keys, left, layout, guide)
    for _ in range(options.max_denoising_steps):
        step = canvases.step()
        yield step
        if all(step.done):
            return


def _fields(layout: Layout) -> tuple[mx.array, mx.array, mx.array]:
    return layout.tokens, layout.pinned, layout.drafted


def _rounded(diffuse: int) -> int:
    return -(-diffuse // DENSE) * DENSE
