"""POST /v1/completions: continue a text or, with a suffix, fill the hole between two texts."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..decoding.events import Block
from ..decoding.request import Request
from ..prompt.answer import held_back
from ..serving.scheduler import Accepted
from ..tasks import infill
from ..tasks.infill import LONGEST
from .events import EventTranslator, FinishedAnswer, collect_answers, stats, usage, usage_and_stats
from .fields import Fields, read_body
from .follow import follow_all
from .options import Delivery, as_api_errors, parse_arguments, parse_delivery
from .settings import Settings
from .streaming import EventStream, after_first_event, cancel_on_disconnect

if TYPE_CHECKING:
    from ..engine import Engine


async def completions(request: HttpRequest) -> Response:
    """Complete a text, with one JSON body or with server-sent events."""
    scheduler, settings = request.app.state.scheduler, request.app.state.settings
    completion = parse_completion(await read_body(request), scheduler.engine, settings)
    prepares = [completion.prepare(scheduler.engine, i) for i in range(completion.delivery.choices)]
    events = follow_all(scheduler, prepares, completion.delivery.drafts, EventTranslator(scheduler.engine))
    if completion.delivery.stream:
        return EventStream(await after_first_event(request, _chunks(completion, events)))
    return JSONResponse(await cancel_on_disconnect(request, _body(completion, events)))


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed request.

    Attributes:
        delivery: how the answers are sent.
        prefix: the text before the hole.
        suffix: the text after the hole; "" continues the prefix.
        arguments: further arguments of `infill.infill`, with the seed of the first answer.
        stop: stop strings; `infill` has none, so the server cuts the text.
    """

    delivery: Delivery
    prefix: str
    suffix: str
    arguments: dict[str, Any]
    stop: list[str]

    def prepare(self, engine: Engine, i: int) -> Callable[[], Request]:
        """Return the function that makes the request of answer `i` on the scheduler's thread."""

        def prepare() -> Request:
            with as_api_errors("prompt"):
                arguments = {**self.arguments, "seed": self.arguments["seed"] + i}
                return infill.infill(engine.builder, self.prefix, self.suffix, **arguments)

        return prepare


def parse_completion(fields: Fields, engine: Engine, settings: Settings) -> CompletionRequest:
    """Parse the body of a completion request.

    Raises:
        ApiError: a field is wrong or not supported.
    """
    delivery = parse_delivery(fields, settings)
    arguments = parse_arguments(fields, engine.options, choices=delivery.choices)
    prefix = fields.get("prompt")
    if isinstance(prefix, list) and len(prefix) == 1:
        prefix = prefix[0]
    fields.require("prompt")
    if not isinstance(prefix, str):
        fields.reject("prompt", "it should be one string: send several in several requests, and no tokens")
    suffix = fields.text("suffix", "")
    for name, value in (("thinking", False), ("exact", False), ("regex", None)):
        if arguments.pop(name, value) != value:
            fields.reject(name, "a text is continued without it: leave it out, or ask /v1/chat/completions")
    if suffix and arguments.pop("max_tokens", LONGEST) < LONGEST:
        fields.reject(
            "max_tokens", f"the length of a hole is found by looking at up to {LONGEST} tokens: give that many or more"
        )
    fields.allow_only("echo", False, why="the prompt is not repeated: leave it out, or give false")
    fields.allow_only("best_of", 1, why="every answer is given: leave it out, and ask for n")
    fields.allow_only("logprobs", why="log-probabilities are told by /v1/chat/completions alone: leave it out")
    fields.reject_unknown()
    arguments.setdefault("seed", secrets.randbits(32))
    return CompletionRequest(delivery, prefix, suffix, arguments, arguments.pop("stop", []))


@dataclass
class StopCutter:
    """Cuts a text that arrives in pieces before the first stop string.

    Attributes:
        stop: the stop strings.
        text: the text received so far, without what follows a stop string.
        sent: number of characters already returned.
        stopped: whether a stop string was found.
    """

    stop: list[str]
    text: str = ""
    sent: int = 0
    stopped: bool = False

    def add(self, piece: str, last: bool = False) -> str:
        """Add a piece and return the new text that no stop string can cut off any more."""
        if self.stopped:
            return ""
        self.text += piece
        found = [at for one in self.stop if (at := self.text.find(one)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text)
        if not self.stopped and not last:  # the end of the text may begin a stop string
            end -= held_back(self.text, self.stop)
        new, self.sent = self.text[self.sent : end], max(end, self.sent)
        return new


def _choice(i: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": i, "logprobs": None, "finish_reason": reason}


async def _body(completion: CompletionRequest, events: AsyncGenerator[tuple[int, Any]]) -> dict[str, Any]:
    answers, choices = await collect_answers(events), []
    for i, answer in enumerate(answers):
        cutter = StopCutter(completion.stop)
        text = cutter.add(answer.result.text, last=True)
        choices.append(_choice(i, text, "stop" if cutter.stopped else answer.result.finish_reason))
    envelope = completion.delivery.envelope("cmpl", "text_completion")
    return {**envelope, "choices": choices, **usage_and_stats(answers)}


async def _chunks(
    completion: CompletionRequest, events: AsyncGenerator[tuple[int, Any]]
) -> AsyncGenerator[dict[str, Any]]:
    envelope = completion.delivery.envelope("cmpl", "text_completion")
    answers: dict[int, FinishedAnswer] = {}
    cutters = [StopCutter(completion.stop) for _ in range(completion.delivery.choices)]
    no_usage = {"usage": None} if completion.delivery.usage else {}
    async with aclosing(events):
        async for i, event in events:
            if isinstance(event, Accepted):
                yield {**envelope, "choices": [_choice(i, "", None)], **no_usage}
            elif isinstance(event, Block):
                if text := cutters[i].add(event.text):
                    yield {**envelope, "choices": [_choice(i, text, None)], **no_usage}
            elif isinstance(event, FinishedAnswer):
                answers[i] = event
                rest = cutters[i].add("", last=True)
                reason = "stop" if cutters[i].stopped else event.result.finish_reason
                yield {**envelope, "choices": [_choice(i, rest, reason)], **no_usage, "stats": stats(event)}
            else:
                yield {**envelope, "choices": [], "draft": {"index": i, **event}}
    if completion.delivery.usage:
        yield {**envelope, "choices": [], "usage": usage([answers[i] for i in sorted(answers)])}
