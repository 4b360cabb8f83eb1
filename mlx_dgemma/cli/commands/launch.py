"""`mlx-dgemma launch`: a coding agent that asks this machine's server, which is started where there is none."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import click

from ...errors import DgemmaError
from ...server.settings import model_name
from ..common import model_option
from ..terminal import Terminal

HOST = "127.0.0.1"
KEY = "MLX_DGEMMA_API_KEY"
NO_KEY = "none"  # clients want one, even where the server does not
POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0
STOP_SECONDS = 15.0  # for a server that was started here, its answers' time included
LOCALLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine
Variables = dict[str, str | None]  # None: the variable is removed


@dataclass(frozen=True)
class Served:
    """What an agent is to use.

    Attributes:
        url: the server's address, without /v1.
        model: the name of its model.
        key: its API key, if it has one.
        context: the most tokens of prompt and answer, if the server tells them.
    """

    url: str
    model: str
    key: str | None = None
    context: int | None = None


@dataclass(frozen=True)
class Client:
    """A program that can be launched.

    Attributes:
        install: the command that installs it.
        settings: (variables, arguments) for what is served.
    """

    install: str
    settings: Callable[[Served], tuple[Variables, list[str]]]


def _claude(served: Served) -> tuple[Variables, list[str]]:
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    sizes = [f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")]
    variables: Variables = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key or NO_KEY,
        "ANTHROPIC_API_KEY": None,  # it would be sent in place of the token
        **dict.fromkeys((*names, *sizes), served.model),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # it changes the prompt's beginning, which could then not be reused
        "API_TIMEOUT_MS": "3600000",  # a long prompt takes a local model minutes
        **({"CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(served.context)} if served.context else {}),
    }
    return variables, []


def _codex(served: Served) -> tuple[Variables, list[str]]:
    provider = {"name": "mlx-dgemma", "base_url": f"{served.url}/v1", "wire_api": "responses"}
    provider |= {"env_key": KEY} if served.key else {}
    given = {
        "model": json.dumps(served.model),
        **({"model_context_window": str(served.context)} if served.context else {}),
        "model_provider": '"mlx-dgemma"',
        **{f"model_providers.mlx-dgemma.{name}": json.dumps(value) for name, value in provider.items()},
        "model_reasoning_summary": '"none"',
        "web_search": '"disabled"',
    }
    return _with_key(served), [one for pair in given.items() for one in ("-c", "=".join(pair))]


def _opencode(served: Served) -> tuple[Variables, list[str]]:
    options = {"baseURL": f"{served.url}/v1", "apiKey": f"{{env:{KEY}}}" if served.key else NO_KEY}
    sizes = served.context and {"context": served.context, "output": min(served.context // 4, 32_000)}
    models = {served.model: {"limit": sizes} if sizes else {}}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "mlx-dgemma", "options": options, "models": models}
    name = f"mlx-dgemma/{served.model}"
    config = {"provider": {"mlx-dgemma": provider}, "model": name, "small_model": name, "share": "disabled"}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(config), **_with_key(served)}, []


def _aider(served: Served) -> tuple[Variables, list[str]]:
    variables: Variables = {"OPENAI_API_BASE": f"{served.url}/v1", "OPENAI_API_KEY": served.key or NO_KEY}
    return variables, ["--model", f"openai/{served.model}", "--no-show-model-warnings"]


def _with_key(served: Served) -> Variables:
    """The variable of the key, for clients whose settings name one."""
    return {KEY: served.key} if served.key else {}


CLIENTS = {
    "claude": Client("npm install -g @anthropic-ai/claude-code", _claude),
    "codex": Client("npm install -g @openai/codex", _codex),
    "opencode": Client("npm install -g opencode-ai", _opencode),
    "aider": Client("python -m pip install aider-install && aider-install", _aider),
}


@click.command()
@click.argument("client", type=click.Choice([*CLIENTS]))
@click.argument("arguments", nargs=-1)
@model_option
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Port of the server.")
@click.option(
    "--api-key", envvar=KEY, show_envvar=True, metavar="KEY", help="The server's key, if it has or should have one."
)
@click.option("--dry-run", is_flag=True, help="Print what would be set and started, and do nothing.")
@click.pass_context
def launch(
    ctx: click.Context,
    client: str,
    arguments: tuple[str, ...],
    model: str | None,
    port: int,
    api_key: str | None,
    dry_run: bool,
) -> None:
    """Start a coding agent with the model of this machine's server.

    The server at --port is used if one runs. Otherwise `mlx-dgemma serve` is started and stopped again at the end.
    The agent gets its settings by environment variables and arguments, which are told on stderr: no file of its own
    is written. ARGUMENTS are passed to it; put -- before them if they have options. The exit status is the agent's.

    \b
    mlx-dgemma launch claude --model FOLDER
    mlx-dgemma launch codex -- exec "Add a test."
    mlx-dgemma launch aider --dry-run
    """
    terminal, url = Terminal(), f"http://{HOST}:{port}"
    running = _served_model(url)
    if running is not None and model is not None and model_name(model) != running:
        raise DgemmaError(
            f"The server at port {port} has the model {running!r}, not {model_name(model)!r}; stop it, or give another "
            "--port."
        )
    serve = ["--port", str(port), *(["--model", model] if model else [])]
    served = Served(url, running or model_name(model), api_key)
    if running is not None:
        served = replace(served, context=_context(served))
    if dry_run:
        starts = [shlex.join(["mlx-dgemma", "serve", *serve]) + " &"] if running is None else []
        variables, given = CLIENTS[client].settings(served)
        terminal.say("\n".join([*starts, *_script(variables, [client, *given, *arguments], api_key)]) + "\n")
        return
    program = shutil.which(client)
    if program is None:
        raise DgemmaError(f"There is no program {client} here; install it first: {CLIENTS[client].install}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _server(serve, url, api_key, terminal) if running is None else nullcontext():
        if running is None:
            served = replace(served, context=_context(served))
        variables, given = CLIENTS[client].settings(served)
        for line in _script(variables, [client, *given, *arguments], api_key):
            terminal.warn(line)
        environment = {name: value for name, value in os.environ.items() if name not in variables}
        environment |= {name: value for name, value in variables.items() if value is not None}
        ctx.exit(_run([program, *given, *arguments], environment))


def _script(variables: Variables, command: Sequence[str], key: str | None) -> list[str]:
    """The settings and the command as lines for a shell, the key by its variable's name."""
    lines = []
    for name, value in variables.items():
        if value is None:
            lines.append(f"unset {name}")
        elif key is not None and value == key:
            lines += [f'export {name}="${KEY}"'] if name != KEY else []
        else:
            lines.append(f"export {name}={shlex.quote(value)}")
    return [*lines, shlex.join(command)]


