"""Sending of answers: server-sent events, and cancellation when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error

T = TypeVar("T")
PING = ": ping\n\n"  # a comment, which clients pass over
PING_SECONDS = 15.0  # of silence in a stream; proxies end connections that are silent for longer


class ClientDisconnected(Exception):
    """The client closed its connection."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, or cancel it when the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnected: the client closed its connection.
    """
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


class EventStream(StreamingResponse):
    """A response of server-sent events, which are closed when all are sent or the client disconnects."""

    def __init__(self, events: AsyncGenerator[str]):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(with_pings(events), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


async def with_pings(events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """Yield the events, and a comment after every `PING_SECONDS` of silence."""
    async with aclosing(events):
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait((coming,), timeout=PING_SECONDS)
                if not coming.done():
                    yield PING
                elif (event := coming.result()) is None:
                    return
                else:
                    yield event
                    coming = asyncio.ensure_future(anext(events, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


class LineStream(EventStream):
    """A response of lines of JSON, as Ollama's clients read it. They take nothing else, so there are no pings."""

    def __init__(self, lines: AsyncGenerator[str]):
        headers = {"Cache-Control": "no-store"}
        StreamingResponse.__init__(self, lines, headers=headers, media_type="application/x-ndjson")


def format_line(event: dict[str, Any] | str) -> str:
    """An object as a line of JSON."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n"


def format_sse(event: dict[str, Any] | str) -> str:
    """A server-sent event. One with a `type` is named by it."""
    if isinstance(event, str):
        return f"data: {event}\n\n"
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def as_text(
    first: tuple[int, Any],
    events: AsyncGenerator[tuple[int, Any]],
    told: Callable[[int, Any], Iterable[Any]],
    end: Callable[[], Iterable[Any]],
    failed: Callable[[ApiError], Iterable[Any]],
    form: Callable[[Any], str],
) -> AsyncGenerator[str]:
    """A stream as text. An error becomes its last part, since the status has been sent.

    Args:
        first, events: of `follow`; the first one has come already.
        told: what is told of an event.
        end: what is told once all have come; called on a worker thread.
        failed: what is told of an error.
        form: the text of one of these.
    """
    async with aclosing(events):
        try:
            for one in told(*first):
                yield form(one)
            async for i, event in events:
                for one in told(i, event):
                    yield form(one)
            for one in await to_thread.run_sync(lambda: [*end()]):
                yield form(one)
        except Exception as error:
            for one in failed(as_api_error(error)):
                yield form(one)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
