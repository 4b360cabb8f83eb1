"""The HTTP application: routes, error handlers, and the endpoints for models, health and metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..serving.scheduler import Scheduler
from .endpoints.chat import ChatExchange
from .endpoints.completions import CompletionExchange
from .endpoints.responses import ResponseExchange
from .errors import ApiError
from .metrics import Histograms, metrics_text
from .options import check_model
from .page import page_routes
from .pipeline import endpoint
from .schemas.openapi import openapi_document
from .security import SecurityMiddleware, error_response
from .settings import Settings
from .streaming import ClientDisconnected

PARSED_AT_ONCE = 2  # large bodies


def create_app(scheduler: Scheduler, settings: Settings) -> Starlette:
    """Create the application. It closes the scheduler when it shuts down.

    Its `state` has these attributes:
        scheduler, settings: the arguments.
        started: Unix time.
        counts: number of requests by route and status.
        histograms: how long answers took.
        decode_limiter: allows one picture to be decoded at a time, which takes up to 1 GB.
        parse_limiter: allows `PARSED_AT_ONCE` large bodies to be parsed at a time.
        stopping: a function that returns whether the server is shutting down; the caller may replace it.
    """
    routes = [
        Route("/v1/chat/completions", endpoint(ChatExchange), methods=["POST"]),
        Route("/v1/completions", endpoint(CompletionExchange), methods=["POST"]),
        Route("/v1/responses", endpoint(ResponseExchange), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        *page_routes(),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(scheduler.close, settings.shutdown_seconds)

    counts: Counter[tuple[str, int]] = Counter()
    app = Starlette(
        routes=routes,
        middleware=[Middleware(SecurityMiddleware, settings=settings, counts=counts)],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, ClientDisconnected, Exception), _failed),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.scheduler, app.state.settings, app.state.counts = scheduler, settings, counts
    app.state.histograms = Histograms()
    app.state.decode_limiter, app.state.parse_limiter = CapacityLimiter(1), CapacityLimiter(PARSED_AT_ONCE)
    app.state.started, app.state.stopping = int(time.time()), lambda: False
    return app


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    check_model(request.path_params["id"], request.app.state.settings)
    return JSONResponse(_model(request))


async def health(request: Request) -> Response:
    """GET /health: whether the server accepts requests, how many it has, and since when it works on the last step."""
    state = request.app.state
    load, health, stopping = state.scheduler.load(), state.scheduler.health(), state.stopping()
    status = "stopping" if stopping else "ok" if health.alive else "failed"
    body = {
        "status": status,
        "model": state.settings.model,
        "running": load.running,
        "waiting": load.waiting,
        "seconds_since_step": round(health.seconds_since_pass, 3),
    }
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics in Prometheus' text format."""
    state = request.app.state
    text = metrics_text(state.scheduler.load(), state.histograms, state.counts)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(openapi_document(request.app.state.settings))


def _model(request: Request) -> dict[str, object]:
    state = request.app.state
    return {"id": state.settings.model, "object": "model", "created": state.started, "owned_by": "mlx-dgemma"}


async def _failed(request: Request, error: Exception) -> Response:
    """The response where an endpoint raised something."""
    if isinstance(error, ClientDisconnected):
        return Response(status_code=499)  # only the log shows it
    if isinstance(error, HTTPException):
        path = request.url.path[:100]
        messages = {404: f"There is no {path} here", 405: f"{path} knows no {request.method}"}
        message = f"{messages.get(error.status_code, error.detail)}; see /openapi.json."
        error = ApiError(message, status=error.status_code, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):
        error = ApiError("The server failed; its log says why.", status=500)
    return error_response(error)
