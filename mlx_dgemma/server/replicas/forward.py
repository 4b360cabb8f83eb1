"""ASGI middleware that passes requests on to replicas, and their answers back."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any

import httpx
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError, error_body
from ..schemas.fields import parse_json
from ..security import error_response, is_local
from ..streaming import ClientDisconnected, cancel_on_disconnect, format_line, format_sse
from .spread import Replica, Spread, marks_of

LOG = logging.getLogger("mlx_dgemma.server")
RETRY_SECONDS = 5.0  # after which a replica that does not answer is asked again
SMALL_BODY = 2**16  # bytes; a body of no more is parsed on the event loop
OWN_PATHS = ("/v1/messages/count_tokens", "/api/show")  # cheaper here than anywhere else
NOT_PASSED = {  # headers that belong to one connection, or that the front has checked
    *"host connection keep-alive transfer-encoding content-length accept-encoding te upgrade".split(),
    *"authorization x-api-key origin date server".split(),
}
IDS = re.compile(rb'"id": ?"([A-Za-z0-9_-]{8,80})"')  # of a response and its items


class Forward:
    """ASGI middleware behind the checks: a request is answered here, or by another replica.

    Args:
        app: what answers here.
        spread: the replicas.
    """

    def __init__(self, app: ASGIApp, spread: Spread):
        self._app, self._spread = app, spread
        self._returning: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] in OWN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except (ClientDisconnect, ClientDisconnected):
            pass
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = b"".join([chunk async for chunk in request.stream()])
        if len(body) <= SMALL_BODY:
            marks, bound = _marks(body)
        else:
            marks, bound = await to_thread.run_sync(_marks, body, limiter=scope["app"].state.parse_limiter)
        while True:
            replica = self._spread.choose(marks, is_local(scope), bound)
            self._spread.remember(marks, replica)
            watch = self._watched(scope, replica, send)
            replica.requests += 1
            try:
                if not replica.url:
                    await self._app(scope, _replayed(body, receive), watch)
                    return
                if await cancel_on_disconnect(request, self._forward(replica, scope, body, watch)):
                    return
            finally:
                replica.requests -= 1

    async def _forward(self, replica: Replica, scope: Scope, body: bytes, send: Send) -> bool:
        """Have a replica answer. False: it was not reached, so that another one may.

        Raises:
            ApiError: it was lost before its answer began.
        """
        target = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
        headers = {name: value for name, value in Headers(scope=scope).items() if name not in NOT_PASSED}
        headers["accept-encoding"] = "identity"
        begun = ""
        try:
            async with replica.client.stream("POST", target, content=body, headers=headers) as response:
                begun = response.headers.get("content-type", "?")
                await send(_start(response))
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except httpx.ConnectError as error:
            self._lose(replica, error)
            return False
        except httpx.TransportError as error:
            self._lose(replica, error)
            lost = ApiError(f"{replica.name} was lost while it answered; ask again.", status=502, code="replica_lost")
            if not begun:
                raise lost from None
            await send({"type": "http.response.body", "body": _last(lost, scope["path"], begun)})
        return True

    def _watched(self, scope: Scope, replica: Replica, send: Send) -> Send:
        """`send` that remembers which replica has made a response, since it alone can go on from it."""
        if not scope["path"].endswith("/responses"):
            return send
        tail = b""

        async def send_and_look(message: Message) -> None:
            nonlocal tail
            seen = tail + message.get("body", b"")
            self._spread.remember([one.decode() for one in IDS.findall(seen)], replica)
            tail = seen[-128:]
            await send(message)

        return send_and_look

    def _lose(self, replica: Replica, error: Exception) -> None:
        """Give a replica no more requests, until it comes back."""
        if not replica.alive:
            return
        replica.alive = False
        LOG.warning("%s does not answer (%s); the others go on.", replica.name, str(error) or type(error).__name__)
        if replica.socket_path is None:  # whoever runs it may start it again
            task = asyncio.create_task(self._await_return(replica))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    async def _await_return(self, replica: Replica) -> None:
        while not replica.alive:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                response = await replica.client.get("/health", timeout=RETRY_SECONDS)
                replica.alive = response.status_code == 200 and response.json().get("digest") == replica.digest
            except (httpx.TransportError, ValueError):
                continue
        LOG.warning("%s answers again.", replica.name)


def _marks(body: bytes) -> tuple[list[str], bool]:
    try:
        return marks_of(parse_json(body))
    except ApiError:  # whoever answers will say so
        return [], False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body that was read, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _start(response: httpx.Response) -> Message:
    pairs = [(name.lower(), value) for name, value in response.headers.raw]
    headers = [pair for pair in pairs if pair[0].decode("latin-1") not in NOT_PASSED]
    return {"type": "http.response.start", "status": response.status_code, "headers": headers}


def _last(error: ApiError, path: str, kind: str) -> bytes:
    """An error as the last event of a stream of that content type."""
    body: Mapping[str, Any] = error_body(error, path)
    if kind.startswith("text/event-stream"):
        return format_sse({"type": "error", **body}).encode()
    return format_line(dict(body)).encode()
