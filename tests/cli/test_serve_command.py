"""`mlx-dgemma serve`: what it refuses before it loads a model, and a server from start to stop."""

import re
import signal
import socket
import subprocess
import sys
from importlib import import_module

import openai
import pytest
from click.testing import CliRunner
from listeners import LIMIT

from mlx_dgemma import engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import main, serve


def run(*arguments, **options):
    return CliRunner().invoke(main.main, ["serve", *map(str, arguments)], prog_name="mlx-dgemma", **options)


@pytest.fixture
def never_loaded(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_API_KEY", raising=False)
    monkeypatch.setattr(engine, "load", None)  # calling it would fail


def test_the_command_refuses_before_it_loads(never_loaded, monkeypatch):
    done = run("--host", "0.0.0.0")
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: The host is 0.0.0.0, which other machines can reach: give an API key (--api-key or "
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
        'Error: serve needs the package uvicorn: pip install "mlx-dgemma[serve]".\n',
    )


def test_the_command_serves_until_it_is_stopped():
    """It has no time limit to exceed: nothing runs and no connection is open when it is stopped.

    A shell starts background jobs with SIGINT ignored, which would pass to the command if these tests run in one.
    """
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"import signal, sys; {listen}; from mlx_dgemma.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, "serve", "--model", str(DEMO), "--port", "0", "--api-key", "k"]
    command += ["--shutdown-seconds", str(LIMIT)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("Listening"))
            url = re.fullmatch(r"Listening on (http://127\.0\.0\.1:\d+/v1); Ctrl-C stops it\.\n", line)[1]
            with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
                completions = client.chat.completions  # imported before the first request, not while it is kept alive
                (model,) = client.models.list().data
                assert model.id == DEMO.name
                answer = completions.create(
                    model=model.id, messages=[{"role": "user", "content": "Spell the word cat."}], seed=0
                )
                assert answer.choices[0].message.content == "c a t"
            process.send_signal(signal.SIGINT)
            log = process.stderr.read().splitlines()
            assert process.wait(LIMIT) == 130
        finally:
            process.kill()
    assert [" ".join(line.split()[2:6]) for line in log] == [
        "127.0.0.1 GET /v1/models 200",
        "127.0.0.1 POST /v1/chat/completions 200",
    ]


def test_warnings_that_quote_answers_are_not_logged():
    for module, quoting in (
        ("mlx_dgemma.prompt.answer", True),
        ("mlx_dgemma.serving.prefix_cache", False),
        ("mlx_dgemma.serving.scheduler", False),
    ):
        import_module(module)  # it has this name
        assert bool(re.match(serve.QUOTING_MODULES, module)) == quoting
