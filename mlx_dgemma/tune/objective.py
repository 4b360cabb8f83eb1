"""The training objective: block diffusion with uniform noise, and the encoder's next-token loss.

A sample is a prefix (the prompt and earlier blocks) and one canvas. The prefix is encoded causally, as in inference.
Each token of the canvas is replaced by a random token with probability t, where t is uniform. The canvas loss is the
cross entropy of all clean tokens. The formulas come from the references at `VARIANTS`; the corruption is the sampler's
own (`rng.corrupt`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..model import rng
from ..model.attention import LayerContext
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import LayerKV
from ..model.layers import Layer

MAX_LOGITS_BYTES = 2**26  # float32 logits in memory at once; more are computed in chunks, and again for the gradient


class Trainable(Protocol):
    """What a `Trainer` can train towards. Batches and noise are of the objective's own kinds and can be pickled."""

    parts: ClassVar[tuple[str, ...]]  # names of the losses behind the total

    def draw(self, batch: Any, vocab_size: int, key: mx.array) -> Any:
        """The random part of a batch's loss."""

    def split(self, batch: Any, noise: Any, image_token_id: int | None, count: int) -> list[BatchPart]:
        """`count` parts of similar cost, whose losses and gradients sum to those of the batch."""

    def loss(self, model: DiffusionGemma, batch: Any, noise: Any, weights: tuple[float, float]) -> tuple[mx.array, ...]:
        """The total to differentiate, then its `parts`; lazy."""


@dataclass(frozen=True)
class Objective:
    """The parameters of the loss.

    Attributes:
        noise_min: smallest t. Canvases that are nearly clean teach little.
        noise_max: largest t.
        reweighted: weight each canvas by 1 / (1 - t), the rate at which tokens are replaced.
        leave_one_out: predict each token from all others (arXiv 2605.22765): before the softmax, the logit of the
            position's noisy token is raised by log(1 + V * (1 - t) / t).
        fill: include all tokens that fill the last canvas in the loss; otherwise only the answer's end token counts.
        by_token: average a batch over its tokens; otherwise first over each sample, then over samples.
        encoder_weight: weight of the encoder's next-token loss over prefix and canvas, without image tokens.
        self_conditioning: probability that a sample is conditioned on a first denoising pass, as later denoising steps
            are. Otherwise it is conditioned on zeros, as the first step is.
        clip: upper bound of 1 / (1 - t).
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
    parts: ClassVar[tuple[str, ...]] = ("canvas", "encoder")

    def draw(self, batch: Batch, vocab_size: int, key: mx.array) -> Noise:
        """See `draw_noise`."""
        return draw_noise(batch, self, vocab_size, key)

    def split(self, batch: Batch, noise: Noise, image_token_id: int | None, count: int) -> list[BatchPart]:
        """See `split_batch`."""
        return split_batch(batch, noise, self, image_token_id, count)

    def loss(self, model: DiffusionGemma, batch: Batch, noise: Noise, weights: tuple[float, float]) -> Losses:
        """See `loss`."""
        return loss(model, batch, noise, self, weights)


VARIANTS = {
    # google-deepmind/gemma, diffusion: all canvas tokens have the same weight
    "google": Objective(),
    # NVIDIA NeMo AutoModel: other bounds of t, and a mean over tokens
    "nemo": Objective(noise_min=1e-3, noise_max=1.0, by_token=True),
    # NVIDIA Megatron-Bridge: the fill tokens of the last canvas do not count
    "megatron": Objective(noise_min=1e-3, noise_max=1 - 1e-3, fill=False),
    "megatron-reweighted": Objective(noise_min=1e-3, noise_max=1 - 1e-3, fill=False, reweighted=True),
    "megatron-loo": Objective(noise_min=1e-3, noise_max=1 - 1e-3, fill=False, leave_one_out=True),
    "megatron-reweighted-loo": Objective(
        noise_min=1e-3, noise_max=1 - 1e-3, fill=False, reweighted=True, leave_one_out=True
    ),
}
"""The published objectives by source."""


@dataclass(frozen=True)
class Batch:
    """Samples of a batch. Prefixes are padded on the left, so that all canvases start at the same position.

    Attributes:
        tokens: [B, P] int32, the prefixes.
        mask: [B, P] bool, False for padding.
        canvas: [B, C] int32, the clean canvases.
        supervised: [B, C] bool, canvas tokens that count in both losses.
        features: for each row the soft tokens [n, H] of its image placeholders, or None. May be empty.
    """

    tokens: np.ndarray
    mask: np.ndarray
    canvas: np.ndarray
    supervised: np.ndarray
    features: Sequence[mx.array | None] = ()


class Noise(NamedTuple):
    """The random part of a batch's loss."""

    t: mx.array  # [B] float32
    canvas: mx.array  # [B, C] int32, the noisy canvases
    conditioned: np.ndarray  # [B] bool, samples that are conditioned on a first pass


class BatchPart(NamedTuple):
    """Some rows of a batch."""

    batch: Any
    noise: Any
    weights: tuple[float, float]  # of their first and second kind of loss in that of the batch: canvas and encoder


