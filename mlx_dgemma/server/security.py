"""Host, Origin, API-key and body-size checks, applied before routing, and the access log.

Every web page that the user opens can send requests to a server on the user's machine. Two checks prevent this. The
Host header must be a name of this server, which stops DNS rebinding. The Origin header, which browsers add to requests
of other pages, must be the server's own origin or an allowed one.
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
PUBLIC_PATHS = ("/", "/health")  # need no API key: the page asks for it, and monitors have none


class SecurityMiddleware:
    """ASGI middleware that checks Host, Origin and API key, limits the body, and counts and logs requests.

    Attributes:
        counts: number of requests by (route, status).
    """

    def __init__(self, app: ASGIApp, settings: Settings, counts: Counter[tuple[str, int]]):
        self._app, self._settings, self.counts = app, settings, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, headers = time.perf_counter(), 499, Headers(scope=scope)
        allowed_origin = headers.get("origin") if headers.get("origin") in self._settings.cors_origins else None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["X-Content-Type-Options"] = "nosniff"
                if self._settings.cors_origins:
                    response_headers.add_vary_header("Origin")
                if allowed_origin:
                    response_headers["Access-Control-Allow-Origin"] = allowed_origin
                    response_headers["Access-Control-Expose-Headers"] = "Retry-After"
            await send(message)

        try:
            try:
                app: ASGIApp = self._check(scope, headers, allowed_origin) or self._app
                limited = _LimitedBody(receive, self._settings.body_bytes, headers)
            except ApiError as error:
                app, limited = error_response(error), None
            await app(scope, limited or receive, send_with_headers)
        except Exception:
            status = 500
            raise
        finally:
            self._log(scope, status, time.perf_counter() - start)

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
                f"The Origin header is {origin[:100]!r}, and pages from there may not ask; --cors-origin allows it.",
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
            # Headers are decoded as Latin-1, where bytes of UTF-8 can look like white space: strip only ASCII blanks.
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

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.counts[route, status] += 1
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"-").decode("ascii", "replace")[
            :200
        ]  # still percent-encoded, so without control characters
        LOG.info("%s %s %s %s %d %.3f s", time.strftime("%F %T"), client, scope["method"], path, status, seconds)


class _LimitedBody:
    """A `receive` that raises ApiError for a body above the limit, with or without a Content-Length."""

    def __init__(self, receive: Receive, limit: int, headers: Headers):
        self._receive, self._limit, self._received = receive, limit, 0
        if (length := headers.get("content-length", "0")).isdecimal() and int(length[:20]) > limit:
            raise self._too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._limit:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(
            f"The body is larger than {self._limit / 2**20:g} MiB; send less.",
            status=413,
            code="request_too_large",
            headers={"Connection": "close"},
        )


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP response for an error."""
    return JSONResponse(error.body(), error.status, error.headers)
