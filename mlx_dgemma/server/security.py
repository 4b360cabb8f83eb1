"""Host, Origin, API-key and body-size checks, applied before routing, and the access log.

Every web page that the user opens can send requests to a server on the user's machine. Two checks prevent this. The
Host header must be a name of this server, which stops DNS rebinding. The Origin header, which browsers add to requests
of other pages, must be the server's own origin or an allowed one.

A Unix socket is the user's own: no web page reaches it, and its mode lets nobody else in. There only sizes are checked.

Desktop apps have origins of their own, which one setting allows. No web page can have them: a browser loads no page
from an app's scheme, and `tauri.localhost` is this machine. `null` is never allowed, as any page can have it.
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

from .errors import ApiError, error_body
from .page import FILES
from .settings import Settings, is_app

LOG = logging.getLogger("mlx_dgemma.access")
MAX_BODIES = 16  # of the largest size, in all requests that are being answered
PUBLIC_PATHS = ("/health", *FILES)  # need no API key: the page asks for it, and monitors have none


class SecurityMiddleware:
    """ASGI middleware that checks Host, Origin and API key, limits the body, and counts and logs requests.

    Attributes:
        counts: number of requests by (route, status).
    """

    def __init__(self, app: ASGIApp, settings: Settings, counts: Counter[tuple[str, int]]):
        self._app, self._settings, self.counts = app, settings, counts
        self._held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, headers, received = time.perf_counter(), 499, Headers(scope=scope), 0
        local = is_local(scope)
        allowed_origin = origin if (origin := headers.get("origin")) and self._settings.allows(origin) else None

        async def receive_within_limits() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received, self._held = received + size, self._held + size
            self._check_size(received, local)
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["X-Content-Type-Options"] = "nosniff"
                if self._settings.cors_origins or self._settings.desktop_apps:
                    response_headers.add_vary_header("Origin")
                if allowed_origin:
                    response_headers["Access-Control-Allow-Origin"] = allowed_origin
                    response_headers["Access-Control-Expose-Headers"] = "Retry-After"
            await send(message)

        try:
            try:
                app: ASGIApp = (None if local else self._check(scope, headers, allowed_origin)) or self._app
                if (length := headers.get("content-length", "0")).isdecimal():
                    self._check_size(int(length[:20]), local)
            except ApiError as error:
                app = error_response(error, scope["path"])
            await app(scope, receive_within_limits, send_with_headers)
        except Exception:
            status = 500
            raise
        finally:
            self._held -= received
            self._log(scope, status, time.perf_counter() - start)

    def _check_size(self, size: int, local: bool) -> None:
        """Refuse a body of so many bytes, with or without a Content-Length, or what is too much beside others."""
        most = self._settings.body_bytes * (MAX_BODIES if local else 1)
        if size > most:
            message = f"The body is larger than {most / 2**20:g} MiB; send less."
            raise ApiError(message, status=413, code="request_too_large", headers={"Connection": "close"})
        if self._held > MAX_BODIES * self._settings.body_bytes:
            message = "The requests that are being answered are as large as the server allows; try again later."
            raise ApiError(message, status=503, code="busy", headers={"Retry-After": "1", "Connection": "close"})

    def _check(self, scope: Scope, headers: Headers, allowed_origin: str | None) -> Response | None:
        """Return the response to a CORS preflight, or None if the application should handle the request.

        Raises:
            ApiError: a check failed.
        """
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or re.sub(r":\d*$", "", host).lower() not in self._settings.hosts:
            raise ApiError(
                f"The Host header is {host[:100]!r}, which is not a name of this server; --allowed-host makes it one.",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not allowed_origin and origin.lower() != f"{scope['scheme']}://{host.lower()}":
            raise ApiError(
                f"The Origin header is {origin[:100]!r}, and pages from there may not ask; {_way(origin)}.",
                status=403,
                code="origin_not_allowed",
            )
        if allowed_origin and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return Response(
                status_code=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST, DELETE",
                    "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
                    "Access-Control-Max-Age": "600",
                },
            )
        if self._settings.api_key is not None and scope["path"] not in PUBLIC_PATHS:
            kind, _, key = headers.get("authorization", "").partition(" ")
            sent = [*([key] if kind.lower() == "bearer" else []), *headers.getlist("x-api-key")]
            # Headers are decoded as Latin-1, where bytes of UTF-8 can look like white space: strip only ASCII blanks.
            keys, wanted = [one.strip(" \t").encode("latin-1") for one in sent], self._settings.api_key.encode()
            if not any(hmac.compare_digest(one, wanted) for one in keys):
                raise ApiError(
                    "The API key is missing or wrong; send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`.",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.counts[route, status] += 1
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"-").decode("ascii", "replace")[:200]  # percent-encoded: no control characters
        LOG.info("%s %s %s %s %d %.3f s", time.strftime("%F %T"), client, scope["method"], path, status, seconds)


def is_local(scope: Scope) -> bool:
    """Whether a request came over the Unix socket; `Connection` marks those."""
    return bool(scope.get("state", {}).get("local"))


def _way(origin: str) -> str:
    """What a user can do for an origin."""
    if origin == "null":
        return "any page can have this one, so nothing allows it"
    return f"{'--desktop-apps' if is_app(origin) else '--cors-origin'} allows it"


def error_response(error: ApiError, path: str) -> JSONResponse:
    """The HTTP response for an error of a request for this path."""
    return JSONResponse(error_body(error, path), error.status, error.headers)
