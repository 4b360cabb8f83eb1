"""One denoising step of a batch: `plain_step`, `fast_step` and `guided_step`.

The first two build the graph of a step and compute nothing, so that a step can be built while the one before is
under way. A guide must see the numbers of its step, so `guided_step` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..model import device, head
from ..model.functions import finite
from . import rules, sampler
from .canvas import CanvasBatch, Forward, rounded

Prediction = head.Prediction | head.FullPrediction
GUIDED_UNCERTAINTY = 1.0  # nats, at least, of a position whose text is not the model's own: it has not settled
CONFIDENT = 0.8  # probability at which fast mode keeps a position's best token for good


class Choice(NamedTuple):
    """What a step takes; arrays [B, C]."""

    accepted: mx.array  # bool, positions that go on with `tokens`; the others get fresh noise
    tokens: mx.array  # int32
    uncertainty: mx.array  # float32, nats, for the stop rules


def plain_step(batch: CanvasBatch, last: Forward | None, steps: Sequence[int], dense: int) -> Forward:
    """The step after `last`: samples are accepted by the checkpoint's entropy bound.

    Args:
        batch: the canvases.
        last: the step before; None: there was none.
        steps: denoising steps that each row has done before this one.
        dense: positions of the batch that need the whole vocabulary for their conditioning.
    """
    canvas, conditioning = inputs(batch, last, steps, dense)
    prediction = predict(batch, batch.model.denoise(canvas, batch.prefixes, conditioning), steps, dense)
    argmax = _unless_done(last, prediction.argmax)
    seen = _seen(batch, last, steps, canvas, prediction, argmax)
    return _finish(batch, last, steps, prediction, argmax, _by_entropy(batch, prediction, steps, seen), seen)


def fast_step(batch: CanvasBatch, last: Forward | None, steps: Sequence[int], dense: int) -> Forward:
    """As `plain_step`, but the best token of a position stays once it is confident."""
    canvas, conditioning = inputs(batch, last, steps, dense)
    prediction = predict(batch, batch.model.denoise(canvas, batch.prefixes, conditioning), steps, dense)
    argmax = _unless_done(last, prediction.argmax)
    seen = _seen(batch, last, steps, canvas, prediction, argmax)
    choice = _by_confidence(batch, last, prediction, argmax, seen)
    return _finish(batch, last, steps, prediction, argmax, choice, seen)


def guided_step(batch: CanvasBatch) -> tuple[Forward, head.Prediction]:
    """The batch's next step, whose text guides choose, and what the model itself made of its canvases.

    The confidence of the latter is the model's in the chosen tokens.
    The host reads what the guides need before the step is finished.
    """
    last, steps = batch.rows.last, batch.steps
    canvas, conditioning = inputs(batch, last, steps, batch.dense)
    # The next step waits for the guides' choice, so the device starts its layers while the host builds the others.
    batch.queue = device.Queue(batch.in_flight)
    hidden = batch.model.denoise(canvas, batch.prefixes, conditioning, batch.queue)
    prediction = predict(batch, hidden, steps, batch.dense)
    assert isinstance(prediction, head.Prediction)
    chosen = _unless_done(last, _chosen(batch, prediction))
    changed = chosen != prediction.argmax
    seen = _seen(batch, last, steps, canvas, prediction, chosen)
    if batch.options.fast:
        choice = _by_confidence(batch, last, prediction, chosen, seen)
    else:
        choice = _by_entropy(batch, prediction, steps, seen)
    uncertain = mx.where(changed, mx.maximum(choice.uncertainty, GUIDED_UNCERTAINTY), choice.uncertainty)
    choice = Choice(choice.accepted, mx.where(changed, chosen, choice.tokens), uncertain)
    fixed = prediction.fix(chosen, changed & choice.accepted)
    own = mx.exp(prediction.log_prob_of(batch.model.head, chosen))
    told = prediction._replace(confidence=mx.where(changed, own, prediction.confidence))
    return _finish(batch, last, steps, fixed, chosen, choice, seen), told


def inputs(
    batch: CanvasBatch, last: Forward | None, steps: Sequence[int], dense: int
) -> tuple[mx.array, mx.array | None]:
    """Canvas [B, C] and self-conditioning [B, C, H] of a step; no conditioning in a canvas's first step."""
    if last is None:
        return batch.first_canvas(), None
    count = min(rounded(dense), len(steps) * batch.length)
    conditioning = last.prediction.condition(batch.model.head, count)
    if 0 in steps:  # rows that have just joined
        conditioning = mx.where(mx.array(list(steps))[:, None, None] == 0, 0, conditioning)
    return last.canvas, conditioning


def predict(batch: CanvasBatch, hidden: mx.array, steps: Sequence[int], dense: int) -> Prediction:
    """What the head makes of the hidden states [B, C, H] of a step, fixed positions certain."""
    options, total, layout = batch.options, batch.options.max_denoising_steps, batch.rows.layout
    now = [sampler.temperature(total - step, total, options.t_min, options.t_max) for step in steps]
    t, keys = mx.array(now, mx.float32)[:, None, None], batch.keys([2 * step + 1 for step in steps])
    if options.exact:
        return batch.model.head.predict_full(hidden, t, keys)
    prediction = batch.model.head.predict(hidden, t, keys, expected_embedding=2 * dense > len(steps) * batch.length)
    return prediction if layout is None else prediction.fix(layout.tokens, layout.fixed)


