"""Examples become batches: which answer and canvas of each is learnt is drawn, by nothing but the sample's number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .objective import Batch

if TYPE_CHECKING:
    from ..engine import Engine
    from .data import Example, Target


@dataclass(frozen=True)
class Canvas:
    """A target's canvas: what stands before it, its clean tokens, and how many of them are the answer's own."""

    prefix: list[int]
    tokens: list[int]
    own: int


def canvases(target: Target, length: int, fill: int) -> list[Canvas]:
    """An answer cut into canvases; the last one is filled up with the token `fill`."""
    found = []
    for start in range(0, len(target.answer), length):
        own = target.answer[start : start + length]
        tokens = [*own, *[fill] * (length - len(own))]
        found.append(Canvas([*target.prompt, *target.answer[:start]], tokens, len(own)))
    return found


def order(count: int, number: int, seed: int) -> int:
    """Which of so many examples sample `number` of a run is: every epoch is a permutation of its own."""
    epoch, place = divmod(number, count)
    return int(_permutation(count, epoch, seed)[place])


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


class Batches:
    """Makes batches of examples.

    Args:
        engine: of the model that learns, for its pictures and sizes.
        examples: to choose from.
        fill: token that fills a last canvas.
        supervise_fill: whether it counts.
        seed: of the order and of what is drawn from an example.
    """

    def __init__(self, engine: Engine, examples: Sequence[Example], fill: int, supervise_fill: bool, seed: int):
        self._engine, self._examples, self._seed = engine, examples, seed
        self._fill, self._supervise_fill = fill, supervise_fill

    def drawn(self, numbers: Sequence[int]) -> Batch:
        """The batch of these samples of a run."""
        return self.batch([order(len(self._examples), number, self._seed) for number in numbers], numbers)

    def batch(self, indices: Sequence[int], numbers: Sequence[int]) -> Batch:
        """A batch of examples by index; `numbers` decide which answer and canvas of each."""
        length = self._engine.config.canvas_length
        chosen, features = [], []
        for index, number in zip(indices, numbers):
            random = np.random.default_rng([self._seed, 1, number])
            targets = self._examples[index].targets
            target = targets[int(random.integers(len(targets)))]
            cut = canvases(target, length, self._fill)
            chosen.append(cut[int(random.integers(len(cut)))])
            features.append(self.soft_tokens(target))
        longest = max(len(one.prefix) for one in chosen)
        padded = [[0] * (longest - len(one.prefix)) + one.prefix for one in chosen]
        counted = [length if self._supervise_fill else one.own for one in chosen]
        return Batch(
            np.array(padded, np.int32),
            np.arange(longest) >= np.array([[longest - len(one.prefix)] for one in chosen]),
            np.array([one.tokens for one in chosen], np.int32),
            np.arange(length) < np.array(counted)[:, None],
            features,
        )

    def soft_tokens(self, target: Target) -> mx.array | None:
        """[n, H] what the vision tower makes of a target's pictures, or None where it has none."""
        if not target.images:
            return None
        budget = self._engine.options.image_tokens
        pictures = [self._engine.builder.load_image(source, budget).patches for source in target.images]
        looked = [self._engine.model.encode_images((one.patches, one.positions)) for one in pictures]  # type: ignore[arg-type]
        return mx.stop_gradient(mx.concatenate(looked))
