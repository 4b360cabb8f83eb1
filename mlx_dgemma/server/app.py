"""The HTTP application: routes, error handlers, and the endpoints for health and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..serving.scheduler import Scheduler
from . import local
from .endpoints import models, ollama
from .endpoints.anthropic import MessageExchange, count_tokens
from .endpoints.chat import ChatExchange
from .endpoints.completions import CompletionExchange
from .endpoints.decisions import DecisionExchange
from .endpoints.infill import LlamaCompletionExchange, LlamaInfillExchange, MistralFillExchange
from .endpoints.models import ModelFacts
from .endpoints.responses import ResponseExchange
from .endpoints.tasks import EditExchange, FillExchange
from .errors import ApiError
from .metrics import Histograms, metrics_text
from .page import page_routes
from .pipeline import endpoint
from .replicas.forward import Forward
from .replicas.spread import Spread, digest_of_served
from .schemas.openapi import openapi_document
from .security import SecurityMiddleware, error_response
from .settings import Settings
from .streaming import ClientDisconnected

PARSED_AT_ONCE = 2  # large bodies
VERSIONED = ("chat", "completions", "responses", "messages", "models")  # first parts of paths behind /v1


def create_app(scheduler: Scheduler, settings: Settings, spread: Spread | None = None) -> Starlette:
    """Create the application. It closes the scheduler when it shuts down.

    `spread` chooses who answers a request where there are other replicas.

    Its `state` has these attributes:
        scheduler, settings: the arguments.
        facts: what the server tells of its model.
        digest: a function that returns a digest of the model, adapter and dtypes.
        spread: the argument.
        counts: number of requests by route and status.
        histograms: how long answers took.
        parse_limiter: allows `PARSED_AT_ONCE` large bodies to be parsed at a time.
        stopping: a function that returns whether the server is shutting down; the caller may replace it.
    """
    routes = [
        Route("/v1/chat/completions", endpoint(ChatExchange), methods=["POST"]),
        Route("/v1/completions", endpoint(CompletionExchange), methods=["POST"]),
        Route("/v1/responses", endpoint(ResponseExchange), methods=["POST"]),
        Route("/v1/messages", endpoint(MessageExchange), methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
        Route("/v1/models", models.models),
        Route("/v1/models/{id:path}", models.model),
        Route("/api/v0/models", models.studio_models),
        Route("/api/v0/models/{id:path}", models.studio_model),
        Route("/api/chat", endpoint(ollama.OllamaChatExchange), methods=["POST"]),
        Route("/api/generate", endpoint(ollama.OllamaGenerateExchange), methods=["POST"]),
        Route("/api/show", ollama.show, methods=["POST"]),
        Route("/api/tags", ollama.tags),
        Route("/api/ps", ollama.running),
        Route("/api/version", ollama.version),
        Route("/v1/fim/completions", endpoint(MistralFillExchange), methods=["POST"]),
        Route("/infill", endpoint(LlamaInfillExchange), methods=["POST"]),
        Route("/completion", endpoint(LlamaCompletionExchange), methods=["POST"]),
        Route("/v1/edits", endpoint(EditExchange), methods=["POST"]),
        Route("/v1/fill", endpoint(FillExchange), methods=["POST"]),
        Route("/v1/decisions", endpoint(DecisionExchange), methods=["POST"]),
        *local.routes(scheduler.engine),
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
        middleware=[
            Middleware(WithVersion),
            Middleware(SecurityMiddleware, settings=settings, counts=counts),
            *([Middleware(Forward, spread=spread)] if spread else []),
        ],
        exception_handlers=dict.fromkeys((ApiError, HTTPException, ClientDisconnected, Exception), _failed),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.scheduler, app.state.settings, app.state.counts = scheduler, settings, counts
    app.state.histograms, app.state.spread = Histograms(), spread
    app.state.digest = cache(partial(digest_of_served, scheduler.engine, settings))
    app.state.parse_limiter = CapacityLimiter(PARSED_AT_ONCE)
    app.state.facts, app.state.stopping = ModelFacts.of(scheduler.engine, settings), lambda: False
    return app


class WithVersion:
    """ASGI middleware for base URLs that were typed without /v1: their paths mean those with it."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"].removeprefix("/").split("/")[0] in VERSIONED:
            scope = {**scope, "path": f"/v1{scope['path']}"}
        await self._app(scope, receive, send)


async def health(request: Request) -> Response:
    """GET /health: whether the server accepts requests, how many it has, and since when it works on the last step."""
    state = request.app.state
    load, health, stopping = state.scheduler.load(), state.scheduler.health(), state.stopping()
    status = "stopping" if stopping else "ok" if health.alive else "failed"
    body = {
        "status": status,
        "model": state.settings.model,
        "version": __version__,
        "digest": state.digest(),
        "running": load.running,
        "waiting": load.waiting,
        "seconds_since_step": round(health.seconds_since_pass, 3),
    }
    if state.spread:
        body["replicas"] = [
            {"name": one.name, "alive": one.alive, "requests": one.requests} for one in state.spread.replicas
        ]
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics in Prometheus' text format."""
    state = request.app.state
    text = metrics_text(state.scheduler.load(), state.histograms, state.counts)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(openapi_document(request.app.state.settings))


async def _failed(request: Request, error: Exception) -> Response:
    """The response where an endpoint raised something."""
    if isinstance(error, ClientDisconnected):
        return Response(status_code=499)  # only the log shows it
    if isinstance(error, HTTPException):
        path = request.url.path[:100]
        messages = {404: f"There is no {path} here", 405: f"{path} knows no {request.method}"}
        message = f"{messages.get(error.status_code, error.detail)}; see /openapi.json."
        message = ollama.absent(request.url.path) or message
        error = ApiError(message, status=error.status_code, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):
        error = ApiError("The server failed; its log says why.", status=500)
    return error_response(error, request.url.path)
