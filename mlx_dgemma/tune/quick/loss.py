"""What a distillation trains towards: early states say what the answer came to, and nothing else changes.

A sample is a canvas in a state that the sampler visits. If its answer is learned, the loss is the cross entropy of the
answer's tokens, and the entropy at positions whose most probable token is right already. If not, it is the divergence
of the model's prediction from the frozen model's at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from ...adapters.deltas import without_adapter
from ...model import rng
from ...model.diffusion_gemma import DiffusionGemma
from ...model.functions import entropy
from ..batches import example_index
from ..objective import BatchPart, mean_loss, positions_per_chunk
from .states import States

MOST_PADDED = 2.5  # length of the longest prefix that is computed with a shorter one, as a multiple of its own


@dataclass(frozen=True)
class StateBatch:
    """Samples of a batch. Prefixes are padded on the left, so that all canvases start at the same position.

    Attributes:
        tokens: [B, P] int32, the prefixes.
        mask: [B, P] bool, False for padding.
        canvas: [B, C] int32, the states.
        noised: [B] float32, share of the state's tokens that are replaced by random ones.
        target: [B, C] int32, the canvases as they are at the end.
        supervised: [B, C] bool, positions that belong to the answer.
        weight: [B] float32, with which the answer is learned; 0: the model is kept as it is.
        conditioned: [B] bool.
        conditioning: [B, C, H] float16, of the rows that are conditioned; 0 elsewhere.
    """

    tokens: np.ndarray
    mask: np.ndarray
    canvas: np.ndarray
    noised: np.ndarray
    target: np.ndarray
    supervised: np.ndarray
    weight: np.ndarray
    conditioned: np.ndarray
    conditioning: np.ndarray

    @property
    def learn(self) -> np.ndarray:
        """[B] bool, rows whose answer is learned."""
        return self.weight > 0

    def rows(self, index: np.ndarray) -> StateBatch:
        """Some rows of the batch."""
        return StateBatch(**{name: array[index] for name, array in vars(self).items()})


class DistillLosses(NamedTuple):
    """Scalars, float32, nats per token."""

    total: mx.array
    early: mx.array
    certainty: mx.array
    divergence: mx.array


@dataclass(frozen=True)
class Distillation:
    """The loss of a distillation, for a `Trainer`.

    Attributes:
        certainty: weight of the entropy at positions that are right.
        divergence: weight of the divergence from the frozen model.
    """

    certainty: float = 0.5
    divergence: float = 1.0
    parts: ClassVar[tuple[str, ...]] = ("early", "certainty", "divergence")

    def draw(self, batch: StateBatch, vocab_size: int, key: mx.array) -> mx.array:
        """The states [B, C] int32 with fresh noise in them."""
        keys = mx.random.split(key, len(batch.canvas))
        return rng.corrupt(mx.array(batch.canvas), mx.array(batch.noised), vocab_size, keys)

    def split(self, batch: StateBatch, noise: mx.array, image_token_id: int | None, count: int) -> list[BatchPart]:
        """`count` parts of similar cost, see `Trainable.split`."""
        order, parts = np.argsort(batch.learn, kind="stable"), []
        for i in range(count):
            rows = order[i::count]
            share = len(rows) / len(order)
            parts.append(BatchPart(batch.rows(rows), noise[mx.array(rows)], (share, share)))
        return parts

    def loss(
        self, model: DiffusionGemma, batch: StateBatch, noise: mx.array, weights: tuple[float, float] = (1.0, 1.0)
    ) -> DistillLosses:
        """The loss of a batch with given noise; lazy, so that it can be differentiated.

        Args:
            model: with the adapter that is trained, in its denoising layers alone.
            batch: the samples.
            noise: from `draw`.
            weights: factors of the losses of what is learned and of what is kept.
        """
        groups = alike(batch.mask.sum(axis=1))
        passed = [self._hidden(model, batch.rows(rows), noise[mx.array(rows)]) for rows in groups]
        batch, divergence = batch.rows(np.concatenate(groups)), mx.array(0.0)
        hidden = mx.concatenate([own for own, _ in passed])
        width, kept = hidden.shape[-1], np.flatnonzero(~batch.learn)
        if len(kept) and self.divergence:
            before = mx.concatenate([frozen for _, frozen in passed if frozen is not None]).reshape(-1, width)
            after = hidden[mx.array(kept)].reshape(-1, width)
            mask = np.broadcast_to(~batch.learn[:, None], batch.canvas.shape)
            divergence = weights[1] * mean_loss(divergences(model, before, after), mask, False)
        mask = batch.supervised & batch.learn[:, None]
        where = mx.array(np.flatnonzero(mask))
        early, unsure = early_losses(model, hidden.reshape(-1, width)[where], batch.target[mask])
        of_rows = mx.array(batch.weight)
        early, unsure = (weights[0] * mean_loss(one, mask, False, of_rows) for one in (early, unsure))
        return DistillLosses(early + self.certainty * unsure + self.divergence * divergence, early, unsure, divergence)

    def _hidden(self, model: DiffusionGemma, batch: StateBatch, noise: mx.array) -> tuple[mx.array, mx.array | None]:
        """Hidden states [B, C, H] of the canvases; of the rows that are kept also the frozen model's, if they count."""
        cut = batch.tokens.shape[1] - batch.mask.sum(axis=1).max()
        tokens, mask = batch.tokens[:, cut:], batch.mask[:, cut:]
        prefix = model.new_prefix(len(tokens), capacity=tokens.shape[1] + noise.shape[1])
        model.encode(mx.array(tokens), prefix, mask=None if mask.all() else mask)
        conditioning = mx.array(batch.conditioning).astype(model.dtype) if batch.conditioned.any() else None
        kept, before = np.flatnonzero(~batch.learn), None
        if len(kept) and self.divergence:
            # The frozen model's pass uses a copy of the prefix, because denoising writes into it.
            copy, at = prefix.fork(), mx.array(kept)
            copy.select_rows(kept.tolist())
            with without_adapter(model):
                before = model.denoise(noise[at], copy, None if conditioning is None else conditioning[at])
            before = mx.stop_gradient(before)
        return model.denoise(noise, prefix, conditioning), before


