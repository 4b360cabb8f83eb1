"""Commands that let a running server do the work print what they print without one."""

import json
import os
import re
import select
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from io import StringIO

import pytest
from commands import python, run
from hearing import tone
from listeners import until
from serving import ask
from support import engine_of, refusal

import mlx_dgemma
from mlx_dgemma import __version__, engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import local
from mlx_dgemma.cli.calls import answers
from mlx_dgemma.cli.commands import serve
from mlx_dgemma.cli.terminal import Terminal
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.prompt.messages import messages_of
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.connections import Server
from mlx_dgemma.server.idle import Idle
from mlx_dgemma.server.local import collect_warnings
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving import rendezvous
from mlx_dgemma.serving.rendezvous import identity, listening, socket_path
from mlx_dgemma.serving.scheduler import Scheduler
from mlx_dgemma.serving.tickets import Load

COUNT = "Count from 1 to 60."
WHAT = identity(None, None, None, None)
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def app():
    scheduler = Scheduler(mlx_dgemma.load(DEMO, dtype="float32"), rows=2, waiting=2)
    yield create_app(scheduler, Settings("demo", api_key="secret", identity=WHAT))
    scheduler.close()


@pytest.fixture
def server(app, monkeypatch):
    """A server of the demo on its socket; without it a command would fail, since it cannot load."""
    collect_warnings()
    monkeypatch.setattr(app.state.scheduler, "close", lambda seconds: None)  # the next test uses it, too
    with listening(WHAT) as sock, in_thread(Server(app), sock):
        yield app.state.scheduler


@contextmanager
def in_thread(server, sock):
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


COSTS = ("seconds", "peak_memory_bytes", "tokens_per_second", "time_to_first_block", "reused_tokens", "images_encoded")


def without_costs(value):
    """Statistics that do not depend on times and on what is known of a prefix."""
    return {name: one for name, one in value.items() if name not in COSTS}


def told(done):
    """What a command printed, without times and other costs."""
    lines = done.stdout.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if '"stats"' in line:
            lines[i] = json.loads(line, object_hook=without_costs)
    costs = re.compile(r"tok/s| reused|prompt tokens?, [0-9.]+ s")
    return done.exit_code, lines, sorted(line for line in done.stderr.splitlines() if not costs.search(line))


def commands_of(folder, red):
    """Commands with a picture, tools, a schema, a pattern, all tasks, warnings, and mistakes."""
    (folder / "tools.json").write_text(json.dumps([WEATHER]))
    (folder / "hole.txt").write_text("The capital of France is <HOLE>.")
    (folder / "cat.txt").write_text("The cat sat on the mat.\n")
    (folder / "broken.png").write_bytes(red.read_bytes()[:300])
    nested = '{"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}}}'
    few, hole = ("--max-denoising-steps", 1, "--max-tokens", 20, "--seed", 3), ("infill", folder / "hole.txt")
    return [
        ("generate", "Spell the word cat.", "--seed", 0, "-v", "--system", "Be brief.", "--stop", "t", *few),
        ("generate", "--image", red, "What color is the shape?", "--json", *few),
        ("generate", "--tools", folder / "tools.json", "What is the weather in Oslo?", *few),
        ("generate", "--schema", nested, "Who is it?", *few),
        ("generate", "--regex", "[ab]{3}", "Say it.", "--mode", "causal", "--seed", 1),
        (*hole, "--json", *few),
        (*hole, "--length", 260, "--max-denoising-steps", 1, "--seed", 3),
        ("edit", "Replace cat with dog", folder / "cat.txt", "--diff", *few),
        ("choose", "Which is larger, 51 or 23?", 51, 23, "--json", "--calibrate"),
        ("choose", "What is 2 + 3?", "--range", 4, 6),
        ("choose", "Is it?", "--bool", "--image", red, "--image-tokens", 70),
        ("choose", "What is it?", "--answer", "{a} {b}", "--ask", "a=A,The", "--ask", "b=red,no"),
        ("generate", "Hi", "--exact", "--fast"),
        ("generate", "Hi", "--regex", "("),
        ("generate", "--image", folder / "broken.png", "What is it?"),
        ("choose", "Hi", "a", "a"),
    ]


