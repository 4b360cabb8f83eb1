"""The way of every request: read, parsed, prepared, generated, sent."""

from __future__ import annotations

import logging
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..decoding.options import MODES
from ..decoding.request import Request
from ..prompt.audio.transcripts import with_transcripts
from ..prompt.messages import Message, parts_of
from .errors import ApiError
from .events import EventTranslator, FinishedAnswer, collect_answers, usage, usage_and_stats
from .follow import follow
from .options import as_api_errors, check_model, generation_arguments
from .schemas.fields import Body, ignored, parse_body, reject
from .settings import Settings
from .streaming import ClientDisconnected, EventStream, as_text, cancel_on_disconnect, format_sse

if TYPE_CHECKING:
    from ..engine import Engine
    from ..serving.scheduler import Scheduler

LOG = logging.getLogger("mlx_dgemma.server")
_LOGGED: set[tuple[str, str]] = set()  # kinds of fields that the log has told as ignored
SMALL_BODY = 2**16  # bytes; a body of no more is parsed on the event loop


class Exchange(ABC):
    """A request and its answers. An endpoint is a subclass; unless it says otherwise, answers are OpenAI's choices.

    Args:
        body: of the request.
        engine: gives the checkpoint's options.
        settings: of the server.

    Attributes:
        BODY: what the endpoint takes.
        KIND: how ids begin, and the `object` of a body and of a chunk.
        ENDS: whether a stream ends with token counts and [DONE]; others' last event of an answer is the end.
        FORMAT: an event of a stream as text; STREAM: the response of such texts.
        arguments: of `Engine.prepare`, with the seed of the first answer.
        messages: whose pictures are decoded once for all answers.
        log_probs: whether log-probabilities are sent.
        mends: whether `again` is to be asked.
        ignored: `x_ignored` of the answer with the paths of the given fields that change nothing, if there are any.
        answers: those that are whole.
        at_once: the answer where nothing is to be generated.

    Raises:
        ApiError: fields that contradict each other, or another model than the served one.
    """

    BODY: ClassVar[type[Body]]
    KIND: ClassVar[tuple[str, str, str]]
    ENDS: ClassVar[bool] = True
    FORMAT = staticmethod(format_sse)
    STREAM: ClassVar[type[EventStream]] = EventStream
    messages: Sequence[Message] = ()
    log_probs = mends = False
    at_once: dict[str, Any] | None = None

    def __init__(self, body: Any, engine: Engine, settings: Settings):
        self.body, self.model = body, check_model(body.model, settings)
        if body.drafts and not body.stream:
            reject("drafts", True, "drafts are streamed: give stream true, or leave them out")
        self.arguments = generation_arguments(body, engine.options)
        self.ignored: dict[str, list[str]] = {}
        self.ignore(*ignored(body, by_token=body.mode in MODES[1:]))
        if body.stream_options and not body.stream:
            self.ignore("stream_options")
        self.answers: dict[int, FinishedAnswer] = {}
        ids, kind = f"{self.KIND[0]}-{secrets.token_hex(12)}", self.KIND[2 if body.stream else 1]
        self._envelope = {"id": ids, "object": kind, "created": int(time.time()), "model": self.model}

    @classmethod
    def read(cls, text: bytes, engine: Engine, settings: Settings) -> Exchange:
        """The exchange of a request's body."""
        return cls(parse_body(cls.BODY, text), engine, settings)

    def ignore(self, *paths: str) -> None:
        """Tell fields in `x_ignored`, and each kind of them once in the log."""
        self.ignored.setdefault("x_ignored", []).extend(paths)
        if not self.ignored["x_ignored"]:
            self.ignored = {}
        for path in paths:
            kind = self.KIND[1], re.sub(r"\[\d+\]", "[]", path)
            if kind not in _LOGGED:
                _LOGGED.add(kind)
                LOG.info("%s: %s changes nothing here; it is told in x_ignored.", *kind)

    def check_pictures(self, most: int) -> None:
        """Refuse messages with more pictures than this: `ApiError`."""
        if len(parts_of(self.messages, "image")) > most:
            raise ApiError(f"There are more than {most} pictures; send fewer.", self.body.path("messages"))

    def again(self, i: int, answer: FinishedAnswer, engine: Engine) -> Sequence[Callable[[], Request]]:
        """Requests whose answers answer `i` needs before it is whole. A worker thread calls this."""
        return ()

    def mended(self, i: int, answer: FinishedAnswer, takes: Sequence[FinishedAnswer]) -> FinishedAnswer:
        """An answer with those to the requests of `again`, of which there is at least one."""
        return answer

    @abstractmethod
    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer, on a thread of the scheduler's."""

    @abstractmethod
    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The events of a stream for what `follow` yields about answer `i`."""

    @abstractmethod
    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """A whole answer as a choice of the body."""

    def chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        """An event with a choice."""
        return {**self._envelope, "choices": [choice], **({"usage": None} if self.body.usage else {}), **more}

    def draft(self, i: int, draft: dict[str, Any]) -> dict[str, Any]:
        """An event with the canvas after a denoising step, an extension of OpenAI's format."""
        return {**self._envelope, "choices": [], "draft": {"index": i, **draft}}

    def end(self) -> Iterable[dict[str, Any] | str]:
        """The last events of a stream, when all answers are whole."""
        if not self.ENDS:
            return
        if self.body.usage:
            yield {**self._envelope, "choices": [], "usage": usage(self._in_order()), **self.ignored}
        yield "[DONE]"

    def failed(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """The last events of a stream that fails after the first."""
        return [error.body()]

    def whole(self) -> Any:
        """The one body, when all answers are whole."""
        choices = [self.choice(i, answer) for i, answer in enumerate(self._in_order())]
        return {**self._envelope, "choices": choices, **usage_and_stats(self._in_order()), **self.ignored}

    def _in_order(self) -> list[FinishedAnswer]:
        return [self.answers[i] for i in sorted(self.answers)]


def endpoint(kind: type[Exchange]) -> Callable[[HttpRequest], Awaitable[Response]]:
    """The endpoint for such requests. It answers with one JSON body or with server-sent events."""

    async def answer(http: HttpRequest) -> Response:
        state, scheduler = http.app.state, http.app.state.scheduler
        engine = scheduler.engine
        exchange = await read_exchange(http, kind)
        if exchange.at_once is not None:
            return JSONResponse(exchange.at_once)
        prepares = [partial(_prepare, exchange, engine, i) for i in range(exchange.body.choices)]
        translate = EventTranslator(engine, exchange.log_probs, bool(getattr(exchange.body, "top_logprobs", None)))
        events = follow(scheduler, prepares, bool(exchange.body.drafts), translate, state.histograms.observe)
        events = _mended(exchange, scheduler, translate, events)
        if exchange.body.stream:
            first = await cancel_on_disconnect(http, anext(events))  # what fails before it has a status of its own
            stream = as_text(first, events, exchange.events, exchange.end, exchange.failed, exchange.FORMAT)
            return exchange.STREAM(stream)
        return JSONResponse(await cancel_on_disconnect(http, _whole(exchange, events)))

    return answer


async def read_exchange(http: HttpRequest, kind: type[Exchange]) -> Exchange:
    """The exchange of a request, its body parsed."""
    state, engine = http.app.state, http.app.state.scheduler.engine

    def parse(text: bytes) -> Exchange:
        return kind.read(text, engine, state.settings)

    return await _parse(http, parse, state.parse_limiter)


async def _parse(http: HttpRequest, parse: Callable[[bytes], Exchange], limiter: CapacityLimiter) -> Exchange:
    """Parse the body of a request: a large one in one of the few threads for that."""
    try:
        text = b"".join([chunk async for chunk in http.stream()])  # which the request does not keep
    except ClientDisconnect:
        raise ClientDisconnected from None
    if len(text) <= SMALL_BODY:
        return parse(text)
    return await cancel_on_disconnect(http, to_thread.run_sync(parse, text, limiter=limiter))


def _prepare(exchange: Exchange, engine: Engine, i: int) -> Request:
    """Make the request of one answer. The first one that is prepared decodes pictures and transcribes audio for all."""
    budget = exchange.arguments.get("image_tokens", engine.options.image_tokens)
    with as_api_errors(exchange.body.path("messages")):
        for part in parts_of(exchange.messages, "image"):
            engine.builder.load_part(part, budget)
        exchange.messages = with_transcripts(exchange.messages)
    return exchange.prepare(engine, {**exchange.arguments, "seed": exchange.arguments["seed"] + i})


async def _mended(
    exchange: Exchange, scheduler: Scheduler, translate: EventTranslator, events: AsyncGenerator[tuple[int, Any]]
) -> AsyncGenerator[tuple[int, Any]]:
    """The events; what an answer still needs is generated before it is told as finished."""
    async with aclosing(events):
        async for i, event in events:
            more: Sequence[Callable[[], Request]] = ()
            if isinstance(event, FinishedAnswer) and exchange.mends:
                more = await to_thread.run_sync(exchange.again, i, event, scheduler.engine)
            if more:
                takes = await collect_answers(follow(scheduler, more, False, translate))
                event = exchange.mended(i, event, takes)  # noqa: PLW2901
            yield i, event


async def _whole(exchange: Exchange, events: AsyncGenerator[tuple[int, Any]]) -> Any:
    async with aclosing(events):
        async for i, event in events:
            for _ in exchange.events(i, event):
                pass
    return exchange.whole()