class Losses(NamedTuple):
    """Scalars, float32, nats per token."""

    total: mx.array
    canvas: mx.array
    encoder: mx.array


def draw_noise(batch: Batch, objective: Objective, vocab_size: int, key: mx.array) -> Noise:
    """Draw the noise of a batch from a random key."""
    keys = mx.random.split(key, len(batch.canvas))
    first, second, third = rng.split(keys, 3)

    def uniform(keys: mx.array) -> mx.array:
        return mx.vmap(lambda key: mx.random.uniform(key=key))(keys)

    t = objective.noise_min + (objective.noise_max - objective.noise_min) * uniform(first)
    conditioned = np.asarray(uniform(third) < objective.self_conditioning)
    return Noise(t, rng.corrupt(mx.array(batch.canvas), t, vocab_size, second), conditioned)


def split_batch(
    batch: Batch, noise: Noise, objective: Objective, image_token_id: int | None, count: int
) -> list[BatchPart]:
    """Split a batch into `count` parts of similar cost. Their losses and gradients sum to those of the batch."""
    order = np.argsort(noise.conditioned, kind="stable")
    counted = batch.supervised, _encoder_mask(batch, image_token_id)
    parts = []
    for i in range(count):
        rows = order[i::count]
        at = mx.array(rows)
        if objective.by_token:
            canvas, encoder = (float(mask[rows].sum() / max(mask.sum(), 1)) for mask in counted)
        else:
            canvas = encoder = len(rows) / len(order)
        features = [batch.features[row] for row in rows] if batch.features else []
        own = Batch(batch.tokens[rows], batch.mask[rows], batch.canvas[rows], batch.supervised[rows], features)
        own_noise = Noise(noise.t[at], noise.canvas[at], noise.conditioned[rows])
        parts.append(BatchPart(own, own_noise, (canvas, encoder)))
    return parts