def alike(lengths: np.ndarray) -> list[np.ndarray]:
    """Groups of rows [B] whose prefixes are about equally long, so that little of what is computed is padding."""
    order, groups = np.argsort(-lengths, kind="stable"), []
    while len(order):
        group = lengths[order] * MOST_PADDED >= lengths[order[0]]
        groups.append(order[group])
        order = order[~group]
    return groups


def early_losses(model: DiffusionGemma, hidden: mx.array, targets: np.ndarray) -> tuple[mx.array, mx.array]:
    """How far predictions are from the answer, and how uncertain they are where they are right.

    Args:
        model: provides the head.
        hidden: [N, H] hidden states.
        targets: [N] token ids.

    Returns:
        [N] float32 cross entropy, and [N] float32 entropy, 0 where another token is the most probable; nats.
    """
    ids = mx.array(targets.astype(np.int32))

    def losses(hidden: mx.array, at: mx.array) -> tuple[mx.array, ...]:
        logits = model.logits(hidden[None])[0]
        picked = mx.take_along_axis(logits, at[:, None], axis=-1)[:, 0]
        right = mx.argmax(logits, axis=-1) == at
        return mx.logsumexp(logits, axis=-1) - picked, mx.where(right, entropy(logits), 0)

    found = _in_chunks(model, losses, [hidden, ids])
    return found[0], found[1]


