"""Answers: a prompt with pictures, tools and constraints becomes a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..decoding.options import OptionKeywords
from ..decoding.request import Request
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message, messages_of
from .constrained import constrain_answer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AnswerKeywords(OptionKeywords, total=False):
    """Keyword arguments of `answer`."""

    images: Sequence[Any]
    video: Any
    seed: int | None
    thinking: bool
    tools: list[dict[str, Any]] | None
    system: str | None
    schema: dict[str, Any] | None
    regex: str | None


def answer(
    builder: PromptBuilder,
    prompt: str | Sequence[Message],
    *,
    images: Sequence[Any] = (),
    video: Any = None,
    seed: int | None = None,
    thinking: bool = False,
    tools: list[dict[str, Any]] | None = None,
    system: str | None = None,
    schema: dict[str, Any] | None = None,
    regex: str | None = None,
    **options: Unpack[OptionKeywords],
) -> Request:
    """The request of `Engine.generate`, whose arguments it takes."""
    effective = builder.options.override(**options)
    messages = messages_of(prompt, system, images, video)
    request = builder.request(messages, seed, effective, thinking, tools)
    constrain_answer(builder, request, schema, regex, thinking, tools)
    return request
