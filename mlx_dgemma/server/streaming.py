"""Sending of answers: server-sent events, and cancellation when the client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

T = TypeVar("T")
LOG = logging.getLogger("mlx_dgemma.server")


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


class EventStream(Response):
    """A response of server-sent events, each a JSON object after `data:`.

    An error after the stream began is sent as a last event {"error": ...}. Errors other than ApiError are also logged.

    Args:
        events: JSON objects; closed when all are sent or the client disconnects.
        done: whether `data: [DONE]` ends the stream.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any]], done: bool = True):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""

        async def watch() -> None:
            await _wait_for_disconnect(receive)
            group.cancel_scope.cancel()

        async def send_event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"{data}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            async with aclosing(self._events) as events:
                try:
                    async for event in events:
                        await send_event(format_sse(event))
                    if self._done:
                        await send_event("data: [DONE]")
                except ApiError as error:
                    await send_event(format_sse(error.body()))
                except Exception:
                    LOG.exception("An answer failed after its stream began.")
                    await send_event(format_sse(ApiError("The server failed; its log says why.", status=500).body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            group.cancel_scope.cancel()


def format_sse(event: dict[str, Any]) -> str:
    """A server-sent event without the blank line that ends it. An event with a `type` is named by it."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}"


async def after_first_event(request: Request, events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Wait for the first event, so that an error before it still sets the HTTP status; then yield all events."""
    first = await cancel_on_disconnect(request, anext(events))

    async def all_events() -> AsyncGenerator[T]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_events()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
