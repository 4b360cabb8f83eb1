"""Denoise a batch step by step, with the next step built and started while the device works on this one.

Once a step the host reads three things back: which rows have settled, which have left the range of their dtype, and
how many positions need the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..model import device, head
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from .canvas import CanvasBatch, Forward, rounded
from .control import Guide, Layout
from .options import GenerationOptions
from .step import fast_step, guided_step, plain_step

EARLY = 2  # layers


@dataclass(frozen=True)
class Step:
    """What a denoising step of a batch came to; arrays [B, C], `done` and `steps` one for each row."""

    argmax: mx.array  # int32; a row that has settled keeps its own
    accepted: mx.array  # bool
    entropy: mx.array  # float32, nats
    confidence: mx.array  # float32, probability of each position's `argmax` in the processed logits
    done: list[bool]
    steps: list[int]
    positions: list[int]  # that these steps computed
    overflowed: list[int]  # rows whose states hold inf or NaN; nothing else of them means anything


def advance(batch: CanvasBatch, ahead: bool = True) -> Step:
    """Denoise every row once; a row that has settled keeps its argmax while others go on.

    Args:
        batch: the canvases; it moves on by this step.
        ahead: start the next step before this one is read, where no row can end with this one.
    """
    steps = [done + (not over) for done, over in zip(batch.steps, batch.finished)]
    if batch.guides:
        guided, told = guided_step(batch)
        batch.remember(guided.argmax)
        return _step(batch, guided, told, batch.advance_to(guided, guided.host_state, steps))
    build = fast_step if batch.options.fast else plain_step
    ahead = ahead and not batch.model.low_memory
    if batch.ahead is None:
        current = build(batch, batch.rows.last, batch.steps, batch.dense)
        batch.queue = device.Queue(batch.in_flight)
        batch.queue.add(*batch.stages()[early_layers(batch) :])
    else:
        current = batch.ahead
    batch.remember(current.argmax)
    following: Forward | None = None
    guess, widths = batch.dense, batch.widths
    buffers = [prefix.handles() for prefix in batch.prefixes]
    if ahead and not any(batch.finished) and max(steps) < batch.options.max_denoising_steps:
        following = build(batch, current, steps, guess)
    host_state, prediction = current.host_state, current.prediction
    shown = [current.argmax, current.accepted, prediction.entropy, prediction.confidence]
    last = [host_state, *shown, *prediction.carried]
    batch.queue.add(*prediction.stages, last)
    early = early_layers(batch)  # whose keys no stage of the queue holds, so that they are written in place
    # What those write lies behind the prefix: nothing to undo, unless what was computed now is to stay there.
    buffers = [handles[0 if batch.narrows else early :] for handles in buffers]
    if following is not None:
        batch.queue.add(*batch.stages()[:early])
    mx.eval(last)
    overflowed = batch.advance_to(current, host_state, steps)
    over = any(batch.finished)
    if following is not None and (over or widths != batch.widths or not _fits(prediction, guess, batch.dense)):
        # What was built is of no use, and must not be computed for its side effects.
        for prefix in batch.prefixes:
            prefix.restore(buffers.pop(0))
        following = None if over else build(batch, current, steps, batch.dense)
    del buffers  # or the next write would copy the buffers
    batch.queue = device.Queue(batch.in_flight, batch.queue.base if early else None)  # early layers are in flight
    if following is not None:
        batch.queue.add(*batch.stages()[early:])
    batch.ahead = following
    return _step(batch, current, prediction, overflowed)


def denoise_block(
    model: DiffusionGemma,
    prefix: Prefix | Sequence[Prefix],
    options: GenerationOptions,
    keys: mx.array,
    room: Sequence[int] | None = None,
    layout: Layout | None = None,
    guide: Guide | None = None,
) -> Iterator[Step]:
    """Denoise one canvas per row until all rows have settled or the steps are used up; takes what `CanvasBatch` takes.

    Yields:
        A `Step` per forward; a row that has settled keeps its argmax while others go on.

    Raises:
        RangeError: a row's states hold inf or NaN.
    """
    batch = CanvasBatch(model, prefix, options, keys, room, layout, guide)
    for _ in range(options.max_denoising_steps):
        step = advance(batch)
        if step.overflowed:
            raise model.range_error()
        yield step
        if all(step.done):
            return


def early_layers(batch: CanvasBatch) -> int:
    """Layers of the next step that are started before this step is read, so that a GPU has work while the host reads.

    If no row goes on they were computed in vain: on the CPU nothing would be gained, and where attention goes by groups
    of queries a layer takes too long. Where canvases can become narrower, what they write is undone, which copies their
    keys: then they are sliding layers, whose keys are few.
    """
    long = batch.narrows and "full_attention" in batch.model.config.text.layer_types[:EARLY]
    return 0 if device.on_cpu() or batch.in_groups or long else EARLY


def _fits(prediction: head.Prediction | head.FullPrediction, guess: int, dense: int) -> bool:
    """Whether the next step was built for as many dense positions as there are."""
    if isinstance(prediction, head.Prediction) and prediction.expected_embedding is None:
        return rounded(guess) == rounded(dense)
    return True  # one pass over the vocabulary serves all positions


def _step(
    batch: CanvasBatch, forward: Forward, prediction: head.Prediction | head.FullPrediction, overflowed: list[int]
) -> Step:
    shown = forward.argmax, forward.accepted, prediction.entropy, prediction.confidence
    return Step(*shown, list(batch.finished), list(batch.steps), list(batch.positions), overflowed)
