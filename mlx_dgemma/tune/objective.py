"""What fine-tuning minimises: uniform-noise block diffusion, one canvas a sample, and the encoder's next tokens.

A sample is a prefix (prompt and earlier blocks), encoded causally as in inference, and a canvas. Tokens of the canvas
are replaced with probability t, t itself is uniform, and cross entropy over the whole canvas asks for all of them
back. Formulas: the references named at `VARIANTS`; corruption is the sampler's own (`sampler.corrupt`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..model import rng
from ..model.attention import LayerContext
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import LayerKV
from ..model.layers import Layer

LOGITS = 2**26  # bytes of float32 logits at once; where there are more, the gradient computes them again


@dataclass(frozen=True)
class Objective:
    """How a loss is made.

    Attributes:
        noise_min: least t; canvases that are nearly clean teach little.
        noise_max: greatest t.
        reweighted: weigh a canvas by 1 / (1 - t), the rate at which tokens lose their value.
        leave_one_out: the network tells what a token is from all others (arXiv 2605.22765), so a position's logit of
            the token seen there is raised by log(1 + V * (1 - t) / t) before the softmax.
        fill: supervise the end tokens that fill a last canvas; otherwise the first one alone.
        by_token: a batch's mean is over its tokens; otherwise over its samples' means.
        encoder_weight: of the encoder's next-token cross entropy, over prefix and canvas, pictures left out.
        self_conditioning: probability with which a sample is conditioned on a first pass, as later denoising steps
            are; otherwise on zeros, as the first step is.
        clip: what 1 / (1 - t) is at most.
    """

    noise_min: float = 1e-4
    noise_max: float = 1 - 1e-4
    reweighted: bool = False
    leave_one_out: bool = False
    fill: bool = True
    by_token: bool = False
    encoder_weight: float = 1.0
    self_conditioning: float = 0.5
    clip: float = 1e3


VARIANTS = {
    # google-deepmind/gemma, diffusion: every canvas token counts alike
    "google": Objective(),
    # NVIDIA NeMo AutoModel: other times, and a mean over tokens
    "nemo": Objective(noise_min=1e-3, noise_max=1.0, by_token=True),
    # NVIDIA Megatron-Bridge: the padding of a last canvas does not count
    "megatron": Objective(noise_min=1e-3, noise_max=1 - 1e-3, fill=False),
    "megatron-reweighted": Objective(noise_min=1e-3, noise_max=1 - 1e-3, fill=False, reweighted=True),
    "megatron-loo": Objective(noise_min=1e-3, noise_max=1 - 1e-3, fill=False, leave_one_out=True),
    "megatron-reweighted-loo": Objective(
        noise_min=1e-3, noise_max=1 - 1e-3, fill=False, reweighted=True, leave_one_out=True
    ),
}
"""The published objectives, by their source."""


@dataclass(frozen=True)
class Batch:
    """Samples side by side; prefixes are padded on the left, so that all canvases begin at one slot.

    Attributes:
        tokens: [B, P] int32, the prefixes.
        real: [B, P] bool, false where padded.
        canvas: [B, C] int32, clean.
        supervised: [B, C] bool, what counts in either loss.
        features: of each row the soft tokens [n, H] of its placeholders, or None.
    """

    tokens: np.ndarray
    real: np.ndarray
    canvas: np.ndarray
    supervised: np.ndarray
    features: Sequence[mx.array | None] = ()


class Noise(NamedTuple):
    """What is drawn for a batch."""

    t: mx.array  # [B] float32
    canvas: mx.array  # [B, C] int32, corrupted
    conditioned: np.ndarray  # [B] bool, which samples take the first pass


class Part(NamedTuple):
    """Rows of a batch."""

    batch: Batch
    noise: Noise
    shares: tuple[float, float]  # of them in the batch's canvas loss and in its encoder loss


class Losses(NamedTuple):
    """Scalars, float32, nats a token."""

    total: mx.array
    canvas: mx.array
    encoder: mx.array


def draw(batch: Batch, objective: Objective, vocab_size: int, key: mx.array) -> Noise:
    """Draw a batch's noise from a random key."""
    keys = mx.random.split(key, len(batch.canvas))
    first, second, third = rng.split(keys, 3)

    def uniform(own: mx.array) -> mx.array:
        return mx.vmap(lambda key: mx.random.uniform(key=key))(own)

    t = objective.noise_min + (objective.noise_max - objective.noise_min) * uniform(first)
    conditioned = np.asarray(uniform(third) < objective.self_conditioning)
    return Noise(t, rng.corrupt(mx.array(batch.canvas), t, vocab_size, second), conditioned)


