"""`mlx-dgemma serve`: an HTTP server that speaks as OpenAI's and Ollama's."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from ...errors import DgemmaError
from ...installation import add_extra
from ...server.settings import Settings, model_name
from ..common import ModelChoice, adapter_option, model_options
from ..terminal import Terminal

MAX_DEFAULT_CACHE = 4 * 2**30  # bytes
QUOTING_MODULES = r"mlx_dgemma\.(?!serving\.)"  # their warnings quote answers, which must not be logged


@click.command(epilog="The server describes its requests at /openapi.json.")
@model_options
@adapter_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. One that other machines can reach requires an API key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="MLX_DGEMMA_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="Clients must send this key (Authorization: Bearer KEY).",
)
@click.option(
    "--alias", "aliases", multiple=True, metavar="NAME", help="Further name of the model, such as gpt-4o; repeatable."
)
@click.option(
    "--rows", type=click.IntRange(1), default=8, show_default=True, help="Maximum number of requests in a batch."
)
@click.option(
    "--waiting", type=click.IntRange(0), default=64, show_default=True, help="Maximum number of requests in the queue."
)
@click.option(
    "--cache-size",
    type=click.FloatRange(0),
    metavar="GIB",
    help="Memory for the prefix cache; 0 disables it.  [default: a quarter of the free memory, at most 4]",
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps the prefix cache across restarts; uses up to --cache-size of disk.",
)
@click.option(
    "--cors-origin", "origins", multiple=True, metavar="ORIGIN", help="Web origin that may send requests; repeatable."
)
@click.option(
    "--desktop-apps",
    is_flag=True,
    help="Let desktop apps that are web pages inside send requests (app://, tauri://, file://, vscode-webview://), and "
    "containers by the name host.docker.internal.",
)
@click.option(
    "--allowed-host", "hosts", multiple=True, metavar="NAME", help="Additional host name of this server; repeatable."
)
@click.option(
    "--shutdown-seconds",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="Time that running answers get to finish when the server stops.",
)
@click.option(
    "--install", is_flag=True, help="Start now and at every login with these options, as a launchd agent (macOS)."
)
@click.option("--uninstall", is_flag=True, help="Stop and remove the launchd agent.")
@click.pass_context
def serve(
    ctx: click.Context,
    model: ModelChoice,
    host: str,
    port: int,
    api_key: str | None,
    aliases: tuple[str, ...],
    rows: int,
    waiting: int,
    cache_size: float | None,
    cache_dir: Path | None,
    origins: tuple[str, ...],
    desktop_apps: bool,
    hosts: tuple[str, ...],
    shutdown_seconds: float,
    install: bool,
    uninstall: bool,
) -> None:
    """Serve the HTTP APIs of OpenAI, Anthropic and Ollama until Ctrl-C.

    By default, only this machine can reach the server. Any OpenAI client works with the base URL that is printed, any
    client of Ollama with the same URL without /v1.
    The server logs one line per request to stderr, without prompts or answers.

    \b
    mlx-dgemma serve
    mlx-dgemma serve --model FOLDER --port 9000
    mlx-dgemma serve --host 0.0.0.0 --allowed-host mac.local --api-key "$(cat key.txt)"
    """
    _require_packages()
    if cache_dir is not None and cache_size == 0:
        raise click.UsageError("--cache-size is 0, so --cache-dir would hold nothing; leave one out.")
    given: dict[str, Any] = {"shutdown_seconds": shutdown_seconds, "aliases": aliases, "desktop_apps": desktop_apps}
    settings = Settings(model_name(model.name), host, api_key, hosts, origins, **given)
    terminal = Terminal()
    if install or uninstall:
        _agent(ctx, install and uninstall, install, api_key, terminal)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once the server has stopped
    with _listen(host, port) as server_socket:
        engine = model.load(terminal)
        from ...checkpoint.memory import free_bytes_beside
        from ...server.app import create_app
        from ...server.connections import Server
        from ...serving.scheduler import Scheduler

        default_bytes = min(free_bytes_beside(engine.checkpoint, rows) // 4, MAX_DEFAULT_CACHE)
        cache_bytes = default_bytes if cache_size is None else round(cache_size * 2**30)
        scheduler = Scheduler(engine, rows=rows, waiting=waiting, cache_bytes=cache_bytes, cache_dir=cache_dir)
        app = create_app(scheduler, settings)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("mlx_dgemma").setLevel(logging.INFO)
        warnings.filterwarnings("ignore", category=UserWarning, module=QUOTING_MODULES)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else a line for whatever is no HTTP
        server = Server(app)
        scheduler.on_death = lambda: setattr(server, "should_exit", True)
        address = f"[{host}]" if ":" in host else host
        with_adapter = f" with the adapter {engine.adapter}" if engine.adapter else ""
        terminal.warn(
            f"Listening on http://{address}:{server_socket.getsockname()[1]}/v1{with_adapter}; Ctrl-C stops it."
        )
        server.run(sockets=[server_socket])
        if scheduler.broken is not None:
            raise DgemmaError(str(scheduler.broken))


def _require_packages() -> None:
    """Refuse to start without the packages of the extra."""
    try:
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DgemmaError(f"serve needs the package {error.name}; run `{add_extra('serve')}`.") from None


def _agent(ctx: click.Context, both: bool, install: bool, api_key: str | None, terminal: Terminal) -> None:
    """Install the launchd agent with the options of this command line, or remove it."""
    from .. import launchd

    if both:
        raise click.UsageError("--install and --uninstall are two things to do; give one.")
    if not install:
        terminal.warn(f"Removed {launchd.uninstall()}.")
        return
    arguments = sys.argv[sys.argv.index(ctx.info_name or "serve") + 1 :]
    terminal.warn(f"Installed {launchd.install(arguments, api_key)}; --uninstall removes it.")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded so that errors come early."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, reuse_port=False)
    except OSError as error:
        reason = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)
        raise DgemmaError(
            f"{host} port {port} cannot be listened on ({reason}); choose others with --host and --port."
        ) from None
