"""`mlx-dgemma launch`: what it sets for each client, whom it asks, and what it starts and ends."""

import json
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner

from mlx_dgemma.cli import main
from mlx_dgemma.cli.commands import launch
from mlx_dgemma.cli.commands.launch import Served

URL = "http://127.0.0.1:1"


def run(*arguments):
    return CliRunner().invoke(main.main, ["launch", *map(str, arguments)], prog_name="mlx-dgemma")


@contextmanager
def answering(status, body):
    """The port of a server that says this to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


@pytest.fixture
def running():
    with answering(200, b'{"status": "ok", "model": "a/b"}') as port:
        yield port


@pytest.fixture(autouse=True)
def own_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A client of the name `claude` that tells its arguments and some variables, and ends with 7."""
    script = tmp_path / "claude"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "names = 'ANTHROPIC_BASE_URL', 'ANTHROPIC_MODEL', 'ANTHROPIC_AUTH_TOKEN', 'ANTHROPIC_API_KEY'\n"
        f"with open({str(tmp_path / 'told')!r}, 'w') as file:\n"
        "    json.dump([sys.argv[1:], *map(os.environ.get, names)], file)\n"
        "sys.exit(7)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-own")
    monkeypatch.delenv(launch.KEY, raising=False)
    return tmp_path / "told"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_what_each_client_is_told():
    variables, given = launch.CLIENTS["claude"].settings(Served(URL, "a/b", "k", 4096))
    assert given == []
    assert {variables[name] for name in variables if "MODEL" in name} == {"a/b"}
    assert (variables["ANTHROPIC_BASE_URL"], variables["ANTHROPIC_AUTH_TOKEN"]) == (URL, "k")
    assert (variables["ANTHROPIC_API_KEY"], variables["CLAUDE_CODE_AUTO_COMPACT_WINDOW"]) == (None, "4096")
    variables, given = launch.CLIENTS["codex"].settings(Served(URL, "a/b", "k", 4096))
    assert variables == {launch.KEY: "k"}
    assert given[::2] == ["-c"] * (len(given) // 2)
    told = dict(one.split("=", 1) for one in given[1::2])
    assert (told["model"], told["model_context_window"]) == ('"a/b"', "4096")
    provider = told["model_provider"].strip('"')
    assert told[f"model_providers.{provider}.base_url"] == f'"{URL}/v1"'
    assert told[f"model_providers.{provider}.wire_api"] == '"responses"'
    assert told[f"model_providers.{provider}.env_key"] == f'"{launch.KEY}"'
    variables, given = launch.CLIENTS["opencode"].settings(Served(URL, "a/b"))
    config = json.loads(variables["OPENCODE_CONFIG_CONTENT"])
    provider, _, name = config["model"].partition("/")
    assert (name, [*config["provider"][provider]["models"]], given) == ("a/b", ["a/b"], [])
    assert config["provider"][provider]["options"] == {"baseURL": f"{URL}/v1", "apiKey": "none"}
    variables, given = launch.CLIENTS["aider"].settings(Served(URL, "a/b"))
    assert variables == {"OPENAI_API_BASE": f"{URL}/v1", "OPENAI_API_KEY": "none"}
    assert given[:2] == ["--model", "openai/a/b"]


def test_a_dry_run_is_a_script_without_the_key(running):
    done = run("codex", "--port", running, "--api-key", "secret", "--dry-run", "--", "exec", "two words")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "secret" not in done.stdout
    assert done.stdout.startswith("codex -c 'model=\"a/b\"' ")
    assert done.stdout.endswith(" exec 'two words'\n")
    port = free_port()
    done = run("claude", "--port", port, "--model", "x/y", "--api-key", "secret", "--dry-run")
    first, *rest = done.stdout.splitlines()
    assert first == f"mlx-dgemma serve --port {port} --model x/y &"
    assert f"export ANTHROPIC_BASE_URL=http://127.0.0.1:{port}" in rest
    assert 'export ANTHROPIC_AUTH_TOKEN="$MLX_DGEMMA_API_KEY"' in rest
    assert rest[-1] == "claude"


def test_a_running_server_is_used_and_the_clients_status_is_told(running, program):
    done = run("claude", "--port", running, "--model", "a/b", "--", "-p", "Hi")
    assert done.exit_code == 7
    url = f"http://127.0.0.1:{running}"
    assert json.loads(program.read_text()) == [["-p", "Hi"], url, "a/b", "none", None]
    assert "Starting" not in done.stderr
    assert f"export ANTHROPIC_BASE_URL={url}\n" in done.stderr
    assert done.stderr.endswith("claude -p Hi\n")


def test_what_is_no_server_of_ours_is_not_used(program, monkeypatch):
    for status, body, why in (
        (200, b"[]", "is no server of mlx-dgemma; give another --port."),
        (404, b"", "is no server of mlx-dgemma; give another --port."),
        (503, b"", "is a server that stops or has failed; start it again."),
    ):
        with answering(status, body) as port:
            done = run("claude", "--port", port)
            told = f"Error: What listens at http://127.0.0.1:{port} {why}\n"
            assert (done.exit_code, done.stderr) == (1, told)
    with answering(200, b'{"model": "c"}') as port:
        done = run("claude", "--port", port, "--model", "d")
        message = f"The server at port {port} has the model 'c', not 'd'; stop it, or give another --port."
        assert (done.exit_code, done.stderr) == (1, f"Error: {message}\n")
        monkeypatch.setenv("PATH", "")
        done = run("claude", "--port", port)
        message = "There is no program claude here; install it first: npm install -g @anthropic-ai/claude-code"
        assert (done.exit_code, done.stderr) == (1, f"Error: {message}\n")


SERVER = """\
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"model": "diffusiongemma-demo"}')
print("started", sys.argv[1:], file=sys.stderr)
if "bad" in sys.argv:
    sys.exit("Error: There is no such model.")
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    """An interpreter that does not load the package, but serves /health at the port that it is told."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{SERVER}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_server_is_started_and_ends_with_the_client(program, python):
    port = free_port()
    done = run("claude", "--port", port)
    assert done.exit_code == 7
    first, *_ = done.stderr.splitlines()
    assert first.startswith(f"Starting mlx-dgemma serve --port {port}; its log is ")
    assert json.loads(program.read_text())[2] == "diffusiongemma-demo"
    assert not os.path.exists(first.rpartition(" its log is ")[2].removesuffix("."))
    socket.create_server(("127.0.0.1", port)).close()  # nobody listens there any more


def test_a_server_that_does_not_start_tells_why(program, python):
    done = run("claude", "--port", free_port(), "--model", "bad")
    assert done.exit_code == 1
    assert done.stderr.endswith("\nError: The server did not start: There is no such model.\n")
    assert not program.exists()


def test_what_the_server_tells_of_itself_is_passed_on(monkeypatch):
    with answering(200, b'{"model": "a/b", "data": [{"max_model_len": 4096}]}') as port:
        assert "-c model_context_window=4096" in run("codex", "--port", port, "--dry-run").stdout
    monkeypatch.setattr(launch, "_served_model", lambda url: "a/b")
    with answering(401, b"") as port:
        done = run("codex", "--port", port, "--dry-run")
        message = (
            f"The server at http://127.0.0.1:{port} wants its API key; give it as --api-key or $MLX_DGEMMA_API_KEY."
        )
        assert (done.exit_code, done.stderr) == (1, f"Error: {message}\n")
