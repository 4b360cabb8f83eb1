"""Prompts on their way through an engine, and conversations that keep what they have encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from .images import Patches
from .infill import Filling
from .prefix import Prefix
from .prompt import Answer

if TYPE_CHECKING:
    from .canvas import Control
    from .generate import GenerationOptions
    from .result import Result


class Session:
    """A conversation's prefix and pictures: a prompt that begins as the last one did encodes only what is new.

    Attributes:
        prefix: the keys and values held.
        held: what they are of: token ids, and for a placeholder its picture's digest.
        features: soft tokens of the pictures seen so far, by digest.
    """

    def __init__(self, prefix: Prefix):
        self.prefix = prefix
        self.held: list[int | str] = []
        self.features: dict[str, mx.array] = {}

    def reuse(self, wanted: list[int | str]) -> int:
        """Go back to what the prefix shares with a prompt; returns how many tokens that are."""
        pairs = enumerate(zip(self.held, wanted))
        shared = next((i for i, (mine, new) in pairs if mine != new), min(len(self.held), len(wanted)))
        count = self.prefix.rewind(shared)
        del self.held[count:]
        return count


@dataclass(frozen=True)
class Picture:
    """A picture or video frame of a prompt."""

    digest: str  # of its pixels and its budget
    patches: Patches

    @property
    def tokens(self) -> int:
        """How many soft tokens it takes."""
        return self.patches.tokens[0]


@dataclass
class Row:
    """One prompt on its way through the loop."""

    tokens: list[int]
    held: list[int | str]  # as `Session.held`
    pictures: list[Picture]
    times: list[float]  # of video frames, seconds
    seed: int
    answer: Answer | Filling
    reused: int = 0
    encoded: int = 0  # pictures
    blocks: int = 0
    steps: int = 0
    positions: int = 0  # denoised, summed over steps
    first_block: float = 0.0


@dataclass(frozen=True)
class Job:
    """A prompt that is ready to be generated; it is used up by that."""

    row: Row
    options: GenerationOptions
    control: Control | None = None
    refine: Callable[[Result], Result] | None = None  # adds to the result what only the asker knows
