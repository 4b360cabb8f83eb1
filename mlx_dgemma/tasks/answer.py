"""Answers: a prompt with pictures, tools and constraints becomes a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..decoding.options import OptionKeywords
from ..decoding.request import Request
from ..errors import OptionError, PromptError, shown
from ..prompt.audio.transcripts import with_transcripts
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message, messages_of
from .constrained import constrain_answer
from .mode import kind_of_answer, settle_mode

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
    messages = messages_of(with_transcripts(prompt), system, images, video)
    request = builder.request(messages, seed, effective, thinking, tools)
    language = constrain_answer(builder, request, schema, regex, thinking, tools)
    least = 0 if language is None else int(language.distance[0])
    settle_mode(builder, request, kind_of_answer(least, thinking, bool(tools)))
    return request


def answers(
    builder: PromptBuilder,
    prompts: Sequence[str | Sequence[Message]],
    seeds: Sequence[int] | None,
    **keywords: Unpack[AnswerKeywords],
) -> list[Request]:
    """The requests of `Engine.generate_batch`, whose arguments it takes."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        raise PromptError(f"prompts is {shown(prompts)}; it should be a list of prompts.")
    prompts = list(prompts)
    if not prompts:
        raise PromptError("There are no prompts; give at least one.")
    if seeds is not None and len(seeds) != len(prompts):
        raise OptionError(f"There are {len(prompts)} prompts and {len(seeds or ())} seeds; give one seed a prompt.")
    requests = []
    for i, prompt in enumerate(prompts):
        own: AnswerKeywords = keywords if seeds is None else {**keywords, "seed": seeds[i]}
        requests.append(answer(builder, prompt, **own))
    return requests