def _served_model(url: str) -> str | None:
    """The name of the model of the server there; None: nothing listens.

    Raises:
        DgemmaError: something else answers, or the server is not in order.
    """
    why = "is no server of mlx-dgemma; give another --port."
    try:
        with LOCALLY.open(f"{url}/health", timeout=ANSWER_SECONDS) as answer:
            health = json.load(answer)
        if isinstance(health, dict) and isinstance(health.get("model"), str):
            return str(health["model"])
    except urllib.error.HTTPError as error:
        if error.code == 503:
            why = "is a server that stops or has failed; start it again."
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError):
            return None
        if isinstance(reason, TimeoutError):
            why = (
                f"says nothing for {ANSWER_SECONDS:g} seconds; wait for its model to be loaded, or give another --port."
            )
    raise DgemmaError(f"What listens at {url} {why}")


def _context(served: Served) -> int | None:
    """The most tokens of prompt and answer, as the server tells them.

    Raises:
        DgemmaError: the server wants another key.
    """
    headers = {"Authorization": f"Bearer {served.key}"} if served.key else {}
    try:
        request = urllib.request.Request(f"{served.url}/v1/models", headers=headers)
        with LOCALLY.open(request, timeout=ANSWER_SECONDS) as answer:
            told = json.load(answer)["data"][0].get("max_model_len")
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise DgemmaError(
                f"The server at {served.url} wants its API key; give it as --api-key or ${KEY}."
            ) from None
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return told if isinstance(told, int) else None


@contextmanager
def _server(options: list[str], url: str, key: str | None, terminal: Terminal) -> Iterator[None]:
    """A server with these options, which ends with the block. Its log is a file, since the screen is the client's.

    Raises:
        DgemmaError: it did not start.
    """
    environment = {**os.environ, **({KEY: key} if key else {})}
    with tempfile.TemporaryDirectory(prefix="mlx-dgemma-") as folder:
        log = Path(folder, "serve.log")
        terminal.warn(f"Starting mlx-dgemma {shlex.join(['serve', *options])}; its log is {log}.")
        with log.open("wb") as file:
            command = [sys.executable, "-m", "mlx_dgemma", "serve", *options]
            # A session of its own: Ctrl-C is the client's.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        try:
            while not _listens(url):
                if process.poll() is not None:
                    *_, last = ["it says nothing", *log.read_text("utf-8", "replace").split("\n")[:-1]]
                    raise DgemmaError(f"The server did not start: {last.removeprefix('Error: ')}")
                time.sleep(POLL_SECONDS)
            yield
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(url: str) -> bool:
    """Whether a server that is being started answers. It listens before it has loaded its model."""
    try:
        with LOCALLY.open(f"{url}/health", timeout=1):
            return True
    except OSError:
        return False


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit status of a program that has the terminal, Ctrl-C included."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the program would inherit
    try:
        process = subprocess.Popen(command, env=environment)
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status
