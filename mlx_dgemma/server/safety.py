"""Who may ask, and how much: the checks before any endpoint, and the access log.

A server on this machine's own address is within reach of every page that its user has open. Two checks keep pages
out: the Host header must be a name of this server, which a rebound domain's is not, and an Origin, which browsers add
to what pages send elsewhere, must be this server's own or one that is allowed.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections import Counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

LOG = logging.getLogger("mlx_dgemma.access")
OPEN = ("/", "/health")  # without a key: the page asks for it, and tools that watch have none


class Safety:
    """ASGI middleware: checks Host, Origin and key, bounds the body, counts and logs.

    Attributes:
        counts: requests by (route, status).
    """

    def __init__(self, app: ASGIApp, settings: Settings, counts: Counter[tuple[str, int]]):
        self._app, self._settings, self.counts = app, settings, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, headers = time.perf_counter(), 499, Headers(scope=scope)
        allowed = headers.get("origin") if headers.get("origin") in self._settings.cors_origins else None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                held = MutableHeaders(scope=message)
                held["X-Content-Type-Options"] = "nosniff"
                if self._settings.cors_origins:
                    held.add_vary_header("Origin")
                if allowed:
                    held["Access-Control-Allow-Origin"] = allowed
                    held["Access-Control-Expose-Headers"] = "Retry-After"
            await send(message)

        try:
            try:
                app: ASGIApp = self._checked(scope, headers, allowed) or self._app
                taken = _Bounded(receive, self._settings.body_bytes, headers)
            except ApiError as error:
                app, taken = refusal(error), None
            await app(scope, taken or receive, told)
        except Exception:
            status = 500
            raise
        finally:
            self._note(scope, status, time.perf_counter() - began)

    def _checked(self, scope: Scope, headers: Headers, allowed: str | None) -> Response | None:
        """What answers a preflight, or None for the application.

        Raises:
            ApiError: the request may not be made.
        """
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or re.sub(r":\d*$", "", host).lower() not in self._settings.hosts:
            raise ApiError(
                f"The Host header is {host[:100]!r}, which is not a name of this server; --allowed-host makes it one.",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not allowed and origin.lower() != f"{scope['scheme']}://{host.lower()}":
            raise ApiError(
                f"The Origin header is {origin[:100]!r}, and pages from there may not ask; --cors-origin allows it.",
                status=403,
                code="origin_not_allowed",
            )
        if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return Response(
                status_code=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST, DELETE",
                    "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
                    "Access-Control-Max-Age": "600",
                },
            )
        if self._settings.api_key is not None and scope["path"] not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            # Headers are decoded as Latin-1, in which bytes of UTF-8 can look like blanks.
            if kind.lower() != "bearer" or not hmac.compare_digest(
                key.strip(" \t").encode("latin-1"), self._settings.api_key.encode()
            ):
                raise ApiError(
                    "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.counts[route, status] += 1
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"-").decode("ascii", "replace")[:200]  # as sent: no control characters
        LOG.info("%s %s %s %s %d %.3f s", time.strftime("%F %T"), client, scope["method"], path, status, seconds)


class _Bounded:
    """`receive` that refuses a body that is too large, whether it says so or not."""

    def __init__(self, receive: Receive, most: int, headers: Headers):
        self._receive, self._most, self._seen = receive, most, 0
        if (said := headers.get("content-length", "0")).isdecimal() and int(said[:20]) > most:
            raise self._too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._most:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            f"The body is larger than {self._most / 2**20:g} MiB; send less.",
            status=413,
            code="request_too_large",
            headers={"Connection": "close"},
        )


def refusal(error: ApiError) -> JSONResponse:
    """The answer that says so."""
    return JSONResponse(error.body(), error.status, error.headers)
