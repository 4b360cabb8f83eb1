"""What the commands of this machine ask over the Unix socket: the engine's verbs with the engine's own arguments.

A request takes what a command would give to `Engine.prepare`, `infill`, `edit` or `choose`, so the same seed gives the
same text. Lines of JSON come back, an event each. Commands and server are of the same version, or they part.

    GET /local             the version, what is loaded, its notes
    POST /local/generate   {"arguments": [...], "keywords": {...}, "drafts": true} -> accepted, draft, block, result
    POST /local/infill     the same
    POST /local/edit       the same
    POST /local/choose     {"arguments": [messages, labels], "keywords": {...}} -> accepted, choice

Pictures and videos come as {"name", "base64"}, since a background process may not read the user's folders on a Mac.
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..prompt.images import FileBytes
from ..prompt.messages import parts_of
from ..serving.rendezvous import VERSION_HEADER, stamp
from .errors import ApiError
from .follow import follow
from .local_tasks import COLLECTED, TASKS
from .security import is_local
from .streaming import ClientDisconnected, LineStream, as_text, cancel_on_disconnect, format_line

if TYPE_CHECKING:
    from ..engine import Engine

QUOTING_MODULES = r"mlx_dgemma\.(?!serving\.)"  # their warnings quote answers, which must not be logged


def routes(engine: Engine) -> list[Route]:
    """The routes for commands; `engine` is what they use."""
    loaded = stamp(engine.checkpoint.path, getattr(engine, "adapter", None))
    hello = partial(_hello, loaded)
    return [Route("/local", hello), Route("/local/{task}", _run, methods=["POST"])]


def collect_warnings() -> None:
    """Tell warnings to the command whose request they are about; others that may quote an answer are dropped.

    It takes the place of `warnings.showwarning`, for the whole process.
    """
    warnings.filterwarnings("always", category=UserWarning, module=QUOTING_MODULES)
    show, root = warnings.showwarning, Path(__file__).parent.parent

    def tell(message: Any, category: Any, filename: str, *more: Any, **others: Any) -> None:
        collected = COLLECTED.get()
        path = Path(filename)
        module = ".".join([root.name, *path.relative_to(root).parts]) if path.is_relative_to(root) else ""
        if collected is not None:
            collected.append(str(message))
        elif not (issubclass(category, UserWarning) and re.match(QUOTING_MODULES, module)):
            show(message, category, filename, *more, **others)

    warnings.showwarning = tell


async def _hello(loaded: tuple[tuple[str, int, int], ...], http: Request) -> Response:
    """GET /local: what a command must know before it asks."""
    _check(http)
    engine = http.app.state.scheduler.engine
    if stamp(engine.checkpoint.path, engine.adapter) != loaded:
        raise ApiError(
            f"Files of {engine.checkpoint.path} have changed since the server loaded them; restart the server.",
            status=409,
            code="changed",
        )
    told = {"version": __version__, "identity": http.app.state.settings.identity, "notes": engine.notes}
    return JSONResponse(told)


def _check(http: Request) -> None:
    """Refuse requests that came over the network, and those of another version."""
    if not is_local(http.scope):
        raise HTTPException(404)
    version = http.headers.get(VERSION_HEADER)
    if version != __version__:
        raise ApiError(
            f"The server is mlx-dgemma {__version__} and this is {version}; restart the server with this version.",
            status=409,
            code="version",
        )


async def _run(http: Request) -> Response:
    """POST /local/...: lines of events."""
    _check(http)
    task, scheduler = http.path_params["task"], http.app.state.scheduler
    if task not in TASKS:
        raise HTTPException(404)
    try:
        text = await http.body()
    except ClientDisconnect:
        raise ClientDisconnected from None
    body = await to_thread.run_sync(_parsed, text, limiter=http.app.state.parse_limiter)
    asked = TASKS[task](scheduler.engine, body)
    observe = http.app.state.histograms.observe
    events = follow(scheduler, asked.prepares(), bool(body.get("drafts")), asked.translate, observe)
    first = await cancel_on_disconnect(http, anext(events))  # what fails before it has a status of its own
    return LineStream(as_text(first, events, asked.told, asked.end, lambda error: [error.body()], format_line))


def _parsed(text: bytes) -> dict[str, Any]:
    """The body, with files in place of their base64."""
    body = json.loads(text)
    for message in body["arguments"][0] if isinstance(body["arguments"][0], list) else ():
        for part in parts_of([message], "image", "video"):
            held = part[part["type"]]
            if isinstance(held, dict):
                data = base64.b64decode(held["base64"])
                part[part["type"]] = FileBytes.of(data, held["name"]) if held["name"] else data
    return body
