"""`mlx-dgemma serve`: an OpenAI-compatible server on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from pathlib import Path

import click

from ..errors import OptionError
from ..server.settings import Settings, model_name
from .common import adapter_option, load_engine, model_options
from .terminal import Terminal

MOST_CACHE = 4 * 2**30  # bytes


@click.command(epilog="README.md lists what requests may hold.")
@model_options
@adapter_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar="MLX_DGEMMA_API_KEY", show_envvar=True, metavar="KEY", help="Asked of everybody.")
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Answers denoised together.")
@click.option("--waiting", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--cache-size",
    type=click.FloatRange(0),
    metavar="GIB",
    help="Memory for prefixes of earlier requests; 0 keeps none.  [default: a quarter of what is free, at most 4]",
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder where they outlive the server; it takes as much again.",
)
@click.option("--cors-origin", "origins", multiple=True, metavar="ORIGIN", help="Pages that may ask; repeatable.")
@click.option("--allowed-host", "hosts", multiple=True, metavar="NAME", help="Further name of this server; repeatable.")
@click.option(
    "--shutdown-seconds",
    type=click.FloatRange(0),
    default=10,
    show_default=True,
    help="That running answers get when the server is stopped.",
)
@click.option("--install", is_flag=True, help="Run so at every login, as a launchd agent (macOS).")
@click.option("--uninstall", is_flag=True, help="Remove that agent.")
@click.pass_context
def serve(
    ctx: click.Context,
    model: str | None,
    dtype: str | None,
    ignore_memory: bool,
    adapter: str | None,
    host: str,
    port: int,
    api_key: str | None,
    rows: int,
    waiting: int,
    cache_size: float | None,
    cache_dir: Path | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    shutdown_seconds: float,
    install: bool,
    uninstall: bool,
) -> None:
    """Answer over HTTP, as OpenAI's API does, until Ctrl-C.

    Listens on this machine alone unless told otherwise. Any OpenAI client works with the base URL that is printed.
    One line a request goes to stderr, and no text of it.

    \b
    mlx-dgemma serve
    mlx-dgemma serve --model FOLDER --port 9000
    mlx-dgemma serve --host 0.0.0.0 --allowed-host mac.local --api-key "$(cat key.txt)"
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise OptionError(f'serve needs the package {error.name}: pip install "mlx-dgemma[serve]".') from None
    if cache_dir is not None and cache_size == 0:
        raise click.UsageError("--cache-size is 0, so --cache-dir would hold nothing; leave one out.")
    settings = Settings(model_name(model), host, api_key, hosts, origins, shutdown_seconds)
    terminal = Terminal()
    if install or uninstall:
        _agent(ctx, install and uninstall, install, api_key, terminal)
        return
    with _listen(host, port) as listening:
        engine = load_engine(model, dtype, ignore_memory, terminal, adapter)
        from ..checkpoint.memory import free_bytes_beside
        from ..server.app import create_app
        from ..serving.scheduler import Scheduler

        free = min(free_bytes_beside(engine.checkpoint, rows) // 4, MOST_CACHE)
        kept = free if cache_size is None else round(cache_size * 2**30)
        scheduler = Scheduler(engine, rows=rows, waiting=waiting, cache_bytes=kept, cache_dir=cache_dir)
        app = create_app(scheduler, settings)
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("mlx_dgemma").setLevel(logging.INFO)
        quoting = r"mlx_dgemma\.(?!schedule$)"  # their warnings quote answers
        warnings.filterwarnings("ignore", category=UserWarning, module=quoting)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=max(round(shutdown_seconds), 1),
            )
        )
        app.state.stopping = lambda: server.should_exit
        name = f"[{host}]" if ":" in host else host
        changed = f" with the adapter {engine.adapter}" if engine.adapter else ""
        terminal.warn(f"Listening on http://{name}:{listening.getsockname()[1]}/v1{changed}; Ctrl-C stops it.")
        server.run(sockets=[listening])


def _agent(ctx: click.Context, both: bool, install: bool, api_key: str | None, terminal: Terminal) -> None:
    """Install or remove the launchd agent, with the options that stand on this command line."""
    from . import launchd

    if both:
        raise click.UsageError("--install and --uninstall are two things to do; give one.")
    if not install:
        terminal.warn(f"Removed {launchd.uninstall()}.")
        return
    given = sys.argv[sys.argv.index(ctx.info_name or "serve") + 1 :]
    terminal.warn(f"Installed {launchd.install(given, api_key)}; --uninstall removes it.")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before the time is spent on loading."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, reuse_port=False)
    except OSError as error:
        reason = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)
        raise OptionError(
            f"{host} port {port} cannot be listened on ({reason}); choose others with --host and --port."
        ) from None