def split(batch: Batch, noise: Noise, objective: Objective, image_token_id: int | None, count: int) -> list[Part]:
    """Parts of a batch, like in cost, whose losses and gradients add up to its own."""
    dealt = np.argsort(noise.conditioned, kind="stable")
    counted = batch.supervised, _next_counts(batch, image_token_id)
    parts = []
    for i in range(count):
        rows = dealt[i::count]
        at = mx.array(rows)
        if objective.by_token:
            canvas, encoder = (float(one[rows].sum() / max(one.sum(), 1)) for one in counted)
        else:
            canvas = encoder = len(rows) / len(dealt)
        features = [batch.features[row] for row in rows] if batch.features else []
        own = Batch(batch.tokens[rows], batch.real[rows], batch.canvas[rows], batch.supervised[rows], features)
        drawn = Noise(noise.t[at], noise.canvas[at], noise.conditioned[rows])
        parts.append(Part(own, drawn, (canvas, encoder)))
    return parts


def loss(
    model: DiffusionGemma,
    batch: Batch,
    noise: Noise,
    objective: Objective,
    shares: tuple[float, float] = (1.0, 1.0),
) -> Losses:
    """The loss of a batch under given noise; lazy, to be differentiated.

    Args:
        model: that denoises.
        batch: clean.
        noise: drawn for it.
        objective: how the loss is made.
        shares: see `Part`.

    Raises:
        PromptError: placeholders and soft tokens differ in number.
    """
    rows, length = batch.canvas.shape
    prefix = model.new_prefix(rows, capacity=batch.tokens.shape[1] + length)
    padded = None if batch.real.all() else batch.real
    features = [one for one in batch.features if one is not None]
    soft = mx.concatenate(features) if features else None
    states = model.encode(mx.array(batch.tokens), prefix, mask=padded, features=soft)
    conditioning = None
    if noise.conditioned.any():
        # on a copy: what the first pass writes must not stand in the second one's way
        taken = np.flatnonzero(noise.conditioned)
        held, index = prefix.fork(), mx.array(taken)
        held.select_rows(taken.tolist())
        hidden = mx.stop_gradient(model.denoise(noise.canvas[index], held))
        found = mx.stop_gradient(_expected(model, hidden))
        conditioning = mx.zeros((rows, *found.shape[1:]), found.dtype)
        conditioning[index] = found
    encoder = shares[1] * _next_tokens(model, batch, states, prefix, objective)
    hidden = model.denoise(noise.canvas, prefix, conditioning)
    shift = None
    if objective.leave_one_out:
        vocab = model.config.text.vocab_size
        shift = mx.log(1 + vocab * (1 - noise.t) / noise.t)[:, None]
    where = np.flatnonzero(batch.supervised)
    lost = cross_entropy(
        model,
        hidden.reshape(rows * length, -1)[mx.array(where)],
        batch.canvas.reshape(-1)[where],
        None if shift is None else mx.broadcast_to(shift, (rows, length)).reshape(-1)[mx.array(where)],
        noise.canvas.reshape(-1)[mx.array(where)],
    )
    weight = mx.minimum(1 / mx.maximum(1 - noise.t, 1e-9), objective.clip) if objective.reweighted else None
    canvas = shares[0] * _mean(lost, batch.supervised, objective.by_token, weight)
    return Losses(canvas + objective.encoder_weight * encoder, canvas, encoder)


def _expected(model: DiffusionGemma, hidden: mx.array) -> mx.array:
    """[B, C, H] what a step that read this conditions the next one on, at temperature 1, in pieces of `LOGITS`."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    size = max(LOGITS // (4 * model.config.text.vocab_size), 1)
    parts = []
    for start in range(0, flat.shape[1], size):
        parts.append(model.condition(model.logits(flat[:, start : start + size])))
        flat = mx.depends(flat, [parts[-1]])  # one piece in memory at a time
    return mx.concatenate(parts, axis=1).reshape(hidden.shape)


def _next_tokens(model: DiffusionGemma, batch: Batch, states: mx.array, prefix: Any, objective: Objective) -> mx.array:
    """The encoder's loss: cross entropy of every token behind the first, of prefix and canvas."""
    if not objective.encoder_weight:
        return mx.array(0.0)
    canvas = mx.array(batch.canvas[:, :-1])
    if canvas.shape[1]:
        states = mx.concatenate([states, model.encode(canvas, prefix.fork())], axis=1)
    targets = np.concatenate([batch.tokens, batch.canvas], axis=1)
    counts = _next_counts(batch, model.config.image_token_id)
    where = np.flatnonzero(counts)
    flat = states.reshape(-1, states.shape[-1])[mx.array(where)]
    return _mean(cross_entropy(model, flat, targets[:, 1:].reshape(-1)[where]), counts, objective.by_token)