def loss(
    model: DiffusionGemma,
    batch: Batch,
    noise: Noise,
    objective: Objective,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Losses:
    """The loss of a batch with given noise; lazy, so that it can be differentiated.

    Args:
        model: the model to train.
        batch: the clean samples.
        noise: from `draw_noise`.
        objective: the parameters of the loss.
        weights: factors of the canvas loss and the encoder loss, see `BatchPart`.

    Raises:
        PromptError: the numbers of image placeholders and soft tokens differ.
    """
    rows, length = batch.canvas.shape
    prefix = model.new_prefix(rows, capacity=batch.tokens.shape[1] + length)
    mask = None if batch.mask.all() else batch.mask
    features = [soft_tokens for soft_tokens in batch.features if soft_tokens is not None]
    soft = mx.concatenate(features) if features else None
    states = model.encode(mx.array(batch.tokens), prefix, mask=mask, features=soft)
    conditioning = None
    if noise.conditioned.any():
        # The first pass uses a copy of the prefix, because denoising writes into it.
        selected = np.flatnonzero(noise.conditioned)
        copy, index = prefix.fork(), mx.array(selected)
        copy.select_rows(selected.tolist())
        hidden = mx.stop_gradient(model.denoise(noise.canvas[index], copy))
        first_pass = mx.stop_gradient(_self_conditioning(model, hidden))
        conditioning = mx.zeros((rows, *first_pass.shape[1:]), first_pass.dtype)
        conditioning[index] = first_pass
    encoder = weights[1] * _encoder_loss(model, batch, states, prefix, objective)
    hidden = model.denoise(noise.canvas, prefix, conditioning)
    shift = None
    if objective.leave_one_out:
        vocab = model.config.text.vocab_size
        shift = mx.log(1 + vocab * (1 - noise.t) / noise.t)[:, None]
    where = np.flatnonzero(batch.supervised)
    losses = cross_entropy(
        model,
        hidden.reshape(rows * length, -1)[mx.array(where)],
        batch.canvas.reshape(-1)[where],
        None if shift is None else mx.broadcast_to(shift, (rows, length)).reshape(-1)[mx.array(where)],
        noise.canvas.reshape(-1)[mx.array(where)],
    )
    row_weights = mx.minimum(1 / mx.maximum(1 - noise.t, 1e-9), objective.clip) if objective.reweighted else None
    canvas = weights[0] * mean_loss(losses, batch.supervised, objective.by_token, row_weights)
    return Losses(canvas + objective.encoder_weight * encoder, canvas, encoder)


def positions_per_chunk(vocab_size: int) -> int:
    """How many positions' logits fit into `MAX_LOGITS_BYTES`."""
    return max(MAX_LOGITS_BYTES // (4 * vocab_size), 1)


def _self_conditioning(model: DiffusionGemma, hidden: mx.array) -> mx.array:
    """[B, C, H] conditioning of the next step at temperature 1, from a step's hidden states; computed in chunks."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    size = positions_per_chunk(model.config.text.vocab_size)
    chunks = []
    for start in range(0, flat.shape[1], size):
        chunks.append(model.condition(model.logits(flat[:, start : start + size])))
        flat = mx.depends(flat, [chunks[-1]])  # compute one chunk after the other, to bound memory
    return mx.concatenate(chunks, axis=1).reshape(hidden.shape)


def _encoder_loss(model: DiffusionGemma, batch: Batch, states: mx.array, prefix: Any, objective: Objective) -> mx.array:
    """Mean cross entropy of the encoder's next-token prediction, over prefix and canvas."""
    if not objective.encoder_weight:
        return mx.array(0.0)
    canvas = mx.array(batch.canvas[:, :-1])
    if canvas.shape[1]:
        states = mx.concatenate([states, model.encode(canvas, prefix.fork())], axis=1)
    targets = np.concatenate([batch.tokens, batch.canvas], axis=1)
    mask = _encoder_mask(batch, model.config.image_token_id)
    where = np.flatnonzero(mask)
    flat = states.reshape(-1, states.shape[-1])[mx.array(where)]
    return mean_loss(cross_entropy(model, flat, targets[:, 1:].reshape(-1)[where]), mask, objective.by_token)


def _encoder_mask(batch: Batch, image_token_id: int | None) -> np.ndarray:
    """[B, P + C - 1] bool, which tokens count in the encoder's loss; the first token of a row has no prediction."""
    counts = np.concatenate([batch.mask & (batch.tokens != image_token_id), batch.supervised], axis=1)
    return counts[:, 1:] & np.pad(batch.mask, ((0, 0), (0, batch.canvas.shape[1] - 1)), constant_values=True)


def mean_loss(values: mx.array, mask: np.ndarray, by_token: bool, row_weights: mx.array | None = None) -> mx.array:
    """Mean of a batch.

    Args:
        values: [N], one for each True of the mask, in its order.
        mask: [B, L].
        by_token: average over all values; otherwise over each row first, then over rows.
        row_weights: [B], factors of the rows.
    """
    rows = np.nonzero(mask)[0]
    lengths = np.maximum(mask.sum(axis=1), 1)
    shares = np.full(len(rows), 1 / max(len(rows), 1)) if by_token else 1 / lengths[rows] / len(mask)
    scale = mx.array(shares.astype(np.float32))
    return (values * (scale if row_weights is None else scale * row_weights[mx.array(rows)])).sum()


def cross_entropy(
    model: DiffusionGemma,
    hidden: mx.array,
    targets: np.ndarray,
    shift: mx.array | None = None,
    noisy: mx.array | None = None,
) -> mx.array:
    """Cross entropy of tokens, with at most `MAX_LOGITS_BYTES` of logits in memory.

    Args:
        model: provides the head.
        hidden: [N, H] hidden states.
        targets: [N] token ids.
        shift: [N], added to the logit of the noisy token at each position, or None.
        noisy: [N] token ids, needed with `shift`.

    Returns:
        [N] float32, nats.
    """
    table = model.model.decoder.embed_tokens

    def losses(weights: dict, hidden: mx.array, cut: slice) -> mx.array:
        table.update(weights)
        logits, own = model.logits(hidden[None])[0], ids[cut]
        total, picked = mx.logsumexp(logits, axis=-1), mx.take_along_axis(logits, own[:, None], axis=-1)[:, 0]
        if shift is not None and noisy is not None:
            by, at = shift[cut], noisy[cut]
            raised = mx.take_along_axis(logits, at[:, None], axis=-1)[:, 0] + by + mx.log1p(-mx.exp(-by))
            total, picked = mx.logaddexp(total, raised), picked + mx.where(at == own, by, 0)
        return total - picked

    size = positions_per_chunk(model.config.text.vocab_size)
    ids, chunks = mx.array(targets.astype(np.int32)), []
    for start in range(0, hidden.shape[0], size):
        cut = slice(start, start + size)
        compute: Callable = partial(losses, cut=cut)  # token ids have no gradient, so they are not arguments
        if size < hidden.shape[0]:
            compute = mx.checkpoint(compute)
        chunks.append(compute(table.trainable_parameters(), hidden[cut]))
        hidden = mx.depends(hidden, [chunks[-1]])  # compute one chunk after the other, to bound memory
    return mx.concatenate(chunks) if chunks else mx.zeros((0,))


def checkpointed_layer(layer: Layer, x: mx.array, scalar: mx.array, context: LayerContext) -> mx.array:
    """`Layer.__call__` with gradient checkpointing: activations are computed again for the gradient, not stored."""
    (cache,) = context.caches
    cached = [a for a in (cache.keys, cache.values) if a is not None]

    def run(weights: dict, x: mx.array, scalar: mx.array, *cached: mx.array) -> tuple[mx.array, ...]:
        layer.update(weights)
        kv = LayerKV(cache.window_slots, cache.capacity)
        if cached:
            kv.keys, kv.values = (mx.array(a) for a in cached)
        out = layer(x, scalar, context._replace(caches=[kv]))
        assert kv.keys is not None and kv.values is not None
        return out, kv.keys, kv.values

    checkpointed: Callable[..., tuple[mx.array, ...]] = mx.checkpoint(run)
    out, cache.keys, cache.values = checkpointed(layer.trainable_parameters(), x, scalar, *cached)
    return out
