"""Requests spread over replicas: who is asked, what comes back, and what happens when one is lost."""

import json
import os
import signal
import sys
from pathlib import Path

import anyio
import httpx
import pytest
from listeners import until
from serving import CHAT, RESPONSES, ask, said
from starlette.responses import JSONResponse
from support import refusal

from mlx_dgemma import __version__
from mlx_dgemma.errors import CircumstanceError
from mlx_dgemma.server.replicas import processes
from mlx_dgemma.server.replicas.forward import Forward
from mlx_dgemma.server.replicas.spread import Replica, Spread, marks_of
from mlx_dgemma.serving.rendezvous import socket_path


def replica(handler, **fields):
    """One whose requests a function answers."""
    one = Replica("Replica 1", "http://there", **fields)
    one.__dict__["client"] = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url=one.url)
    return one


async def own(scope, receive, send):
    body = (await receive())["body"]
    await JSONResponse({"own": len(body)})(scope, receive, send)


async def pieces(*chunks):
    for chunk in chunks:
        yield chunk


def front(*others, rows=2):
    spread = Spread(others, rows)
    spread.replicas[0].requests = 1  # so that the others are less busy
    return Forward(own, spread), spread


def test_a_conversation_stays_on_its_replica_and_others_go_to_the_least_busy():
    one, two = Replica("1", "http://1"), Replica("2", "http://2")
    spread = Spread([one, two], rows=2)
    spread.replicas[0].requests = 5
    first, bound = marks_of({"messages": [{"role": "system", "content": "S"}, *said("Hi.")]})
    later, _ = marks_of({"messages": [{"role": "system", "content": "S"}, *said("Hi.", "Yes?", "More.")]})
    other, _ = marks_of({"messages": [{"role": "system", "content": "S"}, *said("Else.")]})
    assert not bound and first == later[:1] and len(later) == 2 and not set(first) & set(other)
    spread.remember(first, two)
    two.requests = 1
    assert spread.choose(later) is two and spread.choose(other) is one
    two.requests = 2
    assert spread.choose(later) is one
    named, bound = marks_of({"previous_response_id": "resp_1", "input": "More."})
    spread.remember(["resp_1"], two)
    assert bound and spread.choose(named, bound=True) is two
    two.alive = False
    assert spread.choose(later) is one
    assert spread.choose(other, private=True) is spread.replicas[0]
    assert marks_of([1])[0] == marks_of({"prompt": "a"})[0] == []
    commands = {"arguments": [said("Hi."), ["a"]], "system": None}
    assert marks_of(commands)[0] == marks_of({"messages": said("Hi.")})[0]


def test_a_request_is_passed_on_as_it_came_without_what_belongs_to_the_connection():
    seen = []

    def answer(request):
        seen.append(request)
        headers = {"Retry-After": "3", "Connection": "close"}
        return httpx.Response(429, headers=headers, content=pieces(b'{"id": "resp_01234', b'56789"}'))

    one = replica(answer)
    app, spread = front(one)
    sent = {"authorization": "Bearer key", "origin": "app://a", "x-mark": "1", "content-type": "application/json"}
    body = json.dumps({"input": "Hi."}).encode()
    status, headers, text = ask(app, "POST", f"{RESPONSES}?a=b", sent, (body[:5], body[5:], b""))
    assert (status, headers["retry-after"], json.loads(text)) == (429, "3", {"id": "resp_0123456789"})
    assert "connection" not in headers
    (request,) = seen
    assert (str(request.url), request.content) == (f"http://there{RESPONSES}?a=b", body)
    assert request.headers["x-mark"] == "1" and not {"authorization", "origin"} & set(request.headers)
    one.requests = 9
    assert spread.choose(["resp_0123456789"], bound=True) is one
    assert one.requests == 9 and json.loads(ask(app, "POST", CHAT, (), (b"{}", b""))[2]) == {"own": 2}


async def broken():
    yield b"data: {}\n\n"
    raise httpx.ReadError("gone")