def test_every_command_prints_the_same_either_way(server, monkeypatch, tmp_path, red):
    given, here = commands_of(tmp_path, red), engine_of(DEMO)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "load", None)  # calling it would fail
        there = [told(run(*one)) for one in given]
    asked = server.load().counters["requests"]
    monkeypatch.setattr(engine, "load", lambda *_, **__: here)
    for arguments, found in zip(given, there):
        assert found == told(run(*arguments, "--no-server")), arguments
    for i, said in ((3, "The schema refers"), (6, "The hole of 260 tokens")):  # on two kinds of threads
        assert any(line.startswith(f"Warning: {said}") for line in there[i][2])
    assert [code for code, _, _ in there[-4:]] == [2, 2, 1, 2]
    assert server.load().counters["requests"] == asked


def test_what_was_heard_is_told_over_the_socket(server, whisper, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "load", None)
    asked = ("--audio", tone(tmp_path / "a.wav"), "--audio-model", "tiny", "Sum it up.", "--seed", 0)
    done = run("generate", *asked, "--max-denoising-steps", 1, "--json")
    assert json.loads(done.stdout)["stats"]["transcripts"] == ["440 hertz, 1.00 seconds, peak 0.50, by tiny"]


# What a call may import besides this package's own modules. Names with an underscore are CPython's own parts.
LIGHT = set(
    "array collections contextlib copyreg enum errno functools itertools json keyword math operator re reprlib select "
    "selectors socket types unicodedata warnings zlib sre_compile sre_constants sre_parse fcntl struct termios stat "
    "base64 binascii".split()
)
OURS = set(
    "cli cli.calls cli.calls.answers cli.calls.start cli.calls.texts cli.calls.words cli.local cli.stdin cli.terminal "
    "desktop desktop.user_config distributed errors prompt prompt.messages serving serving.rendezvous".split()
)
CALL = """
import sys
before = set(sys.modules)
from mlx_dgemma.cli.calls.start import main
try:
    main()
finally:
    print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""


@pytest.mark.parametrize(("given", "data"), [(["Spell the word cat.", "--seed=0"], None), (["-", "--seed=0"], b"Hi.")])
def test_a_call_imports_the_least(server, tmp_path, given, data):
    """A whole process, whose model is named by config.toml; what it has imported."""
    (tmp_path / "mlx-dgemma").mkdir()
    (tmp_path / "mlx-dgemma" / "config.toml").write_text(f'model = "{DEMO}"\n')
    stdin = {"input": data} if data else {"stdin": subprocess.DEVNULL}
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CALL, "generate", *given], capture_output=True, env=environment, check=False, **stdin
    )
    assert done.returncode == 0 and done.stdout.strip()
    *said, loaded = done.stderr.decode().splitlines()
    assert said == []
    others = {name for name in loaded.split() if not name.startswith(("_", "mlx_dgemma"))}
    assert {name.split(".")[0] for name in others} <= LIGHT
    assert {name[len("mlx_dgemma.") :] for name in loaded.split() if name.startswith("mlx_dgemma.")} <= OURS


def test_a_call_that_click_reads_imports_nothing_heavy(server):
    program = CALL.replace("set(sys.modules) - before", "set(sys.modules) & HEAVY").replace(
        "import sys", "import sys\nHEAVY = set('mlx numpy PIL transformers http email ssl asyncio ctypes'.split())"
    )
    done = python("-c", program, "generate", "Spell the word cat.", "--canvas=auto", "--seed=0", "--model", str(DEMO))
    assert (done.returncode, done.stdout, done.stderr) == (0, "c a t\n", "\n")


def test_ctrl_c_cancels_at_the_server_and_keeps_what_is_finished(server, monkeypatch):
    whole = engine_of(DEMO).generate(COUNT, seed=0, max_tokens=100).text
    real = local.Remote.task

    def task(self, *arguments, **options):
        for event in real(self, *arguments, **options):
            yield event
            if isinstance(event, local.SeenBlock):
                raise KeyboardInterrupt

    monkeypatch.setattr(local.Remote, "task", task)
    slow = ("--max-tokens", 3000, "--seed", 0)
    before = server.load().counters["cancelled"]
    done = run("generate", COUNT, *slow, "--json")
    assert done.exit_code == 130
    held = json.loads(done.stdout)
    assert held["finish_reason"] == "interrupted" and held["text"] and whole.startswith(held["text"])
    until(lambda: server.load().counters["cancelled"] == before + 1)


def test_drafts_are_drawn_as_without_a_server(server, monkeypatch):
    drawn = []
    monkeypatch.setattr(Terminal, "draw", lambda self, canvas, footer: drawn.append((list(canvas), footer)))
    found = []
    for source in (local.find_server(WHAT, Terminal()), engine_of(DEMO)):
        drawn.clear()
        view = Terminal()
        view.live = True
        keywords = {"seed": 0, "max_denoising_steps": 3, "max_tokens": 40}
        answers.stream_answer(source, partial(source.stream, messages_of(COUNT), **keywords), view, silent=True)
        found.append(drawn.copy())
    there, here = found
    assert here[-1] in there and set(map(str, there)) <= set(map(str, here))  # of drafts that wait the newest is sent


def refused(said):
    return f"The server of this machine is not used: {said} The model is loaded here instead."


def test_what_must_not_be_used_is_told_and_the_model_is_loaded_here(server, monkeypatch, app):
    def load(*_, **__):
        raise CheckpointError("It is loaded here.")

    monkeypatch.setattr(engine, "load", load)
    before = server.load().counters["requests"]

    def told_first():
        *said, last = run("generate", "Say it.").stderr.splitlines()
        assert last == "Error: It is loaded here." and server.load().counters["requests"] == before
        return said

    with monkeypatch.context() as patched:
        patched.setattr(local, "__version__", "0.0.1")
        said = f"The server is mlx-dgemma {__version__} and this is 0.0.1; restart the server with this version."
        assert told_first() == [refused(said)]
    path = socket_path(WHAT)
    with monkeypatch.context() as patched:
        mine = os.getuid()
        patched.setattr(rendezvous.os, "getuid", lambda: mine + 1)
        said = f"{os.path.dirname(path)} belongs to another user (id {mine}), so it is not used; remove it."
        assert told_first() == [refused(said)]
    with monkeypatch.context() as patched:
        patched.setattr("mlx_dgemma.server.local.stamp", lambda *_: ())
        said = f"Files of {DEMO} have changed since the server loaded them; restart the server."
        assert told_first() == [refused(said)]
    with monkeypatch.context() as patched:  # two models whose sockets have one name
        other = Settings("demo", identity=identity("another", None, None, None))
        patched.setitem(app.state._state, "settings", other)
        assert told_first() == []


def test_a_server_that_cannot_load_tells_those_who_wait(monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *_, **__: engine_of(DEMO))
    with listening(WHAT) as sock, ThreadPoolExecutor() as pool:
        waits = pool.submit(local.find_server, WHAT, Terminal(err=(heard := StringIO())))
        until(lambda: select.select([sock], [], [], 0)[0])
        serve.refuse_waiting([sock], "The server could not load the model: no memory.")
        assert waits.result() is None
    assert heard.getvalue() == refused("The server could not load the model: no memory.") + "\n"


def test_a_server_that_is_killed_in_an_answer_is_told(monkeypatch):
    def answer(sock, text):
        client, _ = sock.accept()
        with client:
            client.recv(2**16)
            client.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + text)

    said = "The server ended before the answer did; ask again."
    with listening(WHAT) as sock, ThreadPoolExecutor() as pool:
        for text in (b"", b'{"block": {"text": "a", "thinking": ""}}\n{"resu'):
            served = pool.submit(answer, sock, text)
            events = local.Remote(socket_path(WHAT), ()).stream([{"role": "user", "content": "Hi"}])
            assert refusal(local.Gone, list, events) == said
            served.result()
    assert refusal(local.Gone, list, local.Remote(socket_path(WHAT), ()).stream([])) == said


def test_the_network_cannot_ask_as_a_command(server, app):
    key = {"authorization": "Bearer secret", "x-mlx-dgemma-version": __version__}
    assert ask(app, "GET", "/local", key)[0] == 404
    assert ask(app, "POST", "/local/generate", key, (b"{}", b""))[0] == 404
    assert ask(app, "GET", "/v1/models")[0] == 401
    with closing(local._asked(socket_path(WHAT), "GET", "/v1/models")) as answer:  # the socket's mode is the key
        assert json.load(answer)["data"][0]["id"] == "demo"


def test_a_server_ends_after_idle_time_and_not_before():
    now = [0.0]
    idle = Idle(60, lambda: now[0])

    def over(at, requests, running=0, waiting=0):
        now[0] = at
        return idle.is_over(Load(running, waiting, {"requests": requests}))

    assert not over(59, 0)
    assert not over(59.5, 1)  # which was answered between two looks
    assert not over(119, 1, running=1)
    assert not over(178, 1, waiting=1)
    assert not over(237, 1)
    assert over(238, 1)


def test_an_idle_server_ends_by_itself(app, monkeypatch):
    monkeypatch.setattr(app.state.scheduler, "close", lambda seconds: None)
    with listening(WHAT) as sock:
        Server(app, Idle(1, iter(range(100)).__next__)).run(sockets=[sock])