def divergences(model: DiffusionGemma, before: mx.array, after: mx.array) -> mx.array:
    """[N] float32 nats, KL(frozen || trained) of predictions, from hidden states [N, H] of both."""

    def losses(before: mx.array, after: mx.array) -> tuple[mx.array, ...]:
        frozen, own = (model.logits(hidden[None])[0] for hidden in (before, after))
        frozen = frozen - mx.logsumexp(frozen, axis=-1, keepdims=True)
        own = own - mx.logsumexp(own, axis=-1, keepdims=True)
        return ((mx.exp(frozen) * (frozen - own)).sum(axis=-1),)

    return _in_chunks(model, losses, [before, after])[0]


def _in_chunks(
    model: DiffusionGemma, compute: Callable[..., tuple[mx.array, ...]], arrays: Sequence[mx.array]
) -> list[mx.array]:
    """`compute` of arrays [N, ...], with as many rows at once as their logits may take memory."""
    size, count = positions_per_chunk(model.config.text.vocab_size), arrays[0].shape[0]
    run: Callable[..., tuple[mx.array, ...]] = mx.checkpoint(compute) if size < count else compute
    first, *others = arrays
    chunks = []
    for start in range(0, count, size):
        cut = slice(start, start + size)
        chunks.append(run(first[cut], *(one[cut] for one in others)))
        first = mx.depends(first, [*chunks[-1]])  # compute one chunk after the other, to bound memory
    return [mx.concatenate(list(column)) for column in zip(*chunks)] if chunks else [mx.zeros((0,))] * 2


class StateBatches:
    """Makes batches of states. The sample number alone decides which state is used, and with what noise.

    A canvas is drawn as often as it took steps: where one step was enough there is little to learn.

    Args:
        states: of a round.
        clean: share of the samples of learned answers that are nearly clean canvases instead.
        seed: of the order and the choice.
    """

    NOISE = 0.3  # largest share of random tokens in a nearly clean canvas

    def __init__(self, states: States, clean: float, seed: int):
        self._states, self._clean, self._seed = states, clean, seed
        self._places = [canvas for canvas in states.canvases for _ in range(canvas.steps)]

    def sample(self, numbers: Sequence[int]) -> StateBatch:
        """The batch with these sample numbers. A state is drawn with a probability of 1 over its step."""
        states, rows = self._states, []
        for number in numbers:
            random = np.random.default_rng([self._seed, 2, number])
            one = self._places[example_index(len(self._places), number, self._seed)]
            length = len(one.tokens)
            weight, noised, canvas, conditioning = one.weight, 1.0, np.array(one.tokens, np.int32), None
            if weight and random.random() < self._clean:
                weight, noised = 0.0, float(random.uniform(0, self.NOISE))
            else:
                shares = 1 / np.arange(1, one.steps + 1)
                step = int(random.choice(one.steps, p=shares / shares.sum()))
                if step:
                    at = one.first + step - 1
                    noised, canvas, conditioning = 0.0, states.tokens[at], states.conditioning[at]
            rows.append((one, weight, noised, canvas, conditioning, np.arange(length) < one.length))
        longest = max(len(one.prefix) for one, *_ in rows)
        pads = [longest - len(one.prefix) for one, *_ in rows]
        shape = (len(rows), *states.conditioning.shape[1:])
        conditions = np.zeros(shape, np.float16)
        for i, (*_, conditioning, _) in enumerate(rows):
            if conditioning is not None:
                conditions[i] = conditioning
        return StateBatch(
            tokens=np.array([[0] * pad + one.prefix for pad, (one, *_) in zip(pads, rows)], np.int32),
            mask=np.arange(longest) >= np.array(pads)[:, None],
            canvas=np.array([canvas for _, _, _, canvas, _, _ in rows], np.int32),
            noised=np.array([noised for _, _, noised, *_ in rows], np.float32),
            target=np.array([one.tokens for one, *_ in rows], np.int32),
            supervised=np.array([supervised for *_, supervised in rows]),
            weight=np.array([weight for _, weight, *_ in rows], np.float32),
            conditioned=np.array([conditioning is not None for *_, conditioning, _ in rows]),
            conditioning=conditions,
        )
