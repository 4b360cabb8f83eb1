"""The HTTP application: routes, errors, and what tells of the server itself."""

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
from .openapi import document
from .options import check_model
from .responses import responses
from .safety import Safety, refusal
from .sending import Gone
from .settings import Settings

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GAUGES = {
    "running": "Requests that are denoised.",
    "waiting": "Requests that wait.",
    "cache_bytes": "Bytes of prefixes that are kept.",
    "cache_entries": "Prefixes that are kept.",
}
COUNTERS = {
    "requests": "Requests submitted.",
    "cancelled": "Requests whose asker left.",
    "failed": "Requests that came to nothing.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts whose encoding was kept.",
    "generated_tokens": "Tokens of answers.",
    "blocks": "Canvases that settled.",
    "denoising_steps": "Denoising steps, summed over requests.",
    "canvas_positions": "Positions denoised, summed over steps.",
}


def create_app(scheduler: Scheduler, settings: Settings) -> Starlette:
    """The application; it closes the scheduler when it ends.

    Its `state` holds scheduler, settings, started (Unix time), counts (requests by route and status), looking
    (lets one picture at a time be decoded, which takes up to 1 GB) and stopping (a function that tells whether the
    server is about to end; false until somebody sets another).
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
        middleware=[Middleware(Safety, settings=settings, counts=counts)],
        exception_handlers={ApiError: _refuse, HTTPException: _no_route, Gone: _gone, Exception: _failed},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.scheduler, app.state.settings, app.state.counts = scheduler, settings, counts
    app.state.looking = CapacityLimiter(1)
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
    """GET /health: whether it is worth asking."""
    state = request.app.state
    load, stopping = state.scheduler.load(), state.stopping()
    told = {
        "status": "stopping" if stopping else "ok",
        "model": state.settings.model,
        "running": load.running,
        "waiting": load.waiting,
    }
    return JSONResponse(told, 503 if stopping else 200)


async def metrics(request: Request) -> Response:
    """GET /metrics, in Prometheus' text format."""
    load, lines = request.app.state.scheduler.load(), []
    for name, what in GAUGES.items():
        lines += _metric(f"dgemma_{name}", "gauge", what, {"": getattr(load, name)})
    for name, what in COUNTERS.items():
        lines += _metric(f"dgemma_{name}_total", "counter", what, {"": load.counters[name]})
    counts = {
        f'{{endpoint="{endpoint}",status="{status}"}}': count
        for (endpoint, status), count in sorted(request.app.state.counts.items())
    }
    lines += _metric("dgemma_http_requests_total", "counter", "HTTP requests, by endpoint and status.", counts)
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(document(request.app.state.settings))


async def page(_: Request) -> Response:
    """GET /."""
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


def _metric(name: str, kind: str, what: str, values: dict[str, int]) -> list[str]:
    samples = [f"{name}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *samples]


def _model(request: Request) -> dict[str, object]:
    state = request.app.state
    return {"id": state.settings.model, "object": "model", "created": state.started, "owned_by": "mlx-dgemma"}


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "There is no {path} here", 405: "{path} knows no {method}"}.get(error.status_code, error.detail)
    path = request.url.path[:100]
    message = what.format(path=path, method=request.method) if error.status_code in (404, 405) else what
    return refusal(
        ApiError(f"{message}; see /openapi.json.", status=error.status_code, headers=dict(error.headers or {}))
    )


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody hears it but the log


async def _failed(_: Request, __: Exception) -> Response:
    return refusal(ApiError("The server failed; its log says why.", status=500))
