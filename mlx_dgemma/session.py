"""Prompts on their way through an engine, and conversations that keep what they have encoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

    def shared(self, wanted: list[int | str]) -> int:
        """Tokens at the beginning that a prompt has in common with what is held."""
        pairs = enumerate(zip(self.held, wanted))
        return next((i for i, (mine, new) in pairs if mine != new), min(len(self.held), len(wanted)))

    def reuse(self, wanted: list[int | str]) -> int:
        """Go back to what the prefix shares with a prompt; returns how many tokens that are."""
        count = self.prefix.rewind(self.shared(wanted))
        del self.held[count:]
        return count

    def fork(self) -> Session:
        """The same conversation, which can go on by itself; arrays are copied when one of them writes."""
        other = Session(self.prefix.fork())
        other.held, other.features = list(self.held), dict(self.features)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of unified memory held."""
        return self.prefix.nbytes + sum(a.nbytes for a in self.features.values())


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
    looked: int = 0  # pictures that were encoded
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
