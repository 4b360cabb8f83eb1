"""`mlx-dgemma serve`: what it refuses before it loads a model, and a server from start to stop."""

import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module

import httpx
import openai
import pytest
from click.testing import CliRunner
from listeners import LIMIT, until
from support import refusal

from mlx_dgemma import engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import main
from mlx_dgemma.cli.commands import serve
from mlx_dgemma.cli.terminal import Terminal
from mlx_dgemma.errors import OptionError
from mlx_dgemma.installation import add_extra
from mlx_dgemma.server import local
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.rendezvous import identity, socket_path


def run(*arguments, **options):
    return CliRunner().invoke(main.main, ["serve", *map(str, arguments)], prog_name="mlx-dgemma", **options)


@pytest.fixture
def never_loaded(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_API_KEY", raising=False)
    monkeypatch.setattr(engine, "load", None)  # calling it would fail


def test_what_does_not_go_with_replicas_is_refused(never_loaded, monkeypatch):
    def error(*arguments):
        done = run(*arguments)
        assert done.exit_code == 2
        return done.stderr.partition("Error: ")[2]

    assert error("--replicas", 2, "--idle-exit", "1h") == (
        "--idle-exit is for a server alone; leave it out, or --replicas and --replica.\n"
    )
    assert error("--replica", "mac2.local") == (
        "--replica is 'mac2.local'; it should be like http://mac2.local:8080.\n"
    )
    monkeypatch.setattr(serve, "watched", lambda: "a rank")
    assert error("--replicas", 2) == (
        "--replicas starts its processes by itself, and --replica names servers that run; leave out mlx.launch.\n"
    )


def test_the_command_refuses_before_it_loads(never_loaded, monkeypatch):
    done = run("--host", "0.0.0.0")
    assert (done.exit_code, done.stderr.partition("\n\n")[2]) == (
        2,
        "Error: --host is 0.0.0.0, which other machines can reach: give an API key (--api-key or "
        "$MLX_DGEMMA_API_KEY), or leave the host out.\n",
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--port", port)
        assert (done.exit_code, done.stderr) == (
            1,
            f"Error: 127.0.0.1 port {port} cannot be listened on (Address already in use); choose others with --host "
            "and --port.\n",
        )
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run()
    assert (done.exit_code, done.stderr) == (
        1,
        f"Error: serve needs the package uvicorn; run `{add_extra('serve')}`.\n",
    )


@contextmanager
def served(*options):
    """(process, base URL) of the command with the demo.

    A shell starts background jobs with SIGINT ignored, which would pass to the command if these tests run in one.
    """
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"import signal, sys; {listen}; from mlx_dgemma.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "serve", "--model", str(DEMO), "--port", "0", "--api-key", "k", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("Listening"))
            yield process, re.fullmatch(r"Listening on (http://127\.0\.0\.1:\d+/v1); Ctrl-C stops it\.\n", line)[1]
        finally:
            process.kill()


def requests_of(log):
    return [" ".join(line.split()[2:6]) for line in log]


def test_the_command_serves_until_it_is_stopped(tmp_path):
    """It has no time limit to exceed: nothing runs and no connection is open when it is stopped."""
    path = tmp_path / "serve.log"
    with served("--shutdown-seconds", str(LIMIT), "--log-file", str(path)) as (process, url):
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
            completions = client.chat.completions  # imported before the first request, not while it is kept alive
            (model,) = client.models.list().data
            assert model.id == DEMO.name
            answer = completions.create(
                model=model.id, messages=[{"role": "user", "content": "Spell the word cat."}], seed=0
            )
            assert answer.choices[0].message.content == "c a t"
        at = socket_path(identity(str(DEMO), None, None, None))
        assert run("--status").stdout.splitlines()[-1] == f"server: {DEMO.name}, 0 running, 0 waiting, at {at}"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait(LIMIT) == 130
    asked = ["127.0.0.1 GET /v1/models 200", "127.0.0.1 POST /v1/chat/completions 200", "- GET /health 200"]
    assert requests_of(path.read_text().splitlines()) == asked
    done = run("--status")
    assert (done.exit_code, done.stderr) == (1, "Error: No server of this user runs; `mlx-dgemma serve` starts one.\n")


def test_which_sockets_are_opened(capsys):
    settings, given = Settings(identity="a"), {"agent": None, "port": 0}

    def opened(stack, socket_only):
        found = serve._open_sockets(stack, settings, {**given, "socket_only": socket_only}, Terminal())
        return [one.family for one in found]

    with ExitStack() as stack:
        assert opened(stack, socket_only=False) == [socket.AF_INET, socket.AF_UNIX]
        assert opened(stack, socket_only=False) == [socket.AF_INET]  # a second server with the same model
        said = f"Another server with this model answers the commands of this machine, at {socket_path('a')}."
        assert capsys.readouterr().err == f"{said} This server answers over HTTP alone.\n"
        assert refusal(OptionError, opened, stack, socket_only=True) == said
    with ExitStack() as stack:
        assert opened(stack, socket_only=True) == [socket.AF_UNIX]
    assert run("--idle-exit", "15x").stderr.endswith("'15x' is no time; give one such as 90s, 15m or 2h.\n")


def test_where_it_must_end_every_client_is_told():
    """A stream that runs and a request that waits, neither of which can be whole in time."""
    slow = {"entropy_bound": 1e-9, "confidence_threshold": 0, "certainty_threshold": 0, "patience": 0}
    body = {"messages": [{"role": "user", "content": "Count from 1 to 30."}], "max_tokens": 3000, **slow}
    asked = {"headers": {"Authorization": "Bearer k"}, "timeout": LIMIT}
    options = ("--rows", "1", "--shutdown-seconds", "0.1", "--cache-size", "0")
    with served(*options) as (process, url), ThreadPoolExecutor() as pool:
        path = f"{url}/chat/completions"
        with httpx.stream("POST", path, json={**body, "stream": True}, **asked) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines)[6:])["choices"][0]["delta"]["role"] == "assistant"
            waits = pool.submit(httpx.post, path, json=body, **asked)
            until(lambda: httpx.get(f"{url.removesuffix('/v1')}/health").json()["waiting"] == 1)
            process.send_signal(signal.SIGTERM)
            *_, last = filter(None, lines)
        told = [json.loads(last[6:])["error"], waits.result().json()["error"]]
        assert [one["code"] for one in told] == ["stopping", "stopping"]
        assert waits.result().status_code == 503
        log = process.stderr.read().splitlines()
        assert process.wait(LIMIT) == 0
    assert {one for one in requests_of(log) if "health" not in one} == {
        "127.0.0.1 POST /v1/chat/completions 200", "127.0.0.1 POST /v1/chat/completions 503"
    }  # fmt: skip


def test_warnings_that_quote_answers_are_not_logged():
    for module, quoting in (
        ("mlx_dgemma.prompt.answer", True),
        ("mlx_dgemma.serving.prefix_cache", False),
        ("mlx_dgemma.serving.scheduler", False),
    ):
        import_module(module)  # it has this name
        assert bool(re.match(local.QUOTING_MODULES, module)) == quoting
