"""`CanvasBatch`: canvases that are denoised together, one a row, each at a step of its own.

A row's width is how many of its positions its next step computes. What stands behind an answer's end is not computed
again: its last prediction, keys and values stay.

B is the batch, C the canvas length, N the number of denoising steps, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..model import device, head, rng
from ..model.diffusion_gemma import DiffusionGemma
from ..model.functions import finite
from ..model.kv_cache import Prefix
from ..model.masks import Narrow
from .control import Guide, Layout
from .options import GenerationOptions
from .rules import EARLIER

DENSE = 64  # positions that need the whole vocabulary are counted in steps of this: each count is a graph of its own
UNLIMITED = 2**30  # room of a text that nothing bounds


class Forward(NamedTuple):
    """What one denoising step comes to, as a graph that may not be computed yet; arrays [B, C] or [B]."""

    prediction: head.Prediction | head.FullPrediction
    argmax: mx.array  # int32; a row that has settled keeps its own
    accepted: mx.array  # bool
    canvas: mx.array  # int32, input of the next step
    done: mx.array  # [B] bool
    width: mx.array  # [B] int32, positions that the next step computes

    @property
    def host_state(self) -> mx.array:
        """[3 B + 1] int32, what the host reads back.

        `done`; `finite`; `width`; and how many positions of the next step need the whole vocabulary.
        """
        needed = self.prediction.needs_full_vocab & (mx.arange(self.argmax.shape[1]) < self.width[:, None])
        found = self.done.astype(mx.int32), self.finite.astype(mx.int32), self.width
        return mx.concatenate([*found, needed.sum(keepdims=True).flatten()])

    @property
    def finite(self) -> mx.array:
        """[B] bool, whether the states of a row are numbers: one inf or NaN in a layer spreads to all that see it."""
        known = self.prediction
        return finite(known.hidden if isinstance(known, head.Prediction) else known.entropy)


class Rows(NamedTuple):
    """The arrays of a batch; the first axis of each is the row."""

    keys: mx.array  # [B, 2 N + 1, 2] uint32: of the first canvas; then of each step's sample and of its fresh noise
    room: mx.array  # [B] int32, tokens that the text has room for
    layout: Layout | None
    earlier: tuple[mx.array, ...]  # [B, C] int32 each, argmaxes of the steps before, oldest first; -1: there was none
    last: Forward | None  # the step before, which the host knows


class CanvasBatch:
    """Canvases that are denoised together.

    Args:
        model: the model.
        prefix: of B rows, or B prefixes of one row each.
        options: of all rows.
        keys: [B, 2], one random key per row for this block; a row's draws depend on it alone.
        room: tokens that each row's text has room for; None: no bound.
        layout: what the canvases begin with; not in exact mode.
        guide: chooses the text of every step, which costs a second host read a step; not in exact mode.
        length: positions of a canvas without a layout; None: the checkpoint's.

    Attributes:
        length: positions of a row.
        steps: denoising steps that each row has done.
        positions: positions that these steps computed, of each row.
        widths: positions that the next step computes, of each row.
        narrows: whether they may be fewer than all.
        finished: whether each row has settled.
        ahead: the next step where it is under way, so that no row can join before it.
        dense: positions of the batch that need the whole vocabulary for their conditioning.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        prefix: Prefix | Sequence[Prefix],
        options: GenerationOptions,
        keys: mx.array,
        room: Sequence[int] | None = None,
        layout: Layout | None = None,
        guide: Guide | None = None,
        length: int | None = None,
    ):
        count = keys.shape[0]
        self.length = length or model.config.canvas_length if layout is None else layout.tokens.shape[1]
        self.model, self.options = model, options
        self.prefixes = [prefix] if isinstance(prefix, Prefix) else list(prefix)
        self.steps, self.finished = [0] * count, [False] * count
        self.positions, self.widths = [0] * count, [self.length] * count
        alone = len(self.prefixes) == count and all(one.padding is None for one in self.prefixes)
        self.narrows = options.canvas != "full" and not options.exact and layout is None and alone
        self.guides = [] if guide is None else [(guide, row) for row in range(count)]
        self.rows = Rows(
            keys=rng.split(keys, 2 * options.max_denoising_steps + 1).swapaxes(0, 1),
            room=mx.array([UNLIMITED] * count if room is None else list(room)),
            layout=layout,
            earlier=(),
            last=None,
        )
        self.ahead: Forward | None = None
        self.queue = device.Queue()
        self.dense = 0 if options.exact else count * self.length

    @property
    def narrow(self) -> Narrow | None:
        """What the next step computes; None: all."""
        return None if min(self.widths) == self.length else Narrow(tuple(self.widths), self.length)

    @property
    def computed(self) -> mx.array:
        """[B, C] bool, what the next step computes."""
        return mx.arange(self.length) < mx.array(self.widths)[:, None]

    def select(self, indices: Sequence[int]) -> None:
        """Keep these rows, of prefixes of one row each, and drop the others."""
        index = mx.array(list(indices))
        self.prefixes = [self.prefixes[i] for i in indices]
        self.steps, self.finished = [self.steps[i] for i in indices], [self.finished[i] for i in indices]
        self.positions, self.widths = [self.positions[i] for i in indices], [self.widths[i] for i in indices]
        self.guides = [self.guides[i] for i in indices] if self.guides else []
        self.rows, self.ahead = _map(lambda a: a[index], self.rows), _map(lambda a: a[index], self.ahead)
        self._count_dense()

    def append(self, other: CanvasBatch) -> None:
        """Take in the rows of a batch with the same options and length; not while a step is under way."""
        self._align(other)
        other._align(self)
        self.prefixes += other.prefixes
        self.steps, self.finished = self.steps + other.steps, self.finished + other.finished
        self.positions, self.widths = self.positions + other.positions, self.widths + other.widths
        self.guides += other.guides
        self.rows = _map(lambda *pair: mx.concatenate(list(pair)), self.rows, other.rows)
        self._count_dense()

    def remember(self, argmax: mx.array) -> None:
        """Keep as many argmaxes as the stop rules look back."""
        depth = max(self.options.stability_threshold, self.options.patience or 0, 1)
        depth = max(depth, EARLIER) if self.options.own_rules else depth
        self.rows = self.rows._replace(earlier=(*self.rows.earlier, argmax)[-depth:])

    def earlier(self, count: int) -> mx.array:
        """[N, B, C] int32, the argmaxes of the last N steps, oldest first; -1 where there was no step."""
        known = self.rows.earlier[-count:]
        none = mx.full((len(self.steps), self.length), -1, mx.int32)
        return mx.stack([none] * (count - len(known)) + list(known))

    def advance_to(self, forward: Forward, host_state: mx.array, steps: list[int]) -> list[int]:
        """A step is done: the host learns which rows have settled, and what the next step computes.

        Returns:
            The rows that have left the range of their dtype; they are finished, too.
        """
        *found, self.dense = np.asarray(host_state).tolist()
        count = len(steps)
        done, valid = found[:count], found[count : 2 * count]
        self.positions = [n + w * (not over) for n, w, over in zip(self.positions, self.widths, self.finished)]
        self.rows, self.widths = self.rows._replace(last=forward), found[2 * count :]
        self.steps, self.finished = steps, [bool(one) or not numbers for one, numbers in zip(done, valid)]
        return [row for row, numbers in enumerate(valid) if not numbers]

    def first_canvas(self) -> mx.array:
        """[B, C] int32: noise, and the layout's tokens where it has some."""
        noise, layout = self.noise([0] * len(self.steps)), self.rows.layout
        return noise if layout is None else mx.where(layout.fixed | layout.initial, layout.tokens, noise)

    def fixed(self) -> mx.array:
        """[B, C] bool, positions that the layout fixes."""
        layout = self.rows.layout
        return mx.zeros((len(self.steps), self.length), mx.bool_) if layout is None else layout.fixed

    def keys(self, draws: Sequence[int]) -> mx.array:
        """[B, 2], each row's key of its own draw."""
        return self.rows.keys[mx.arange(len(draws)), mx.array(list(draws))]

    def noise(self, draws: Sequence[int]) -> mx.array:
        """[B, C] int32, uniform random tokens."""
        return rng.noise(self.length, self.model.config.text.vocab_size, self.keys(draws))

    def stages(self) -> list[list[Any]]:
        """What the prefixes' layers have to compute, layer by layer: every start of an evaluation has its price."""
        return [list(stages) for stages in zip_longest(*(prefix.stages for prefix in self.prefixes))]

    @property
    def in_flight(self) -> int:
        """Bytes that the queue of these stages may have in flight."""
        return max(prefix.in_flight for prefix in self.prefixes)

    @property
    def in_groups(self) -> bool:
        """Whether the stages of a layer are several, because its attention goes by groups of queries."""
        return any(layer.stages for prefix in self.prefixes for layer in prefix.layers)

    def _align(self, other: CanvasBatch) -> None:
        """Fill in what the rows of another batch have and these do not: the step before, and earlier argmaxes."""
        rows, missing = self.rows, len(other.rows.earlier) - len(self.rows.earlier)
        none = mx.full((len(self.steps), self.length), -1, mx.int32)
        rows = rows._replace(earlier=(none,) * missing + rows.earlier)
        if rows.last is None and other.rows.last is not None:
            canvas, over = self.first_canvas(), mx.zeros((len(self.steps),), mx.bool_)
            prediction = head.placeholder_rows(other.rows.last.prediction, len(self.steps))
            width = mx.array(self.widths)
            rows = rows._replace(
                last=Forward(prediction, canvas, self.fixed(), canvas, over, width)
            )  # only the canvas and the width are read
        self.rows = rows

    def _count_dense(self) -> None:
        if self.rows.last is None:
            self.dense = 0 if self.options.exact else len(self.steps) * self.length
        else:
            self.dense = int(np.asarray(self.rows.last.host_state)[-1])


def rounded(dense: int) -> int:
    """A count of positions, rounded up to a multiple of `DENSE`."""
    return -(-dense // DENSE) * DENSE


def _map(function: Callable[..., mx.array], *trees: Any) -> Any:
    """`function` of the corresponding arrays of named tuples, tuples and predictions of one shape; None stays None."""
    first = trees[0]
    if any(tree is None for tree in trees):
        return None
    if isinstance(first, mx.array):
        return function(*trees)
    if isinstance(first, (head.Prediction, head.FullPrediction)):
        return first.map(function, *trees[1:])
    parts = [_map(function, *children) for children in zip(*trees)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
