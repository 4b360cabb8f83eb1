"""Choices as requests, so that a scheduler may run them beside others: a prompt, and passes that read its canvases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..decoding.control import Control
from ..decoding.options import GenerationOptions
from ..decoding.request import Request
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message
from .choose import Plan, Said


class NoText:
    """The reader of a request that has no text: it is over when its control knows what it was asked for."""

    def __init__(self) -> None:
        self.text, self.thinking, self.left = "", "", 0
        self.tool_calls: list[dict] = []
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: str | None = None

    def close_thought(self, tokens: Sequence[int], log_probs: Sequence[float]) -> tuple[list[int], list[float]]:
        """Nothing is thought."""
        return list(tokens), list(log_probs)

    def feed(self, tokens: Sequence[int], log_probs: Sequence[float]) -> str | None:
        """Nothing is fed."""
        return self.finish_reason

    def cut(self, reason: str) -> None:
        """End here."""
        self.finish_reason = self.finish_reason or reason

    def take(self) -> tuple[str, str]:
        """Nothing is said."""
        return "", ""

    def preview(self, tokens: Sequence[int]) -> str:
        """Nothing is shown."""
        return ""


class Decision(Control):
    """Reads the canvases of a plan, a pass at a time.

    Args:
        plan: of one or more questions.
        reader: of the request; it is over when all is read.

    Attributes:
        said: of each question, when it has been read.
    """

    def __init__(self, plan: Plan, reader: NoText):
        self._plan, self._reader = plan, reader
        self.said: list[Said] = []

    def prepare(
        self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array
    ) -> Iterator[int]:
        """Read the canvases."""
        self.said = yield from self._plan.scores(model, prefix, key)
        self._reader.finish_reason = "stop"


def decide(
    builder: PromptBuilder, messages: list[Message], plan: Plan, seed: int, options: GenerationOptions
) -> tuple[Request, Decision]:
    """The request that reads a plan's canvases behind a prompt.

    Raises:
        PromptError: as `PromptBuilder.request`.
    """
    request = builder.request(messages, seed, options)
    request.reader = reader = NoText()
    request.control = decision = Decision(plan, reader)
    return request, decision
