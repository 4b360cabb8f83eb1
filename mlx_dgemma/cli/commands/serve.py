"""`mlx-dgemma serve`: an HTTP server that speaks as OpenAI's and Ollama's."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...distributed.watched import watched
from ...errors import DgemmaError, OptionError, count
from ...installation import add_extra
from ...server.settings import Settings, model_name
from ...serving.rendezvous import listening, locked, running, socket_path
from ..common import ModelChoice, adapter_option, model_options
from ..local import health_of
from ..terminal import Terminal

if TYPE_CHECKING:
    from ...server.replicas.spread import Replica
    from ...serving.scheduler import Scheduler

MAX_DEFAULT_CACHE = 4 * 2**30  # bytes
FOR_CHILDREN = (  # options that replicas on this machine share
    *("model", "dtype", "compute_dtype", "ignore_memory", "adapter"),
    *("rows", "waiting", "cache_size", "shutdown_seconds"),
)
STOP_SECONDS = 5.0  # that replicas get to end, beyond those of running answers
REFUSE_SECONDS = 1.0  # that a waiting command gets to send its request
LOG_BYTES, LOG_FILES = 5 * 2**20, 3  # of the log: where a new file is begun, and how many old ones are kept


class Duration(click.ParamType):
    """A time such as 90, 90s, 15m or 2h, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a time."""
        text = str(value).strip()
        units = {"s": 1, "m": 60, "h": 3600}
        number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
        try:
            seconds = float(number) * units[unit]
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            self.fail(f"{text!r} is no time; give one such as 90s, 15m or 2h.", param, ctx)
        return seconds


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
    "--idle-exit",
    type=Duration(),
    metavar="TIME",
    help="End after so long without a request, such as 90s, 15m or 2h.  [default: never]",
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that each hold the model and share the requests: one for each GPU of this machine.",
)
@click.option(
    "--replica", "servers", multiple=True, metavar="URL",
    help="Another machine's server of the same model that shares the requests, such as http://mac2.local:8080; it "
    "takes this one's API key. Repeatable.",
)  # fmt: skip
@click.option("--lifeline", is_flag=True, hidden=True)  # of a replica: it ends when its stdin does
@click.option("--socket-only", is_flag=True, help="Answer the commands of this machine alone: open no port.")
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the log there instead of stderr; a new file is begun at 5 MiB, and three old ones are kept.",
)
@click.option(
    "--install",
    is_flag=True,
    help="Start now and at every login with these options, as a launchd agent (macOS); with --idle-exit on demand.",
)
@click.option("--uninstall", is_flag=True, help="Stop and remove the launchd agent.")
@click.option("--status", is_flag=True, help="Tell which servers of this user run, and exit with 1 if none does.")
@click.option("--logs", is_flag=True, help="Print the end of the launchd agent's logs.")
@click.option("--agent", type=click.Choice(["login", "demand"]), hidden=True)  # launchd has started this process
@click.pass_context
def serve(ctx: click.Context, model: ModelChoice, **given: Any) -> None:
    """Serve the HTTP APIs of OpenAI, Anthropic and Ollama until Ctrl-C.

    By default, only this machine can reach the server. Any OpenAI client works with the base URL that is printed, any
    client of Ollama with the same URL without /v1. The commands generate, infill, edit and choose find the server by
    themselves, over a socket that only this user can open, and then load no model.
    The server logs one line per request to stderr, without prompts or answers.

    \b
    mlx-dgemma serve
    mlx-dgemma serve --model FOLDER --port 9000 --idle-exit 15m
    mlx-dgemma serve --host 0.0.0.0 --allowed-host mac.local --api-key "$(cat key.txt)"
    """
    terminal = Terminal()
    one_thing = [name for name in ("install", "uninstall", "status", "logs") if given[name]]
    if len(one_thing) > 1:
        raise click.UsageError(f"--{one_thing[0]} and --{one_thing[1]} are two things to do; give one.")
    if given["uninstall"] or given["logs"] or given["status"]:
        _tell_of_agent(one_thing[0], terminal)
        return
    _require_packages()
    if given["cache_dir"] is not None and given["cache_size"] == 0:
        raise click.UsageError("--cache-size is 0, so --cache-dir would hold nothing; leave one out.")
    settings = Settings(
        model_name(model.name),
        given["host"],
        given["api_key"],
        given["hosts"],
        given["origins"],
        shutdown_seconds=given["shutdown_seconds"],
        aliases=given["aliases"],
        desktop_apps=given["desktop_apps"],
        identity=model.identity,
    )
    if given["install"]:
        _install(ctx, settings, given, terminal)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once the server has stopped
    _check_replicas(given)
    with ExitStack() as stack:
        if given["lifeline"]:
            from ...server.replicas.processes import end_with_stdin

            end_with_stdin()
            nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            terminal = Terminal(nothing, nothing)  # what it would say, the first replica says
        sockets = _open_sockets(stack, settings, given, terminal)
        replicas = _replicas(stack, ctx, settings, given, terminal)
        _run(sockets, replicas, model, settings, given, terminal)


def _check_replicas(given: dict[str, Any]) -> None:
    """Refuse what does not go with several replicas."""
    if given["replicas"] == 1 and not given["servers"]:
        return
    if watched() is not None:
        raise click.UsageError(
            "--replicas starts its processes by itself, and --replica names servers that run; leave out mlx.launch."
        )
    if given["idle_exit"] is not None:
        raise click.UsageError("--idle-exit is for a server alone; leave it out, or --replicas and --replica.")
    for url in given["servers"]:
        if not re.fullmatch(r"https?://[^/\s]+(/v1)?/?", url):
            raise click.UsageError(f"--replica is {url!r}; it should be like http://mac2.local:8080.")


def _replicas(
    stack: ExitStack, ctx: click.Context, settings: Settings, given: dict[str, Any], terminal: Terminal
) -> list[Replica]:
    """The other replicas, which may still be loading the model."""
    if given["replicas"] == 1 and not given["servers"]:
        return []
    from ...server.replicas.processes import children, servers
    from ..launchd import arguments_of

    arguments, stop = arguments_of(ctx, FOR_CHILDREN), settings.shutdown_seconds + STOP_SECONDS
    started = children(given["replicas"] - 1, arguments, settings.identity, stop, terminal.warn)
    return [*stack.enter_context(started), *servers(given["servers"], settings.api_key)]


def _run(
    sockets: Sequence[socket.socket],
    replicas: Sequence[Replica],
    model: ModelChoice,
    settings: Settings,
    given: dict[str, Any],
    terminal: Terminal,
) -> None:
    """Load the model and serve until the end."""
    try:
        engine = model.load(terminal)
    except DgemmaError as error:
        refuse_waiting(sockets, f"The server could not load the model: {error}")
        raise
    from ...checkpoint.memory import free_bytes_beside
    from ...server.app import create_app
    from ...server.connections import Server
    from ...server.idle import Idle
    from ...server.local import collect_warnings
    from ...server.replicas.processes import check
    from ...server.replicas.spread import Spread
    from ...serving.process_memory import bound_memory
    from ...serving.scheduler import Scheduler

    rows, cache_size = given["rows"], given["cache_size"]
    default_bytes = min(free_bytes_beside(engine.checkpoint, rows, engine.model.kv_bits) // 4, MAX_DEFAULT_CACHE)
    cache_bytes = default_bytes if cache_size is None else round(cache_size * 2**30)
    keywords = {"rows": rows, "waiting": given["waiting"], "cache_bytes": cache_bytes, "cache_dir": given["cache_dir"]}
    if (rank := watched()) is None:
        scheduler = Scheduler(engine, **keywords)
    else:
        from ...ranks.leading import LeadingCache

        scheduler = Scheduler(engine, **keywords, make_cache=LeadingCache)
        rank.on_loss = lambda sentence: _refuse_all(scheduler, sentence)
    app = create_app(scheduler, settings, Spread(replicas, rows) if replicas else None)
    try:
        check(replicas, app.state.digest())
    except DgemmaError:
        scheduler.close()
        raise
    _start_log(given["log_file"], given["agent"] is not None)
    if given["lifeline"]:
        logging.getLogger("mlx_dgemma").setLevel(logging.WARNING)
    collect_warnings()
    bound_memory()
    server = Server(app, None if given["idle_exit"] is None else Idle(given["idle_exit"]))
    scheduler.on_death = lambda: setattr(server, "should_exit", True)
    with_adapter = f" with the adapter {engine.adapter}" if engine.adapter else ""
    over = f" over {count(1 + len(replicas), 'replica')}" if replicas else ""
    terminal.warn(f"Listening on {_address(sockets, settings.host)}{with_adapter}{over}; Ctrl-C stops it.")
    server.run(sockets=list(sockets))
    if scheduler.broken is not None:
        raise DgemmaError(str(scheduler.broken))


def _refuse_all(scheduler: Scheduler, sentence: str) -> None:
    """Tell all clients that a rank is lost, and give the server a moment to send it."""
    scheduler.give_up(sentence)
    time.sleep(REFUSE_SECONDS)


def refuse_waiting(sockets: Sequence[socket.socket], message: str) -> None:
    """Tell the commands that wait for the server why it does not start, so that none waits for ever."""
    body = json.dumps({"error": {"message": message, "code": "not_loaded"}}).encode()
    head = f"HTTP/1.0 503 Service Unavailable\r\nContent-Length: {len(body)}\r\n\r\n"
    for one in sockets:
        one.setblocking(False)
        with suppress(OSError):
            while True:
                client, _ = one.accept()
                with client, suppress(OSError):
                    client.settimeout(REFUSE_SECONDS)
                    client.recv(2**16)  # an answer to what was not read would be lost
                    client.sendall(head.encode() + body)


def _address(sockets: Sequence[socket.socket], host: str) -> str:
    """Where clients reach the server: the base URL, or the path of the socket where that is all."""
    for one in sockets:
        if one.family != socket.AF_UNIX:
            return f"http://{f'[{host}]' if ':' in host else host}:{one.getsockname()[1]}/v1"
    return str(sockets[0].getsockname())


def _start_log(path: Path | None, is_agent: bool) -> None:
    """Send the log to stderr or to a file, which then takes all that would go to stderr while the server runs."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if path is not None:
        handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
        logging.captureWarnings(True)
    if is_agent and os.fstat(2).st_size > LOG_BYTES:  # launchd's own log grows by a line with each start
        os.ftruncate(2, 0)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("mlx_dgemma").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else a line for whatever is no HTTP


