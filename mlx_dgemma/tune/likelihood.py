"""The likelihood of texts: exact in causal mode, and an upper bound of -log p under the denoising process.

The process is that of training: at time t a token has been replaced by a uniform random token with probability t. Each
position is a Markov chain with jump rate 1 / (1 - t). Run backwards from uniform noise, it ends in the clean token. The
bound integrates over t how far the denoiser's jump rates are from the true ones. It is the continuous-time bound of
arXiv 2412.10193, with the expected true rates under the denoiser's posterior, which are the optimal rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import DataError
from ..model import rng
from .batches import Batches, split_into_canvases
from .objective import positions_per_chunk

if TYPE_CHECKING:
    from ..engine import Engine
    from ..model.diffusion_gemma import DiffusionGemma
    from ..model.kv_cache import Prefix
    from .data import Example


@dataclass(frozen=True)
class Bound:
    """An upper bound of -log p of answers.

    Attributes:
        nats: the bound, summed over all canvases with their fill tokens, per token of the answers.
        error: standard error of `nats` over the draws; None for a single draw.
        tokens: number of tokens of the answers.
        canvases: number of canvases.
    """

    nats: float
    error: float | None
    tokens: int
    canvases: int


def cost(log_p: mx.array, clean: mx.array, noisy: mx.array, t: mx.array) -> mx.array:
    """The integrand of the bound at time t, for each position; the bound is its integral over t from 0 to 1.

    Args:
        log_p: [N, V] float32, the denoiser's log-probabilities of the clean token.
        clean: [N] int32 clean tokens.
        noisy: [N] int32 tokens at time t.
        t: [N] float32 in (0, 1).

    Returns:
        [N] float32, nats; at least 0.
    """
    vocab = log_p.shape[-1]
    c = (vocab * (1 - t) + t)[:, None] / t[:, None]  # P(noisy = clean) / P(noisy = another token)
    ids, at, kept = mx.arange(vocab), noisy[:, None], (clean == noisy)[:, None]
    here = mx.take_along_axis(log_p, at, axis=-1)
    # Rates of the jumps to each token, and their costs, in a form without cancellation for any c.
    rates = mx.exp(log_p) * (c - 1) + (mx.exp(here) / c - mx.expm1(here))
    goal = (ids == clean[:, None]) & ~kept
    scale, weight = mx.where(kept, c, mx.where(goal, 1 / c, 1)), mx.where(kept, 1 / c, mx.where(goal, c, 1))
    ratio = mx.where(ids == at, 1, rates * scale)
    return (weight * (ratio - 1 - mx.log(ratio))).sum(axis=-1) / (vocab * (1 - t))


def bound(engine: Engine, examples: Sequence[Example], fill: int, draws: int = 8, seed: int = 0) -> Bound:
    """Bound the likelihood of the last answer of each example.

    Args:
        engine: with the model.
        examples: from `tune.data.read`.
        fill: token that fills the rest of an answer's last canvas.
        draws: number of times t per canvas, one in each of so many equal parts of (0, 1).
        seed: of the times and the noise.

    Raises:
        DataError: there are no examples.
        RangeError: the model computed inf or NaN.
    """
    if not examples:
        raise DataError("There are no examples; give at least one.")
    sums, tokens, count = np.zeros(draws), 0, 0
    key = mx.random.key(seed)
    for example in examples:
        target = example.targets[-1]
        features = Batches(engine, [example], fill, True, seed).image_features(target)
        tokens += len(target.answer)
        for sample in split_into_canvases(target, engine.config.canvas_length, fill):
            key, own_key = mx.random.split(key)
            sums += _canvas_bound(engine.model, sample.prefix, sample.tokens, features, draws, own_key)
            count += 1
    error = float(sums.std(ddof=1) / draws**0.5 / tokens) if draws > 1 else None
    return Bound(float(sums.mean() / tokens), error, tokens, count)


def next_token_log_probs(
    model: DiffusionGemma, tokens: Sequence[int], start: int, prefix: Prefix
) -> tuple[np.ndarray, np.ndarray]:
    """How probable tokens are in causal mode, before temperature and cuts.

    Args:
        model: the model.
        tokens: token ids.
        start: the first one that is looked at, at least 1.
        prefix: of tokens[:start - 1]; extended in place by all but the last token.

    Returns:
        [len(tokens) - start] float32, nats, and bool: whether the token is the most probable one.

    Raises:
        RangeError: the model computed inf or NaN.
    """
    log_probs, best, size = [], [], positions_per_chunk(model.config.text.vocab_size)
    for at in range(start, len(tokens), size):
        wanted = mx.array(list(tokens[at : at + size]), mx.int32)
        before = mx.array([list(tokens[at - 1 : at - 1 + len(wanted)])], mx.int32)
        logits = model.logits(model.encode(before, prefix))[0]
        chosen = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        log_probs.append(np.asarray(chosen - mx.logsumexp(logits, axis=-1)))
        best.append(np.asarray(mx.argmax(logits, axis=-1).astype(mx.int32) == wanted))
    found = np.concatenate(log_probs)
    if not np.isfinite(found).all():
        raise model.range_error()
    return found, np.concatenate(best)


def _canvas_bound(
    model: DiffusionGemma, tokens: list[int], clean: list[int], features: mx.array | None, draws: int, key: mx.array
) -> np.ndarray:
    """[draws] estimates of the bound of one canvas.

    Args:
        model: the denoiser.
        tokens: the prefix.
        clean: tokens of the canvas.
        features: soft tokens of the prefix's images, or None.
        draws: number of times.
        key: random key of times and noise.
    """
    prefix = model.new_prefix(1, capacity=len(tokens) + len(clean))
    model.encode(mx.array([tokens]), prefix, features=features)
    first, second = mx.random.split(key)
    times = (mx.arange(draws) + mx.random.uniform(shape=(draws,), key=first)) / draws
    times = mx.clip(times, 1e-4, 1 - 1e-4)
    vocab, estimates = model.config.text.vocab_size, []
    size = positions_per_chunk(vocab)
    for t, own_key in zip(times, mx.random.split(second, draws)):
        canvas = mx.array([clean], mx.int32)
        noisy = rng.corrupt(canvas, t[None], vocab, own_key[None])
        hidden, total = model.denoise(noisy, prefix), mx.array(0.0)
        for start in range(0, len(clean), size):
            cut = slice(start, start + size)
            logits = model.logits(hidden[:, cut])[0]
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            times_of_cut = mx.broadcast_to(t, noisy[0, cut].shape)
            total = total + cost(log_p, canvas[0, cut], noisy[0, cut], times_of_cut).sum()
        estimates.append(total.item())
        if not np.isfinite(estimates[-1]):
            raise model.range_error()
    return np.array(estimates)
