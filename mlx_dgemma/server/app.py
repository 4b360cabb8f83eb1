"""The HTTP application: routes, error handlers, and the endpoints for models, health, metrics and the web page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..serving.scheduler import Scheduler
from .chat import chat_completions
from .completions import completions
from .errors import ApiError
from .openapi import openapi_document
from .options import check_model
from .responses import responses
from .security import SecurityMiddleware, error_response
from .settings import Settings
from .streaming import ClientDisconnected

PAGE = Path(__file__).with_name("page.html")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GAUGES = {
    "running": "Requests being generated.",
    "waiting": "Requests waiting in the queue.",
    "cache_bytes": "Bytes of cached prefixes.",
    "cache_entries": "Number of cached prefixes.",
}
COUNTERS = {
    "requests": "Requests submitted.",
    "cancelled": "Requests cancelled because the client disconnected.",
    "failed": "Requests that failed.",
    "prompt_tokens": "Prompt tokens.",
    "cached_tokens": "Prompt tokens reused from the prefix cache.",
    "generated_tokens": "Generated tokens.",
    "blocks": "Finished canvases (blocks).",
    "denoising_steps": "Denoising steps, summed over requests.",
    "canvas_positions": "Canvas positions computed, summed over denoising steps.",
}


def create_app(scheduler: Scheduler, settings: Settings) -> Starlette:
    """Create the application. It closes the scheduler when it shuts down.

    Its `state` has these attributes:
        scheduler, settings: the arguments.
        started: Unix time.
        counts: number of requests by route and status.
        decode_limiter: allows one picture to be decoded at a time, which takes up to 1 GB.
        stopping: a function that returns whether the server is shutting down; the caller may replace it.
    """
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
    ]
    if PAGE.exists():
        routes.append(Route("/", page))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(scheduler.close, settings.shutdown_seconds)

    counts: Counter[tuple[str, int]] = Counter()
    app = Starlette(
        routes=routes,
        middleware=[Middleware(SecurityMiddleware, settings=settings, counts=counts)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnected: _disconnected,
            Exception: _internal_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.scheduler, app.state.settings, app.state.counts = scheduler, settings, counts
    app.state.decode_limiter = CapacityLimiter(1)
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
    load, scheduler_health, stopping = state.scheduler.load(), state.scheduler.health(), state.stopping()
    status = "stopping" if stopping else "ok" if scheduler_health.alive else "failed"
    body = {
        "status": status,
        "model": state.settings.model,
        "running": load.running,
        "waiting": load.waiting,
        "seconds_since_step": round(scheduler_health.seconds_since_pass, 3),
    }
    return JSONResponse(body, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics in Prometheus' text format."""
    load, lines = request.app.state.scheduler.load(), []
    for name, help_text in GAUGES.items():
        lines += _metric(f"dgemma_{name}", "gauge", help_text, {"": getattr(load, name)})
    for name, help_text in COUNTERS.items():
        lines += _metric(f"dgemma_{name}_total", "counter", help_text, {"": load.counters[name]})
    counts = {
        f'{{endpoint="{endpoint}",status="{status}"}}': count
        for (endpoint, status), count in sorted(request.app.state.counts.items())
    }
    lines += _metric("dgemma_http_requests_total", "counter", "HTTP requests by endpoint and status.", counts)
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(openapi_document(request.app.state.settings))


async def page(_: Request) -> Response:
    """GET /: the web page."""
    headers = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


def _metric(name: str, kind: str, help_text: str, values: dict[str, int]) -> list[str]:
    samples = [f"{name}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *samples]


def _model(request: Request) -> dict[str, object]:
    state = request.app.state
    return {"id": state.settings.model, "object": "model", "created": state.started, "owned_by": "mlx-dgemma"}


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    messages = {404: f"There is no {path} here", 405: f"{path} knows no {request.method}"}
    message = messages.get(error.status_code, error.detail)
    return error_response(
        ApiError(f"{message}; see /openapi.json.", status=error.status_code, headers=dict(error.headers or {}))
    )


async def _disconnected(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # only the log shows it


async def _internal_error(_: Request, __: Exception) -> Response:
    return error_response(ApiError("The server failed; its log says why.", status=500))