@pytest.mark.parametrize("path, lost", [
    (CHAT, {"type": "error", "error": {"message": "Replica 1 was lost while it answered; ask again.",
                                       "type": "server_error", "param": None, "code": "replica_lost"}}),
    ("/v1/messages", {"type": "error", "error": {"type": "api_error",
                                                 "message": "Replica 1 was lost while it answered; ask again."}}),
])  # fmt: skip
def test_a_lost_replica_ends_its_requests_with_an_error_and_the_rest_goes_on(path, lost, caplog):
    def refuse(request):
        raise httpx.ConnectError("refused")

    def die(request):
        raise httpx.ReadError("gone")

    def stream(request):
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=broken())

    def asked(handler):
        app, spread = front(replica(handler, socket_path="s"))
        status, _, text = ask(app, "POST", path, (), (b"{}", b""))
        again = json.loads(ask(app, "POST", path, (), (b"{}", b""))[2])
        assert again == {"own": 2} and [one.requests for one in spread.replicas] == [1, 0]
        return status, text

    assert asked(refuse) == (200, b'{"own":2}')  # nothing was sent, so another one answers
    status, text = asked(die)
    assert status == 502 and json.loads(text)["error"]["message"] == lost["error"]["message"]
    status, text = asked(stream)
    events = text.decode().split("\n\n")
    assert (status, events[0]) == (200, "data: {}")
    assert events[1].startswith("event: error\n") and json.loads(events[1].partition("data: ")[2]) == lost
    assert [record.message for record in caplog.records] == [
        f"Replica 1 does not answer ({why}); the others go on." for why in ("refused", "gone", "gone")
    ]


def test_a_server_that_comes_back_gets_requests_again(monkeypatch):
    monkeypatch.setattr("mlx_dgemma.server.replicas.forward.RETRY_SECONDS", 0.01)
    answers = iter([httpx.ConnectError("refused"), httpx.ConnectError("refused"), (503, "d"), (200, "e"), (200, "d")])

    def answer(request):
        told = next(answers)
        if isinstance(told, Exception):
            raise told
        return httpx.Response(told[0], json={"digest": told[1]})

    one = replica(answer, digest="d")
    app, _ = front(one)

    async def go():
        app._lose(one, next(answers))
        assert not one.alive
        with anyio.fail_after(20):
            while not one.alive:
                await anyio.sleep(0.01)

    anyio.run(go)
    assert next(answers, None) is None


CHILD = """
import http.server, json, os, socketserver, sys, threading
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"version": sys.argv[2], "digest": os.environ.get("DIGEST")}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
    def address_string(self): return "-"
folder = os.environ["MLX_DGEMMA_RUNTIME_DIR"]
os.makedirs(folder)
server = socketserver.ThreadingUnixStreamServer(os.path.join(folder, sys.argv[1]), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.buffer.read()
"""


def test_child_processes_answer_are_compared_and_end_with_their_parent(monkeypatch):
    name = Path(socket_path("model")).name
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setenv("DIGEST", "d")
    lines = []
    with processes.children(2, [name, __version__], "model", 10, lines.append) as replicas:
        processes.check(replicas, "d")
        message = refusal(CircumstanceError, lambda: processes.check(replicas, "e"))
        assert message == (
            f"{replicas[0].name} serves another model, adapter or dtype than this process; start it with the same."
        )
        pids = [int(one.name.partition("process ")[2].rstrip(")")) for one in replicas]
        os.kill(pids[1], signal.SIGKILL)
        until(lambda: lines)
        assert lines == [f"Replica 2 (process {pids[1]}) was killed by signal 9; the others go on."]
        assert [one.alive for one in replicas] == [True, False]
        assert refusal(CircumstanceError, lambda: processes.check(replicas, "d")).startswith(
            f"{replicas[1].name} does not answer ("
        )
    assert len(lines) == 1
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with processes.children(1, [name, "0"], "model", 10, lines.append) as replicas:
        message = refusal(CircumstanceError, lambda: processes.check(replicas, "d"))
        assert message == f"{replicas[0].name} is mlx-dgemma 0 and this is {__version__}; use one version."


def test_each_child_takes_a_gpu_of_its_own():
    assert processes._gpu(1, {"CUDA_VISIBLE_DEVICES": "4,6"}) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert processes._gpu(2, {"CUDA_VISIBLE_DEVICES": "4,6"}) == {}


def test_servers_are_named_by_their_urls():
    (one,) = processes.servers(["http://mac2.local:8080/v1/"], "key")
    assert (one.url, one.is_here) == ("http://mac2.local:8080", False)
    assert one.client.headers["authorization"] == "Bearer key"
