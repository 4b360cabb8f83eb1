"""Bounds of an answer's likelihood under the denoising process.

The process is training's own: at time t a token has been replaced by a uniform random one with probability t. Each
position is a Markov chain whose jumps come at the rate 1 / (1 - t); run backwards from uniform noise it ends in the
clean token. What the denoiser's jump rates cost against the true ones, over all t, bounds -log p of a canvas from above
(the continuous-time bound of arXiv 2412.10193, here with the rates that are the expectation of the true ones under the
denoiser's posterior, which is their optimum).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import DataError
from ..model import rng
from .batches import Batches, canvases
from .objective import LOGITS

if TYPE_CHECKING:
    from ..engine import Engine
    from ..model.diffusion_gemma import DiffusionGemma
    from .data import Example


@dataclass(frozen=True)
class Bound:
    """A bound of the answers' likelihood; the error is the standard error over the draws, None of a single one.

    Attributes:
        nats: upper bound of -log p of all canvases, fill included, for every token of the answers.
        error: of `nats`.
        tokens: of the answers.
        canvases: that hold them.
    """

    nats: float
    error: float | None
    tokens: int
    canvases: int


def cost(log_p: mx.array, clean: mx.array, noisy: mx.array, t: mx.array) -> mx.array:
    """What each position adds to the bound at time t: the integrand over t from 0 to 1.

    Args:
        log_p: [N, V] float32, log-probabilities of the clean token, by the denoiser.
        clean: [N] int32.
        noisy: [N] int32, what stands there at time t.
        t: [N] float32, within (0, 1).

    Returns:
        [N] float32, nats; at least 0.
    """
    vocab, c = (
        log_p.shape[-1],
        (log_p.shape[-1] * (1 - t) + t)[:, None] / t[:, None],
    )  # how much likelier the clean one is
    ids, at, kept = mx.arange(vocab), noisy[:, None], (clean == noisy)[:, None]
    here = mx.take_along_axis(log_p, at, axis=-1)
    # rates of a jump to each token, and what each costs: no difference of near numbers, whatever c is
    rates = mx.exp(log_p) * (c - 1) + (mx.exp(here) / c - mx.expm1(here))
    goal = (ids == clean[:, None]) & ~kept
    scale, weight = mx.where(kept, c, mx.where(goal, 1 / c, 1)), mx.where(kept, 1 / c, mx.where(goal, c, 1))
    ratio = mx.where(ids == at, 1, rates * scale)
    return (weight * (ratio - 1 - mx.log(ratio))).sum(axis=-1) / (vocab * (1 - t))


def bound(engine: Engine, examples: Sequence[Example], fill: int, draws: int = 8, seed: int = 0) -> Bound:
    """Bound the likelihood of the examples' last answers.

    Args:
        engine: whose model denoises.
        examples: from `tune.data.read`.
        fill: the token behind an answer in its last canvas.
        draws: times per canvas, one from each of as many equal parts of (0, 1).
        seed: of times and noise.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("There are no examples to bound; give at least one.")
    sums, tokens, count = np.zeros(draws), 0, 0
    key = mx.random.key(seed)
    for example in examples:
        target = example.targets[-1]
        soft = Batches(engine, [example], fill, True, seed).soft_tokens(target)
        tokens += len(target.answer)
        for one in canvases(target, engine.config.canvas_length, fill):
            key, own = mx.random.split(key)
            sums += _canvas(engine.model, one.prefix, one.tokens, soft, draws, own)
            count += 1
    error = float(sums.std(ddof=1) / draws**0.5 / tokens) if draws > 1 else None
    return Bound(float(sums.mean() / tokens), error, tokens, count)


def _canvas(
    model: DiffusionGemma, tokens: list[int], clean: list[int], soft: mx.array | None, draws: int, key: mx.array
) -> np.ndarray:
    """[draws] estimates of a canvas's bound."""
    prefix = model.new_prefix(1, capacity=len(tokens) + len(clean))
    model.encode(mx.array([tokens]), prefix, features=soft)
    first, second = mx.random.split(key)
    times = (mx.arange(draws) + mx.random.uniform(shape=(draws,), key=first)) / draws
    times = mx.clip(times, 1e-4, 1 - 1e-4)
    vocab, found = model.config.text.vocab_size, []
    size = max(LOGITS // (4 * vocab), 1)
    for t, own in zip(times, mx.random.split(second, draws)):
        canvas = mx.array([clean], mx.int32)
        noisy = rng.corrupt(canvas, t[None], vocab, own[None])
        hidden, lost = model.denoise(noisy, prefix), mx.array(0.0)
        for start in range(0, len(clean), size):
            cut = slice(start, start + size)
            logits = model.logits(hidden[:, cut])[0]
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            share = mx.broadcast_to(t, noisy[0, cut].shape)
            lost = lost + cost(log_p, canvas[0, cut], noisy[0, cut], share).sum()
        found.append(lost.item())
    return np.array(found)
