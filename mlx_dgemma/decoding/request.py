"""Prompts on their way through an engine, and conversations that keep what they have encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from ..model.patches import Patches
from .options import GenerationOptions
from .session import Session

if TYPE_CHECKING:
    from ..prompt.answer import Answer
    from ..tasks.infill import Filling
    from .control import Control
    from .events import Result


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
    cache_key: list[int | str]  # as `Session.cache_key`
    pictures: list[Picture]
    times: list[float]  # of video frames, seconds
    seed: int
    answer: Answer | Filling
    reused: int = 0
    images_encoded: int = 0  # pictures that were encoded
    blocks: int = 0
    steps: int = 0
    positions: int = 0  # denoised, summed over steps
    key: mx.array | None = None  # [2], of the draws to come
    started: float = 0.0  # seconds of a clock
    encoded: float = 0.0
    first_block: float = 0.0  # seconds since it started
    log_probs: list[float] = field(default_factory=list)  # of every token of its blocks


@dataclass(eq=False)
class Job:
    """A prompt that is ready to be generated; it is used up by that."""

    row: Row
    options: GenerationOptions
    control: Control | None = None
    refine: Callable[[Result], Result] | None = None  # adds to the result what only the asker knows
    session: Session = field(init=False)  # what its prompt and blocks are encoded into
    branch: Session | None = None  # a copy of it as it was where the prompt leaves others'
    drafts: bool = False  # whether they are wanted


class Reader(Protocol):
    """Takes a row's blocks and says when its text has ended."""

    @property
    def left(self) -> int:
        """Tokens that the text has room for."""

    def feed(self, tokens: tuple[int, ...]) -> str | None:
        """Take a block; returns the finish reason once there is one."""

    def cut(self, reason: str) -> None:
        """No further block will come."""
