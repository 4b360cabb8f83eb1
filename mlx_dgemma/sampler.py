"""The checkpoint's sampler as pure functions of arrays: temperature, acceptance, noise, stop rule.

B is the batch, C the canvas length, V the vocabulary. Formulas: the entropy-bound sampler of
arXiv 2505.24857 as Transformers' diffusion_gemma computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def temperature(remaining: int, steps: int, t_min: float, t_max: float) -> float:
    """Temperature with `remaining` of `steps` denoising steps to go: t_max at first, near t_min at last."""
    return t_min + (t_max - t_min) * (remaining / steps)


def entropy(logits: mx.array) -> mx.array:
    """[B, C, V] float32 -> Shannon entropy [B, C] in nats."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(log_p) * log_p).sum(axis=-1)


def accept(uncertainty: mx.array, bound: float) -> mx.array:
    """Positions to keep: the most certain ones, while the entropies before each sum to `bound` at most.

    Args:
        uncertainty: [B, C] entropies in nats.
        bound: the sum bounds the mutual information of what is accepted together.

    Returns:
        [B, C] bool; the most certain position of each row is always accepted.
    """
    order = mx.argsort(uncertainty, axis=-1)
    ascending = mx.take_along_axis(uncertainty, order, axis=-1)
    within = mx.cumsum(ascending, axis=-1) - ascending <= bound
    return mx.put_along_axis(mx.zeros(uncertainty.shape, mx.bool_), order, within, axis=-1)


def sample(logits: mx.array, keys: mx.array) -> mx.array:
    """One token per position by the Gumbel-max trick: [B, C, V] and keys [B, 2] -> [B, C] int32."""
    shape = logits.shape[1:]
    gumbel = mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(keys)
    return mx.argmax(logits + gumbel, axis=-1).astype(mx.int32)


def noise(length: int, vocab_size: int, keys: mx.array) -> mx.array:
    """Uniform random tokens: keys [B, 2] -> [B, length] int32."""
    return mx.vmap(lambda key: mx.random.randint(0, vocab_size, (length,), key=key))(keys)


def settled(
    best: mx.array, earlier: Sequence[mx.array], uncertainty: mx.array, stability: int, confidence: float
) -> mx.array:
    """The stop rule: argmax unchanged over the last `stability` steps, and certain on average.

    Args:
        best: [B, C] argmax of this step.
        earlier: the argmaxes of the steps before, oldest first.
        uncertainty: [B, C] entropies in nats.
        stability: how many earlier argmaxes must equal this one.
        confidence: bound of the mean entropy in nats (exclusive).

    Returns:
        [B] bool.
    """
    confident = uncertainty.mean(axis=-1) < confidence
    if len(earlier) < stability:
        return mx.zeros(confident.shape, mx.bool_)
    for other in list(earlier)[len(earlier) - stability :]:
        confident = confident & (best == other).all(axis=-1)
    return confident


def split(keys: mx.array, count: int) -> mx.array:
    """Independent random keys for each row: [B, 2] -> [count, B, 2] uint32."""
    return mx.vmap(lambda key: mx.random.split(key, count))(keys).swapaxes(0, 1)
