"""The samplers as pure functions of arrays: `draw` of a token; temperature, acceptance, stop rule of a canvas.

B is the batch, C the canvas length, V the vocabulary. Formulas: the entropy-bound sampler of
arXiv 2505.24857 as Transformers' diffusion_gemma computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from ..model import rng
from .options import Sampling


def draw(
    logits: mx.array,
    sampling: Sampling,
    keys: mx.array | None,
    seen: mx.array | None = None,
    allowed: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """One token for each of L positions of a text that comes token by token.

    Args:
        logits: [L, V] float32, softcapped.
        sampling: how to draw.
        keys: [L, 2], a random key for each position; not read at temperature 0.
        seen: [L, V] or [1, V] bool, tokens that the penalty applies to; None: no penalty.
        allowed: [L, V] or [1, V] bool, tokens that may be drawn; None: all.

    Returns:
        tokens: [L] int32.
        log_probs: [L] float32, theirs in nats by the model's own distribution: temperature, cuts, penalty and
            constraint do not count.
    """
    scores = logits
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = mx.where(seen, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
    if allowed is not None:
        scores = mx.where(allowed, scores, -mx.inf)
    if sampling.temperature > 0 and keys is not None:
        scores = scores / sampling.temperature
        scores = mx.where(scores < lowest_kept(scores, sampling), -mx.inf, scores)
        scores = scores + rng.gumbel(scores.shape[1:], keys)
    tokens = mx.argmax(scores, axis=-1, keepdims=True).astype(mx.int32)
    own = mx.take_along_axis(logits, tokens, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    return tokens[:, 0], own[:, 0]


def lowest_kept(scores: mx.array, sampling: Sampling) -> mx.array:
    """[L, V] logits over the temperature -> [L, 1], the lowest that top_k, top_p and min_p leave, in this order."""
    lowest = mx.full((scores.shape[0], 1), -mx.inf)
    if sampling.top_k or sampling.top_p < 1:
        ordered = mx.sort(scores, axis=-1)[:, ::-1]
        if 0 < sampling.top_k < scores.shape[-1]:
            ordered = ordered[:, : sampling.top_k]
        p = mx.softmax(ordered, axis=-1, precise=True)
        kept = (mx.cumsum(p, axis=-1) - p < sampling.top_p).sum(axis=-1, keepdims=True)
        lowest = mx.take_along_axis(ordered, mx.maximum(kept, 1) - 1, axis=-1)
    if sampling.min_p > 0:
        lowest = mx.maximum(lowest, scores.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    return lowest


def temperature(remaining: int, steps: int, t_min: float, t_max: float) -> float:
    """Temperature with `remaining` of `steps` denoising steps to go: t_max at first, near t_min at last."""
    return t_min + (t_max - t_min) * (remaining / steps)


def accept(uncertainty: mx.array, bound: float | mx.array) -> mx.array:
    """Positions to keep: the most certain ones, while the entropies before each sum to `bound` at most.

    Args:
        uncertainty: [B, C] entropies in nats.
        bound: the sum bounds the mutual information of what is accepted together; a number, or [B, 1].

    Returns:
        [B, C] bool; the most certain position of each row is always accepted.
    """
    order = mx.argsort(uncertainty, axis=-1)
    ascending = mx.take_along_axis(uncertainty, order, axis=-1)
    within = mx.cumsum(ascending, axis=-1) - ascending <= bound
    return mx.put_along_axis(mx.zeros(uncertainty.shape, mx.bool_), order, within, axis=-1)


def accept_confident(
    confidence: mx.array, kept: mx.array, threshold: float, likely: float, unlikely: float
) -> mx.array:
    """Positions to keep for good: the confident ones, up to two of the others, and the kept.

    Fast-dLLM (arXiv 2505.22618) takes one of the others only where none is confident. Here each step also decides open
    questions, beside what follows from those that were decided before: the best position whose token is likely, and the
    best of those where so many tokens are possible that one is as good as another. What lies between a few tokens waits
    for the next step.

    Args:
        confidence: [B, C] probability of the most probable token; negative where nothing was computed.
        kept: [B, C] bool, positions that were kept before.
        threshold: probability from which on a position is confident. Where none is, the best of all is kept.
        likely: probability from which on one of the others is kept although there are confident ones.
        unlikely: probability up to which one more is.

    Returns:
        [B, C] bool.
    """
    free = ~kept & (confidence >= 0)
    confident = free & (confidence >= threshold)
    none = ~confident.any(axis=-1, keepdims=True)
    others = free & ~confident
    taken = kept | confident
    for some in (others & (none | (confidence >= likely)), others & ~none & (confidence <= unlikely)):
        weighed = mx.where(some, confidence, -1)
        taken = taken | (some & (weighed == weighed.max(axis=-1, keepdims=True)))
    return taken


def text(best: mx.array, end_tokens: mx.array, room: mx.array) -> mx.array:
    """Positions that an answer is made of: up to and including the first end token, and within its room.

    Args:
        best: [B, C] argmax of a step.
        end_tokens: [N] token ids.
        room: [B] tokens that may still be taken.

    Returns:
        [B, C] bool.
    """
    ends = (best[..., None] == end_tokens).any(axis=-1).astype(mx.int32)
    before = mx.cumsum(ends, axis=-1) - ends
    return (before == 0) & (mx.arange(best.shape[-1]) < room[:, None])


def settled(
    best: mx.array,
    earlier: Sequence[mx.array],
    uncertainty: mx.array,
    stability: int,
    confidence: float,
    where: mx.array | None = None,
) -> mx.array:
    """The reference's stop rule: argmax unchanged over the last `stability` steps, and certain on average.

    Args:
        best: [B, C] argmax of this step.
        earlier: the argmaxes of the steps before, oldest first.
        uncertainty: [B, C] entropies in nats.
        stability: how many earlier argmaxes must equal this one.
        confidence: bound of the mean entropy in nats (exclusive).
        where: [B, C] bool, positions that count; what lies behind an answer passes for certain. None: all.

    Returns:
        [B] bool.
    """
    if where is not None:
        uncertainty = mx.where(where, uncertainty, 0)
    confident = uncertainty.mean(axis=-1) < confidence
    return confident & unchanged(best, earlier, stability, where)


def unchanged(best: mx.array, earlier: Sequence[mx.array], steps: int, where: mx.array | None = None) -> mx.array:
    """[B] bool: the argmax equals that of the last `steps` steps at every position that counts (None: all)."""
    if len(earlier) < steps:
        return mx.zeros(best.shape[:1], mx.bool_)
    same = mx.ones(best.shape, mx.bool_)
    for other in list(earlier)[len(earlier) - steps :]:
        same = same & (best == other)
    return (same if where is None else same | ~where).all(axis=-1)


def certain(uncertainty: mx.array, threshold: float, where: mx.array) -> mx.array:
    """[B] bool: no position that counts has an entropy of `threshold` nats or more."""
    return ((uncertainty < threshold) | ~where).all(axis=-1)
