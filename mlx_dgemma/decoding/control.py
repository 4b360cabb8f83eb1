"""Canvases, from noise until they settle: the denoising steps of blocks.

A step is built as a graph before anything of it is computed. While the device works on one, the host builds the
next; it learns which rows go on, and how many positions are diffuse, once a step. Rows may be at different steps:
one that joins begins while others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from ..model.kv_cache import Prefix

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from .options import GenerationOptions


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch: arrays [B, C], `done` and `steps` per row."""

    argmax: mx.array  # int32, argmax; a row that has settled keeps its own
    accepted: mx.array  # bool
    entropy: mx.array  # float32, nats
    confidence: mx.array  # float32, probability of `argmax` in the processed logits
    done: list[bool]
    steps: list[int]


@dataclass(frozen=True)
class Layout:
    """What a canvas begins with instead of noise; arrays [B, C], where C may be less than the model's canvas."""

    tokens: mx.array  # int32
    pinned: mx.array  # bool, keep their token, count as certain, and are left out of acceptance and stop rules
    drafted: mx.array  # bool, begin with their token


class Guide(Protocol):
    """Chooses every step's text among those that are allowed."""

    tokens: mx.array  # [N] int32, whose log-probabilities it must know at every position

    def choose(self, row: int, reading: dict[str, np.ndarray]) -> np.ndarray:
        """The text of a row of the batch, [C] int32.

        Args:
            row: its place in the batch.
            reading: "best" [C] with "top" [C], its log-probability; "likely" [C, K] with "log_p" [C, K]; and
                "asked" [C, N], log-probabilities of `tokens`.
        """


PARTS = 4  # a canvas may be shorter by whole quarters
GROWTH = 4  # a draft's canvas has room for a text that is longer by a quarter


def fitting_size(count: int, canvas_length: int) -> int:
    """Positions of the shortest canvas that holds so many, in quarters of the model's."""
    part = max(canvas_length // PARTS, 1)
    return min(-(-count // part) * part, canvas_length)


class Control:
    """Leaves every canvas of a job as it is; the base of those that don't."""

    def layout(self) -> Layout | None:
        """What the next canvas begins with."""
        return None

    def guide(self, left: int) -> Guide | None:
        """What chooses the text of the next canvas, where there is room for so many tokens."""
        return None

    def commit(self, tokens: Sequence[int]) -> None:
        """Take note of a finished canvas."""

    def prepare(self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array) -> int:
        """Find out what must be known before the first canvas; returns how many positions were denoised for it.

        Args:
            prefix: the encoded prompt.
            key: [2], random key of the first row.
        """
        return 0
