"""Connections and streams: slow clients, too many of them, silence, and the end of the server."""

import asyncio
import json
import socket
import time

import pytest
from listeners import LIMIT, until
from serving import CHAT, Script, said, serving

from mlx_dgemma.decoding.events import Block, Draft, Finished
from mlx_dgemma.server import streaming
from mlx_dgemma.server.follow import follow
from mlx_dgemma.server.streaming import PING, with_pings

BODY = json.dumps({"messages": said("Hi."), "stream": True}).encode()
HEADER = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()


def connect(url):
    client = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), LIMIT)
    client.settimeout(LIMIT)
    return client


def answer(client):
    """(status, message of the error) of what the server sends before it closes."""
    received = b""
    while piece := client.recv(2**16):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize("sent, awaited", [(b"", "header"), (HEADER[:20], "header"), (HEADER + b"{", "body")])
def test_who_does_not_send_a_request_is_not_waited_for(sent, awaited):
    with serving(Script(), header_seconds=0.05, body_seconds=0.05) as url, connect(url) as client:
        client.sendall(sent)
        assert answer(client) == (408, f"The {awaited} of the request took too long; send it at once.")


def test_pieces_of_a_body_do_not_keep_a_connection_for_ever():
    with serving(Script(), body_seconds=0.05) as url, connect(url) as client:
        client.sendall(HEADER)
        with pytest.raises(OSError):  # the server has closed: the whole body had ten times as long as a piece
            for _ in range(len(BODY) - 1):
                client.sendall(b" ")
                time.sleep(0.02)
        assert len(BODY) > 40


def test_a_connection_without_a_request_makes_room():
    with serving(Script(), connections=2) as url, connect(url) as first, connect(url):
        with connect(url) as third:
            third.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert third.recv(15) == b"HTTP/1.1 200 OK"
        assert answer(first) == (503, "The server has 2 connections, which is all it takes; try again later.")


def test_where_all_are_answered_no_other_connects():
    with serving(Script(), connections=1) as url, connect(url) as first:
        first.sendall(HEADER + BODY)
        assert first.recv(15) == b"HTTP/1.1 200 OK"  # the stream has begun and does not end
        with connect(url) as second:
            assert answer(second) == (503, "The server has 1 connections, which is all it takes; try again later.")


def test_who_does_not_read_is_left():
    script = Script(*[Block(block=0, steps=1, tokens=(5,), text="a" * 2**22)] * 4)
    with serving(script, stalled_seconds=0.1) as url, connect(url) as client:
        client.sendall(HEADER + BODY)
        until(lambda: script.submitted and script.submitted[0].cancelled.is_set())


def test_no_http_is_refused_in_json():
    with serving(Script()) as url, connect(url) as client:
        client.sendall(b"\x16\x03\x01\r\n\r\n")
        assert answer(client) == (400, "Invalid HTTP request received.")


def draft(step):
    return Draft(block=0, step=step, tokens=None, accepted=None, entropy=None)


def test_of_drafts_that_wait_the_newest_is_sent():
    block, last = Block(block=0, steps=2, tokens=(5,)), Finished(None)
    script = Script(draft(0), draft(1), block, draft(2), draft(3), last)

    async def events():
        return [event async for _, event in follow(script, [lambda: None], True)]

    assert asyncio.run(events())[1:] == [block, draft(3), last]


def test_silence_is_filled_with_comments(monkeypatch):
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.001)

    async def told():
        heard, going = [], asyncio.Event()

        async def events():
            yield "first"
            await going.wait()
            yield "last"

        async for one in with_pings(events()):
            heard.append(one)
            if len(heard) == 3:
                going.set()
        return heard

    heard = asyncio.run(told())
    assert heard[:3] == ["first", PING, PING]
    assert (heard[-1], set(heard[3:-1]) <= {PING}) == ("last", True)


def test_the_end_of_the_server_refuses_what_is_not_whole():
    with serving(Script()) as url:
        client = connect(url)
        client.sendall(HEADER.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        while not client.recv(2**10).endswith(b"\r\n\r\n"):  # the server waits for the body
            pass
    with client:
        assert answer(client) == (503, "The server is stopping; ask again later.")
