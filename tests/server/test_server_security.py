"""Who may ask the server, and how much: hosts, origins, keys, sizes, and what a picture may be."""

import asyncio
import base64
import itertools
import json
import logging
import socket
import struct
import zlib

import openai
import pytest
from PIL import ImageFile
from serving import Script, ask, chat, post, serving
from support import refusal

from mlx_dgemma import OptionError
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.schemas.messages import parse_data_url
from mlx_dgemma.server.settings import Settings

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello."}]}


def app_of(**settings):
    return create_app(Script(), Settings(**settings))


def error_of(answer):
    return json.loads(answer[2])["error"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "mac.local", "mac.local:9"]
)
def test_names_of_the_server(host):
    assert ask(app_of(allowed_hosts=("mac.local",)), "GET", "/health", {"host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8080", "", "::1", None]
)
def test_other_names_are_refused(host):
    answer = ask(app_of(), "GET", "/health", {"host": host})
    assert answer[0] == 403
    shown = (host or "")[:100]
    assert error_of(answer) == {
        "message": f"The Host header is {shown!r}, which is not a name of this server; --allowed-host makes it one.",
        "type": "invalid_request_error",
        "param": None,
        "code": "host_not_allowed",
    }


def test_two_hosts_are_none():
    answer = ask(app_of(), "GET", "/health", twice=True)
    assert (answer[0], error_of(answer)["code"]) == (403, "host_not_allowed")


def test_the_bound_host_is_a_name():
    settings = {"host": "192.168.0.5", "api_key": "k"}
    assert ask(app_of(**settings), "GET", "/health", {"host": "192.168.0.5:8080"})[0] == 200
    assert ask(app_of(), "GET", "/health", {"host": "192.168.0.5:8080"})[0] == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9999", "https://localhost:8080", ""]
)
def test_foreign_pages_are_refused(origin):
    for method, path in (("POST", CHAT), ("GET", "/health"), ("OPTIONS", CHAT)):
        asked = {"origin": origin, "access-control-request-method": "POST"}
        status, headers, body = ask(app_of(), method, path, asked)
        assert status == 403
        assert not [name for name in headers if name.startswith("access-control")]
        way = "any page can have this one, so nothing allows it" if origin == "null" else "--cors-origin allows it"
        message = f"The Origin header is {origin!r}, and pages from there may not ask; {way}."
        assert json.loads(body)["error"]["message"] == message


def test_the_servers_own_page_may_ask():
    status, headers, _ = ask(app_of(), "GET", "/health", {"origin": "http://localhost:8080"})
    assert status == 200 and "access-control-allow-origin" not in headers


def test_an_allowed_page_may_ask():
    app, origin = app_of(cors_origins=("http://localhost:3000",), api_key="secret"), "http://localhost:3000"
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    status, headers, body = ask(app, "OPTIONS", CHAT, preflight)
    assert (status, body) == (204, b"")
    assert headers["access-control-allow-origin"] == origin
    assert headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert headers["vary"] == "Origin"
    status, headers, _ = ask(app, "GET", "/v1/models", {"origin": origin})
    assert (status, headers["access-control-allow-origin"]) == (401, origin)
    assert ask(app, "GET", "/health", {"origin": "http://localhost:3001"})[0] == 403


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", "Bearer secre", "Bearer secrets", "Basic sécret", "Basic secret"]
)
def test_a_wrong_key_is_refused(given):
    status, headers, body = ask(app_of(api_key="secret"), "POST", CHAT, {"authorization": given})
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"] == {
        "message": "The API key is missing or wrong; send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`.",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_a_key_opens_and_two_paths_need_none():
    for key in ("sécret", "voilà"):
        app = app_of(api_key=key)
        assert ask(app, "GET", "/v1/models", {"authorization": f"Bearer  {key} "})[0] == 200
    assert ask(app, "GET", "/health")[0] == 200
    assert [ask(app, "GET", path)[0] for path in ("/metrics", "/v1/models", "/nothing")] == [401, 401, 401]


def test_what_others_reach_needs_a_key():
    message = (
        "The host is 0.0.0.0, which other machines can reach: give an API key (--api-key or $MLX_DGEMMA_API_KEY), "
        "or leave the host out."
    )
    assert refusal(OptionError, Settings, host="0.0.0.0") == message
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert Settings(host=host).api_key is None
    assert refusal(OptionError, Settings, api_key="") == "The API key is empty; give one, or leave it out."
    for origin in ("*", "localhost:3000", "http://a/b"):
        told = refusal(OptionError, Settings, cors_origins=(origin,))
        assert told == f"The origin is {origin!r}; it should be like http://localhost:3000, without a path."


TOO_LARGE = {
    "message": "The body is larger than 32 MiB; send less.",
    "type": "invalid_request_error",
    "param": None,
    "code": "request_too_large",
}


