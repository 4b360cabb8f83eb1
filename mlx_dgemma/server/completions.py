"""POST /v1/completions: a text is continued or, with a suffix, its hole filled."""

from __future__ import annotations

import secrets
import time
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
from .fields import Fields, read
from .follow import follow_all
from .options import Form, arguments_of, blamed, form_of
from .reading import Done, Reading, stats, usage
from .sending import EventStream, begun, unless_gone
from .settings import Settings

if TYPE_CHECKING:
    from ..engine import Engine


async def completions(request: HttpRequest) -> Response:
    """Complete a text, as a whole or as events."""
    scheduler, settings = request.app.state.scheduler, request.app.state.settings
    asked = read_completion(await read(request), scheduler.engine, settings)
    prepares = [asked.prepare(scheduler.engine, i) for i in range(asked.form.choices)]
    events = follow_all(scheduler, prepares, asked.form.drafts, Reading(scheduler.engine))
    if asked.form.stream:
        return EventStream(await begun(request, _chunks(asked, events)))
    return JSONResponse(await unless_gone(request, _whole(asked, events)))


@dataclass(frozen=True)
class Completion:
    """A request that was read.

    Attributes:
        arguments: of `infill.infill`; the seed is the first choice's.
        stop: what the text is cut before, here rather than in the engine, whose infill knows no such thing.
    """

    form: Form
    prefix: str
    suffix: str
    arguments: dict[str, Any]
    stop: list[str]

    def prepare(self, engine: Engine, i: int) -> Callable[[], Request]:
        """What makes the request of choice `i`, on the scheduler's thread."""

        def prepare() -> Request:
            with blamed("prompt"):
                arguments = {**self.arguments, "seed": self.arguments["seed"] + i}
                return infill.infill(engine.builder, self.prefix, self.suffix, **arguments)

        return prepare


def read_completion(fields: Fields, engine: Engine, settings: Settings) -> Completion:
    """Read the body.

    Raises:
        ApiError: anything in it cannot be honoured.
    """
    form = form_of(fields, settings)
    arguments = arguments_of(fields, engine.options, choices=form.choices)
    prefix = fields.take("prompt")
    if isinstance(prefix, list) and len(prefix) == 1:
        prefix = prefix[0]
    fields.need("prompt")
    if not isinstance(prefix, str):
        fields.refuse("prompt", "it should be one string: send several in several requests, and no tokens")
    suffix = fields.text("suffix", "")
    for name, value in (("thinking", False), ("exact", False), ("regex", None)):
        if arguments.pop(name, value) != value:
            fields.refuse(name, "a text is continued without it: leave it out, or ask /v1/chat/completions")
    if suffix and arguments.pop("max_tokens", LONGEST) < LONGEST:
        fields.refuse(
            "max_tokens", f"the length of a hole is found by looking at up to {LONGEST} tokens: give that many or more"
        )
    fields.only("echo", False, why="the prompt is not repeated: leave it out, or give false")
    fields.only("best_of", 1, why="every answer is given: leave it out, and ask for n")
    fields.only("logprobs", why="log-probabilities are told by /v1/chat/completions alone: leave it out")
    fields.done()
    arguments.setdefault("seed", secrets.randbits(32))
    return Completion(form, prefix, suffix, arguments, arguments.pop("stop", []))


@dataclass
class Cut:
    """A text that comes in pieces and ends before the first stop string."""

    stop: list[str]
    text: str = ""
    given: int = 0
    over: bool = False

    def add(self, piece: str, last: bool = False) -> str:
        """What is certain to belong to the text and was not given before."""
        if self.over:
            return ""
        self.text += piece
        ends = [at for one in self.stop if (at := self.text.find(one)) >= 0]
        if ends:
            self.text, self.over = self.text[: min(ends)], True
        end = len(self.text)
        if not self.over and not last:  # what may begin a stop string waits
            end -= held_back(self.text, self.stop)
        new, self.given = self.text[self.given : end], max(end, self.given)
        return new


def _base(asked: Completion) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.form.model,
    }


def _choice(i: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": i, "logprobs": None, "finish_reason": reason}


async def _whole(asked: Completion, events: AsyncGenerator[tuple[int, Any]]) -> dict[str, Any]:
    done: dict[int, Done] = {}
    async for i, event in events:
        if isinstance(event, Done):
            done[i] = event
    choices = []
    for i, one in sorted(done.items()):
        cut = Cut(asked.stop)
        text = cut.add(one.result.text, last=True)
        choices.append(_choice(i, text, "stop" if cut.over else one.result.finish_reason))
    told = [stats(one) for _, one in sorted(done.items())]
    return {
        **_base(asked),
        "choices": choices,
        "usage": usage([one for _, one in sorted(done.items())]),
        "stats": told[0] if len(told) == 1 else told,
    }


async def _chunks(asked: Completion, events: AsyncGenerator[tuple[int, Any]]) -> AsyncGenerator[dict[str, Any]]:
    base, done = _base(asked), {}
    cuts = [Cut(asked.stop) for _ in range(asked.form.choices)]
    nothing = {"usage": None} if asked.form.usage else {}
    async with aclosing(events):
        async for i, event in events:
            if isinstance(event, Accepted):
                yield {**base, "choices": [_choice(i, "", None)], **nothing}
            elif isinstance(event, Block):
                if text := cuts[i].add(event.text):
                    yield {**base, "choices": [_choice(i, text, None)], **nothing}
            elif isinstance(event, Done):
                done[i] = event
                rest = cuts[i].add("", last=True)
                reason = "stop" if cuts[i].over else event.result.finish_reason
                yield {**base, "choices": [_choice(i, rest, reason)], **nothing, "stats": stats(event)}
            else:
                yield {**base, "choices": [], "draft": {"index": i, **event}}
    if asked.form.usage:
        yield {**base, "choices": [], "usage": usage([one for _, one in sorted(done.items())])}
