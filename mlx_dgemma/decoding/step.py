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
from ..model.device import row_unit
from ..model.functions import finite
from . import rules, sampler
from .canvas import CanvasBatch, Forward, rounded

Prediction = head.Prediction | head.FullPrediction
GUIDED_UNCERTAINTY = 1.0  # nats, at least, of a position whose text is not the model's own: it has not settled
CONFIDENT, LIKELY, UNLIKELY = 0.9, 0.7, 0.3  # probabilities of `sampler.accept_confident`
MARGIN = 0  # positions behind an end that are computed all the same
SURE = 0.9  # probability from which on an end is believed at once; another must stand for two steps


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
    hidden = batch.model.denoise(canvas, batch.prefixes, conditioning, None, batch.narrow)
    prediction = predict(batch, last, hidden, steps, dense)
    argmax = _unless_done(last, prediction.argmax)
    seen = _seen(batch, last, steps, canvas, prediction, argmax)
    return _finish(batch, last, steps, prediction, argmax, _by_entropy(batch, prediction, steps, seen), seen)


def fast_step(batch: CanvasBatch, last: Forward | None, steps: Sequence[int], dense: int) -> Forward:
    """As `plain_step`, but the best token of a position stays once it is confident."""
    canvas, conditioning = inputs(batch, last, steps, dense)
    hidden = batch.model.denoise(canvas, batch.prefixes, conditioning, None, batch.narrow)
    prediction = predict(batch, last, hidden, steps, dense)
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
    hidden = batch.model.denoise(canvas, batch.prefixes, conditioning, batch.queue, batch.narrow)
    prediction = predict(batch, last, hidden, steps, batch.dense)
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
    """Canvas [B, C] and self-conditioning [B, C, H] of a step; no conditioning in a canvas's first step.

    Of narrow canvases what is computed, [1, T] and [1, T, H].
    """
    if last is None:
        return batch.first_canvas(), None
    narrow, prediction, canvas = batch.narrow, last.prediction, last.canvas
    begins = mx.array(list(steps))[:, None, None] == 0
    if narrow is not None:
        prediction, canvas = prediction.map(narrow.take), narrow.take(canvas)
        begins = narrow.take(mx.broadcast_to(begins, (len(steps), batch.length, 1)))
    conditioning = prediction.condition(batch.model.head, min(rounded(dense), canvas.size))
    if 0 in steps:  # rows that have just joined
        conditioning = mx.where(begins, 0, conditioning)
    return canvas, conditioning


def predict(batch: CanvasBatch, last: Forward | None, hidden: mx.array, steps: Sequence[int], dense: int) -> Prediction:
    """What the head makes of the hidden states [B, C, H] of a step, fixed positions certain.

    Of narrow canvases they are [1, T, H]; what was not computed is predicted as it was in the step before.
    """
    options, total, layout = batch.options, batch.options.max_denoising_steps, batch.rows.layout
    now = [sampler.temperature(total - step, total, options.t_min, options.t_max) for step in steps]
    t, keys = mx.array(now, mx.float32)[:, None, None], batch.keys([2 * step + 1 for step in steps])
    if options.exact:
        return batch.model.head.predict_full(hidden, t, keys)
    narrow, by_position = batch.narrow, mx.broadcast_to(t, (len(steps), batch.length, 1))
    if narrow is not None and last is not None:
        made, before = batch.model.head.predict(hidden, narrow.take(by_position), keys, narrow=narrow), last.prediction
        assert isinstance(before, head.Prediction)
        return made.map(narrow.put, before)._replace(stages=made.stages)
    made = batch.model.head.predict(hidden, t, keys, expected_embedding=2 * dense > len(steps) * batch.length)
    made = made._replace(temperature=by_position)
    return made if layout is None else made.fix(layout.tokens, layout.fixed)


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
        canvas=canvas if batch.narrow is None or last is None else last.canvas,
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
        entropy = prediction.entropy if batch.narrow is None else mx.where(batch.computed, prediction.entropy, mx.inf)
        accepted = sampler.accept(entropy, bound)
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
        told = prediction.confidence
        confidence = told if batch.narrow is None else mx.where(batch.computed, told, -1)
        accepted = sampler.accept_confident(confidence, kept, CONFIDENT, LIKELY, UNLIKELY)
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
    accepted, now = choice.accepted, mx.array(batch.widths)
    if seen is not None and options.settle is not None:
        done = rules.of_rows("settle", options.settle, seen._replace(entropy=choice.uncertainty), accepted)
    else:
        done = _settled(batch, argmax, choice.uncertainty)
    if seen is not None and options.renoise is not None:
        noise = rules.of_rows("renoise", options.renoise, seen, accepted, noise)
    canvas, width = mx.where(accepted, choice.tokens, noise), now
    if batch.narrows:
        ends = _lengths(batch, argmax)
        width = _next_width(batch, last, steps, ends, mx.where(argmax == prediction.argmax, prediction.confidence, 0))
        done = done & (ends <= now)
    if last is not None:
        done = done | last.done
        if batch.narrow is not None:
            accepted = mx.where(batch.computed, accepted, last.accepted)
            canvas = mx.where(batch.computed, canvas, last.canvas)
    return Forward(prediction, argmax, accepted, canvas, done, width)


def _lengths(batch: CanvasBatch, argmax: mx.array) -> mx.array:
    """[B] int32, tokens of each row's text, its end token included; all positions where it does not end."""
    return sampler.text(argmax, mx.array(batch.options.end_tokens, mx.int32), batch.rows.room).sum(axis=-1)


def _next_width(
    batch: CanvasBatch, last: Forward | None, steps: Sequence[int], ends: mx.array, confidence: mx.array
) -> mx.array:
    """[B] int32, positions that the next step computes of each row.

    An end that is sure, or that stood for two steps, cuts what lies behind it, as does the text's bound. One that has
    moved behind what was computed, or that has gone, brings all positions back.

    Args:
        batch: the canvases.
        last: the step before.
        steps: denoising steps that each row has done before this one.
        ends: [B], as `_lengths`.
        confidence: [B, C] probability of the best tokens.
    """
    now, unit = mx.array(batch.widths), row_unit()
    sure = (mx.take_along_axis(confidence, ends[:, None] - 1, axis=1)[:, 0] >= SURE) | (ends == batch.rows.room)
    if last is not None:
        sure = sure | ((_lengths(batch, last.argmax) == ends) & (mx.array(list(steps)) > 0))
    wanted = mx.minimum((ends + MARGIN + unit - 1) // unit * unit, batch.length)
    return mx.where(wanted > now, batch.length, mx.where(sure, wanted, now)).astype(mx.int32)


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