def test_a_declared_gigabyte_is_not_read():
    app = app_of()
    answer = ask(app, "POST", CHAT, {"content-length": str(2**30)}, chunks=())  # reading would wait for ever
    assert (answer[0], error_of(answer)) == (413, TOO_LARGE)
    assert answer[1]["connection"] == "close"
    answer = ask(app, "POST", CHAT, {"content-length": "9" * 5000}, chunks=())
    assert (answer[0], error_of(answer)) == (413, TOO_LARGE)


def test_an_undeclared_gigabyte_is_read_up_to_the_limit():
    app, made = app_of(), itertools.count()
    chunks = (b" " * 2**20 for _ in itertools.takewhile(lambda i: i < 1024, made))
    answer = ask(app, "POST", CHAT, {"transfer-encoding": "chunked"}, chunks)
    assert (answer[0], error_of(answer)) == (413, TOO_LARGE)
    assert next(made) == 33


def test_a_chunked_flood_over_a_socket():
    with serving(Script()) as url, socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk, sent = b"100000\r\n" + b" " * 2**20 + b"\r\n", 0
        try:
            while sent < 2**10:
                client.sendall(chunk)
                sent += 1
        except OSError:
            pass
        assert 32 <= sent < 200  # what the buffers between hold may come on top


def test_bodies_are_counted_together():
    """Each of 17 clients has sent all of its body but the end, and waits."""
    app, answers = app_of(body_bytes=100), []

    async def client():
        left, sent = [b" " * 99], []

        async def receive():
            if not left:
                await asyncio.sleep(3600)
            return {"type": "http.request", "body": left.pop(), "more_body": True}

        async def send(message):
            sent.append(message)
            answers.append(message.get("status", 0))

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "scheme": "http", "query_string": b""}
        await app({**scope, "headers": headers, "raw_path": CHAT.encode()}, receive, send)

    async def all_of_them():
        tasks = [asyncio.create_task(client()) for _ in range(17)]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        return len(done), len(waiting)

    assert asyncio.run(all_of_them()) == (1, 16)
    assert answers[0] == 503


def test_limits_are_the_settings():
    body = json.dumps(HELLO).encode()
    app = app_of(body_bytes=len(body) - 1)
    assert ask(app, "POST", CHAT, (), (body, b""))[0] == 413
    assert ask(app_of(body_bytes=len(body)), "POST", "/v1/models", (), (body, b""))[0] == 405


# pictures


def asked(*urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]}


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://127.0.0.1/", "file:///etc/passwd", "/etc/passwd",
                                 "tests/conftest.py", "", "ftp://x", " data:,", "datas:,x"])  # fmt: skip
def test_nothing_is_fetched_or_opened(url):
    status, answer = post(app_of(), CHAT, asked(url))
    place = "messages[0].content[0].image_url.url"
    assert status == 400
    assert answer["error"]["param"] == place
    assert answer["error"]["message"] == (
        f"{place} is {url!r}; nothing is fetched and no file is opened: send a data URL, such as "
        "data:image/png;base64,iVBORw0..."
    )


def bomb(side):
    """A PNG of side x side pixels of nothing, in a few kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezed = zlib.compressobj(9)
    data = squeezed.compress(bytes((side + 1) * 10)) + squeezed.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def data_of(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_of_pixels_is_not_decoded(client, monkeypatch):
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda picture: decoded.append(picture.size))
    parts = [{"type": "image_url", "image_url": {"url": data_of(bomb(10_000))}}]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": parts}])
    assert decoded == []
    assert caught.value.param == "messages"
    assert caught.value.body["message"].endswith(
        "has 10000 x 10000 pixels; at most 50 million are read, so make it smaller."
    )


def test_too_many_pictures():
    url = data_of(bomb(1))
    status, answer = post(app_of(), CHAT, asked(*[url] * 65))
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert answer["error"]["message"] == "There are more than 64 pictures; send fewer."


def test_broken_data():
    place = "messages[0].content[0].image_url.url"
    for url, message in (
        ("data:image/png;base64,a", "data:image/png;base64,a holds broken base64: "),
        ("data:", "data: is no data: URL; it should look like data:image/png;base64,iVBORw0..."),
        ("data:image/png;base64,", "data:image/png;base64, is empty."),
    ):
        status, answer = post(app_of(), CHAT, asked(url))
        assert (status, answer["error"]["param"]) == (400, place)
        assert answer["error"]["message"].startswith(message)


def test_data_urls_are_their_bytes():
    for data in (b"\x00\xff", b"a" * 1000):
        assert parse_data_url(data_of(data)) == data
        assert parse_data_url("DATA:;base64," + base64.b64encode(data).decode()) == data


# the log


def test_the_log_has_a_line_a_request_and_no_text(caplog):
    with caplog.at_level(logging.DEBUG, logger="mlx_dgemma"):
        post(app_of(), CHAT, {"messages": "a secret"})
        ask(app_of(), "GET", "/a%0D%0Aforged?token=secret")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert " 127.0.0.1 POST /v1/chat/completions 400 " in lines[0]
    assert " 127.0.0.1 GET /a%0D%0Aforged 404 " in lines[1]
    assert "secret" not in lines[0] + lines[1]
