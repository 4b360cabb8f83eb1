"""Answers on their way to a client that may leave: what is no longer wanted is cancelled."""

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


class Gone(Exception):
    """The client has left."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for some work, or cancel it when the client leaves. The body must have been read.

    Raises:
        Gone: it left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, each `data:` with a JSON object, then `data: [DONE]`.

    An ApiError after the stream began becomes a last event {"error": ...}, and so does any other, which is logged.

    Args:
        events: closed when all is sent or the client leaves.
        done: whether [DONE] ends it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any]], done: bool = True):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""

        async def watch() -> None:
            await _leaving(receive)
            group.cancel_scope.cancel()

        async def put(data: str) -> None:
            await send({"type": "http.response.body", "body": f"{data}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            async with aclosing(self._events) as events:
                try:
                    async for event in events:
                        await put(sse(event))
                    if self._done:
                        await put("data: [DONE]")
                except ApiError as error:
                    await put(sse(error.body()))
                except Exception:
                    LOG.exception("An answer failed after its stream began.")
                    await put(sse(ApiError("The server failed; its log says why.", status=500).body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            group.cancel_scope.cancel()


def sse(event: dict[str, Any]) -> str:
    """A server-sent event without the blank line behind it; its `type`, if it has one, is its name too."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}"


async def begun(request: Request, events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The same events, once the first is there: what is wrong with a request is known before its stream begins."""
    first = await unless_gone(request, anext(events))

    async def all_of() -> AsyncGenerator[T]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_of()


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