def _open_sockets(
    stack: ExitStack, settings: Settings, given: dict[str, Any], terminal: Terminal
) -> list[socket.socket]:
    """The listening sockets, opened before the model is loaded, so that errors come early and commands wait."""
    if given["agent"] == "demand":
        from ..activation import activated

        stack.enter_context(locked(socket_path(settings.identity)))  # tells --status that the server runs
        return [stack.enter_context(one) for name in ("local", "http") for one in activated(name)]
    sockets = [] if given["socket_only"] else [stack.enter_context(_listen(settings.host, given["port"]))]
    try:
        sockets.append(stack.enter_context(listening(settings.identity)))
    except OptionError as error:
        if given["socket_only"]:
            raise
        terminal.warn(f"{error} This server answers over HTTP alone.")
    return sockets


def _require_packages() -> None:
    """Refuse to start without the packages of the extra."""
    try:
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DgemmaError(f"serve needs the package {error.name}; run `{add_extra('serve')}`.") from None


def _install(ctx: click.Context, settings: Settings, given: dict[str, Any], terminal: Terminal) -> None:
    """Install the launchd agent with the options of this command line."""
    from .. import launchd

    on_demand = given["idle_exit"] is not None
    address = None if given["socket_only"] else (settings.host, given["port"])
    agent = launchd.Agent(
        launchd.arguments_of(ctx),
        settings.api_key,
        settings.shutdown_seconds,
        socket_path(settings.identity) if on_demand else None,
        address if on_demand else None,
    )
    when = "it starts when it is asked" if on_demand else "it starts at every login"
    terminal.warn(f"Installed {launchd.install(agent)}; {when}, --uninstall removes it.")


def _tell_of_agent(what: str, terminal: Terminal) -> None:
    """Remove the launchd agent, print its logs, or tell what runs."""
    from .. import launchd

    if what == "uninstall":
        terminal.warn(f"Removed {launchd.uninstall()}.")
        return
    if what == "logs":
        terminal.say(launchd.logs())
        return
    lines = [launchd.status()] if sys.platform == "darwin" else []
    servers = running()
    for path in servers:
        try:
            health = health_of(path)
            told = f"{health['model']}, {health['running']} running, {health['waiting']} waiting"
        except (DgemmaError, OSError):
            told = "starting or stopping"
        lines.append(f"server: {told}, at {path}")
    terminal.say("".join(f"{line}\n" for line in lines))
    if not servers:
        raise DgemmaError("No server of this user runs; `mlx-dgemma serve` starts one.")


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
