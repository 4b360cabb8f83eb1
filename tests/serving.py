"""A server on a free port, and requests to an application without any."""

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from urllib.parse import unquote

from mlx_dgemma.checkpoint.find import find
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.connections import Server
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.tickets import Accepted, Health, Load, Ticket

MODEL = "demo"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@contextmanager
def serving(scheduler, **settings):
    """The base URL of a server in a thread; it closes the scheduler."""
    server = Server(create_app(scheduler, Settings(**settings)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@cache
def demo():
    return Checkpoint.open(find(None))


class Script:
    """A scheduler without a model: it prepares nothing, and tells every request the same events."""

    def __init__(self, *events, error=None):
        checkpoint = demo()
        self.engine = SimpleNamespace(
            checkpoint=checkpoint,
            config=checkpoint.config,
            options=GenerationOptions(),
            tokenizer=SimpleNamespace(think_start_tokens=None, think_end_tokens=None),
        )
        self.events, self.error, self.submitted = events, error, []

    def submit(self, prepare, listener, drafts=False):
        if self.error:
            raise self.error
        self.submitted.append(Ticket(prepare, listener, drafts))
        for event in (Accepted(1, 0), *self.events):
            listener(event)
        return self.submitted[-1]

    def load(self):
        return Load(0, 0, {})

    def health(self):
        return Health(True, 0.0)

    def close(self, seconds=0.0):
        pass


def ask(app, method, target, headers=(), chunks=(b"",), twice=False):
    """(status, headers, body) of a request sent to the application itself.

    `chunks` may be endless: what is not asked for is not made. `twice` sends a second Host header.
    """
    path, _, query = target.partition("?")
    given = [*{"host": "localhost:8080", **dict(headers)}.items()]
    given += [("host", "localhost:8080")] * twice
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in given if value is not None],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8080),
    }
    left, sent = iter(chunks), []

    async def receive():
        chunk = next(left, None)
        if chunk is None:
            await asyncio.sleep(3600)  # a client that waits
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    held = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], held, b"".join(message.get("body", b"") for message in sent)


def post(app, path, body, **headers):
    """(status, parsed answer) of a JSON request to the application itself."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = ask(app, "POST", path, headers, (data, b""))
    return status, json.loads(answer)


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    description = "Get the weather of a city." if name == "get_weather" else "Do it."
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", city={"type": "string", "description": "The city."})
TIME = tool("get_time", city={"enum": ["Oslo", "Paris"]})


def said(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]


def chat(client, prompt, **options):
    messages = said(prompt) if isinstance(prompt, str) else prompt
    return client.chat.completions.create(model=MODEL, messages=messages, **options)