def _seen(
    batch: CanvasBatch,
    last: Forward | None,
    steps: Sequence[int],
    canvas: mx.array,
    prediction: Prediction,
    argmax: mx.array,
) -> rules.Seen | None:
    """What rules of one's own see of a step; None where there are none, as in exact mode."""
    if not batch.options.own_rules:
        return None
    assert isinstance(prediction, head.Prediction)
    return rules.Seen(
        step=steps,
        steps=batch.options.max_denoising_steps,
        canvas=canvas,
        kept=batch.fixed() if last is None else last.accepted,
        argmax=argmax,
        sample=prediction.sample,
        confidence=prediction.confidence,
        entropy=prediction.entropy,
        likely=prediction.top_tokens,
        likely_p=prediction.top_probs,
        earlier=batch.earlier(rules.EARLIER),
        text=_text(batch, argmax),
        fixed=batch.fixed(),
    )


def _by_entropy(batch: CanvasBatch, prediction: Prediction, steps: Sequence[int], seen: rules.Seen | None) -> Choice:
    layout, options = batch.rows.layout, batch.options
    bound: float | mx.array = options.entropy_bound
    if options.entropy_rise:
        bound = mx.array([options.entropy_bound * (1 + options.entropy_rise * step) for step in steps])[:, None]
    if seen is not None and batch.options.accept is not None:
        accepted = rules.of_rows("accept", batch.options.accept, seen) | seen.fixed
    elif layout is None:
        accepted = sampler.accept(prediction.entropy, bound)
    else:
        accepted = sampler.accept(mx.where(layout.fixed, mx.inf, prediction.entropy), bound) | layout.fixed
    return Choice(accepted, prediction.sample, prediction.entropy)


def _by_confidence(
    batch: CanvasBatch, last: Forward | None, prediction: Prediction, argmax: mx.array, seen: rules.Seen | None
) -> Choice:
    kept = batch.fixed() if last is None else last.accepted
    before = batch.first_canvas() if last is None else last.canvas
    if seen is not None and batch.options.accept is not None:
        accepted = rules.of_rows("accept", batch.options.accept, seen) | kept
    else:
        accepted = sampler.accept_confident(prediction.confidence, kept, CONFIDENT)
    return Choice(accepted, mx.where(kept, before, argmax), mx.where(accepted, 0, prediction.entropy))


def _unless_done(last: Forward | None, argmax: mx.array) -> mx.array:
    """[B, C]: a row that has settled keeps its argmax."""
    return argmax if last is None else mx.where(last.done[:, None], last.argmax, argmax)


def _finish(
    batch: CanvasBatch,
    last: Forward | None,
    steps: Sequence[int],
    prediction: Prediction,
    argmax: mx.array,
    choice: Choice,
    seen: rules.Seen | None,
) -> Forward:
    """See which rows have settled, and put fresh noise where nothing was accepted."""
    options, noise = batch.options, batch.noise([2 * step + 2 for step in steps])
    if seen is not None and options.settle is not None:
        told = seen._replace(entropy=choice.uncertainty)
        done = rules.of_rows("settle", options.settle, told, choice.accepted)
    else:
        done = _settled(batch, argmax, choice.uncertainty)
    if last is not None:
        done = done | last.done
    if seen is not None and options.renoise is not None:
        noise = rules.of_rows("renoise", options.renoise, seen, choice.accepted, noise)
    canvas = mx.where(choice.accepted, choice.tokens, noise)
    return Forward(prediction, argmax, choice.accepted, canvas, done)


def _settled(batch: CanvasBatch, argmax: mx.array, uncertainty: mx.array) -> mx.array:
    """[B] bool: exact mode looks at the whole canvas by the reference's rule, the others at the answer by any rule."""
    options, rows = batch.options, batch.rows
    thresholds = options.stability_threshold, options.confidence_threshold
    if options.exact:
        return sampler.settled(argmax, rows.earlier, uncertainty, *thresholds)
    text = _text(batch, argmax)
    done = sampler.settled(argmax, rows.earlier, uncertainty, *thresholds, text)
    done = done | sampler.certain(uncertainty, options.certainty_threshold or 0, text)
    if options.patience:
        done = done | sampler.unchanged(argmax, rows.earlier, options.patience, text)
    return done


def _text(batch: CanvasBatch, argmax: mx.array) -> mx.array:
    """[B, C] bool, positions of the answer that are not fixed."""
    rows = batch.rows
    text = sampler.text(argmax, mx.array(batch.options.end_tokens, mx.int32), rows.room)
    return text if rows.layout is None else text & ~rows.layout.fixed


def _chosen(batch: CanvasBatch, prediction: head.Prediction) -> mx.array:
    """[B, C] int32, the texts that the guides choose; a row that has settled keeps the model's argmax."""
    seen = {
        "argmax": prediction.argmax,
        "argmax_log_p": mx.log(prediction.confidence),
        "likely": prediction.top_tokens,
        "likely_log_p": mx.log(prediction.top_probs),
    }
    valid = finite(prediction.hidden)
    asked = [
        prediction.map(lambda a, row=row: a[row : row + 1]).log_probs(batch.model.head, guide.tokens)
        for row, (guide, _) in enumerate(batch.guides)
    ]
    batch.queue.add(*prediction.stages, [*prediction.carried, seen, asked, valid])
    batch.queue.finish()
    numbers = np.asarray(valid)
    on_host = {name: np.asarray(array) for name, array in seen.items()}
    chosen = on_host["argmax"].copy()
    for row, (guide, number) in enumerate(batch.guides):
        if not batch.finished[row] and numbers[row]:
            of_row = {name: array[row] for name, array in on_host.items()}
            chosen[row] = guide.choose(number, {**of_row, "asked": np.asarray(asked[row])[0]})
    return mx.array(chosen)
