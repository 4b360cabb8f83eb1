"""Turn examples into batches. The sample number alone decides which answer and canvas of an example is used."""

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
class CanvasSample:
    """One canvas of a target.

    Attributes:
        prefix: token ids before the canvas.
        tokens: clean token ids of the canvas.
        answer_length: how many of them belong to the answer; the rest is the fill token.
    """

    prefix: list[int]
    tokens: list[int]
    answer_length: int


def split_into_canvases(target: Target, length: int, fill: int) -> list[CanvasSample]:
    """Split an answer into canvases of `length` tokens; the last one is filled up with the token `fill`."""
    samples = []
    for start in range(0, len(target.answer), length):
        answer = target.answer[start : start + length]
        tokens = [*answer, *[fill] * (length - len(answer))]
        samples.append(CanvasSample([*target.prompt, *target.answer[:start]], tokens, len(answer)))
    return samples


def example_index(count: int, number: int, seed: int) -> int:
    """Index of the example, of `count` examples, for sample `number` of a run. Each epoch has its own permutation."""
    epoch, place = divmod(number, count)
    return int(_permutation(count, epoch, seed)[place])


@lru_cache(maxsize=2)  # a batch may contain the end of one epoch and the start of the next
def _permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


class Batches:
    """Makes batches of examples.

    Args:
        engine: with the model to train; it encodes the images.
        examples: the examples to choose from.
        fill: token that fills the rest of an answer's last canvas.
        supervise_fill: True if fill tokens count in the loss.
        seed: of the order of examples and the choice of canvases.
    """

    def __init__(self, engine: Engine, examples: Sequence[Example], fill: int, supervise_fill: bool, seed: int):
        self._engine, self._examples, self._seed = engine, examples, seed
        self._fill, self._supervise_fill = fill, supervise_fill

    def sample(self, numbers: Sequence[int]) -> Batch:
        """The batch with these sample numbers of a run."""
        return self.batch([example_index(len(self._examples), number, self._seed) for number in numbers], numbers)

    def batch(self, indices: Sequence[int], numbers: Sequence[int]) -> Batch:
        """The batch of the examples at `indices`; `numbers` decide which answer and canvas of each is used."""
        length = self._engine.config.canvas_length
        chosen, features = [], []
        for index, number in zip(indices, numbers):
            random = np.random.default_rng([self._seed, 1, number])
            targets = self._examples[index].targets
            target = targets[int(random.integers(len(targets)))]
            canvases = split_into_canvases(target, length, self._fill)
            chosen.append(canvases[int(random.integers(len(canvases)))])
            features.append(self.image_features(target))
        longest = max(len(sample.prefix) for sample in chosen)
        padded = [[0] * (longest - len(sample.prefix)) + sample.prefix for sample in chosen]
        supervised = [length if self._supervise_fill else sample.answer_length for sample in chosen]
        return Batch(
            np.array(padded, np.int32),
            np.arange(longest) >= np.array([[longest - len(sample.prefix)] for sample in chosen]),
            np.array([sample.tokens for sample in chosen], np.int32),
            np.arange(length) < np.array(supervised)[:, None],
            features,
        )

    def image_features(self, target: Target) -> mx.array | None:
        """[n, H] soft tokens of a target's images from the vision tower; None if it has no images."""
        if not target.images:
            return None
        budget = self._engine.options.image_tokens
        pictures = [self._engine.builder.load_image(source, budget).patches for source in target.images]
        encoded = [self._engine.model.encode_images((one.patches, one.positions)) for one in pictures]  # type: ignore[arg-type]
        return mx.stop_gradient(mx.concatenate(encoded))
