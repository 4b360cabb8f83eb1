"""Pictures as the vision tower takes them, and the budgets of soft tokens that they may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError

BUDGETS = (70, 140, 280, 560, 1120)
"""Soft tokens that a picture may be given."""


def check_budget(budget: int) -> None:
    """Raise OptionError unless a picture can be given this many soft tokens."""
    if isinstance(budget, bool) or budget not in BUDGETS:
        raise OptionError(f"image_tokens is {budget!r}; it should be one of {', '.join(map(str, BUDGETS))}.")


@dataclass(frozen=True)
class Patches:
    """N pictures cut into patches; P is the largest number of patches of a picture.

    Attributes:
        pixels: [N, P, 3 * patch**2] uint8, row by row, channels last in a patch; zeros where padded.
        positions: [N, P, 2] int32 (x, y) of each patch, -1 where padded.
        tokens: soft tokens of each picture.
    """

    pixels: np.ndarray  # a quarter of `patches`, since many requests with pictures may wait
    positions: np.ndarray
    tokens: tuple[int, ...]

    @property
    def patches(self) -> np.ndarray:
        """The pixels as float32 in 0..1, as the vision tower takes them."""
        return self.pixels.astype(np.float32) / 255


def join(parts: Sequence[Patches]) -> Patches:
    """The pictures of several `Patches` in one, padded to the largest number of patches."""
    longest = max((part.pixels.shape[1] for part in parts), default=0)

    def padded(array: np.ndarray, value: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0)), constant_values=value)

    return Patches(
        np.concatenate([padded(part.pixels, 0) for part in parts]),
        np.concatenate([padded(part.positions, -1) for part in parts]),
        tuple(tokens for part in parts for tokens in part.tokens),
    )