def _next_counts(batch: Batch, image_token_id: int | None) -> np.ndarray:
    """[B, P + C - 1] bool, which tokens behind the first count in the encoder's loss."""
    counts = np.concatenate([batch.real & (batch.tokens != image_token_id), batch.supervised], axis=1)
    return counts[:, 1:] & np.pad(batch.real, ((0, 0), (0, batch.canvas.shape[1] - 1)), constant_values=True)


def _mean(lost: mx.array, counts: np.ndarray, by_token: bool, weight: mx.array | None = None) -> mx.array:
    """The batch's mean of [N] values, those of `counts` [B, L], in its order; `weight` [B] by row."""
    rows = np.nonzero(counts)[0]
    numbers = np.maximum(counts.sum(axis=1), 1)
    shares = np.full(len(rows), 1 / max(len(rows), 1)) if by_token else 1 / numbers[rows] / len(counts)
    scale = mx.array(shares.astype(np.float32))
    return (lost * (scale if weight is None else scale * weight[mx.array(rows)])).sum()


def cross_entropy(
    model: DiffusionGemma,
    hidden: mx.array,
    targets: np.ndarray,
    shift: mx.array | None = None,
    seen: mx.array | None = None,
) -> mx.array:
    """Cross entropy of tokens under the head, without ever holding more than `LOGITS` bytes of logits.

    Args:
        hidden: [N, H].
        targets: [N] token ids.
        shift: [N], added to the logit of the token that is seen there, or None.
        seen: [N] token ids, for `shift`.

    Returns:
        [N] float32, nats.
    """
    table = model.model.decoder.embed_tokens

    def lost(weights: dict, hidden: mx.array, cut: slice) -> mx.array:
        table.update(weights)
        logits, own = model.logits(hidden[None])[0], ids[cut]
        total, picked = mx.logsumexp(logits, axis=-1), mx.take_along_axis(logits, own[:, None], axis=-1)[:, 0]
        if shift is not None and seen is not None:
            by, at = shift[cut], seen[cut]
            raised = mx.take_along_axis(logits, at[:, None], axis=-1)[:, 0] + by + mx.log1p(-mx.exp(-by))
            total, picked = mx.logaddexp(total, raised), picked + mx.where(at == own, by, 0)
        return total - picked

    size = max(LOGITS // (4 * model.config.text.vocab_size), 1)
    ids, found = mx.array(targets.astype(np.int32)), []
    for start in range(0, hidden.shape[0], size):
        cut = slice(start, start + size)
        piece: Callable = partial(lost, cut=cut)  # token ids are no arguments of it: they have no gradient
        if size < hidden.shape[0]:
            piece = mx.checkpoint(piece)
        found.append(piece(table.trainable_parameters(), hidden[cut]))
        hidden = mx.depends(hidden, [found[-1]])
    return mx.concatenate(found) if found else mx.zeros((0,))


def recomputed(layer: Layer, x: mx.array, scalar: mx.array, context: LayerContext) -> mx.array:
    """`Layer.__call__`, with everything inside it computed again for the gradient instead of kept."""
    (cache,) = context.caches
    held = [a for a in (cache.keys, cache.values) if a is not None]

    def run(weights: dict, x: mx.array, scalar: mx.array, *held: mx.array) -> tuple[mx.array, ...]:
        layer.update(weights)
        kv = LayerKV(cache.window_slots, cache.capacity)
        if held:
            kv.keys, kv.values = (mx.array(a) for a in held)
        out = layer(x, scalar, context._replace(caches=[kv]))
        assert kv.keys is not None and kv.values is not None
        return out, kv.keys, kv.values

    again: Callable[..., tuple[mx.array, ...]] = mx.checkpoint(run)
    out, cache.keys, cache.values = again(layer.trainable_parameters(), x, scalar, *held)
    return out
