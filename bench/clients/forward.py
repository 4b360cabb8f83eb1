"""A proxy between a client and the server: it notes what is refused and, where asked to, shortens what is sent.

Agents send ten thousand tokens and more before the first question; the demo's context has 4,096, and it has never seen
their reminders. Shortened are system texts, descriptions of tools, their number (the first of every type stays), what
stands around the question in its message and what users and assistants said before it. The answer's length is bounded.
Fields, the kinds of items and events pass as they are.

Another change is for clients whose tools are Pydantic's: the demo learned tools without `additionalProperties` and
`title`, and writes no readable call of one that is shown with them. These two words are left out of parameters.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from programs import QUESTION

SYSTEM, TOOL, OTHER, TOKENS = 60, 60, 300, 256  # characters of a text, tokens of an answer
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding"}
SECONDS = 300


class Refusal(NamedTuple):
    """A request that the server did not answer with 200."""

    path: str
    status: int
    param: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.status} at {self.path}: {self.sentence}"


def shorten(body: dict) -> dict:
    """A body with the same fields and shorter texts. OpenAI's two APIs, Anthropic's and Ollama's."""
    told = dict(body)
    for name in ("system", "instructions"):
        if name in told:
            told[name] = _texts(told[name], SYSTEM)
    for name in ("messages", "input"):
        if isinstance(told.get(name), list):
            told[name] = _conversation(told[name])
    if isinstance(told.get("tools"), list):
        told["tools"] = _tools(told["tools"])
    return {k: min(v, TOKENS) if k in LENGTHS and isinstance(v, int) else v for k, v in told.items()}


def _conversation(messages: list) -> list:
    """System texts cut, and the turns from the question on."""
    asked = next((i for i, one in enumerate(messages) if _role(one) == "user" and QUESTION in json.dumps(one)), 0)
    kept = [one for i, one in enumerate(messages) if i >= asked or _role(one) in ("system", "developer")]
    return [_message(one) for one in kept]


def _role(message: Any) -> str:
    return str(message.get("role")) if isinstance(message, dict) else ""


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or "content" not in message:
        return message
    content = message["content"]
    if _role(message) == "user" and isinstance(content, list):
        around = [one for one in content if _has_text(one) and QUESTION in one["text"]]
        content = around or content
    return {**message, "content": _texts(content, SYSTEM if _role(message) in ("system", "developer") else OTHER)}


def _texts(content: Any, limit: int) -> Any:
    """A text or a list of parts, cut; of a text with the question that alone is kept."""
    if isinstance(content, str):
        return QUESTION if QUESTION in content else content[:limit]
    if isinstance(content, list):
        return [{**one, "text": _texts(one["text"], limit)} if _has_text(one) else one for one in content]
    return content


def _has_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _tools(tools: list[dict]) -> list[dict]:
    firsts: dict[str, dict] = {}
    for one in tools:
        firsts.setdefault(str(one.get("type")), one)
    return [_tool(one) for one in firsts.values()]


def _tool(tool: dict) -> dict:
    """A tool without the descriptions of its parameters; of a namespace as of the whole list."""
    told = {**tool}
    if isinstance(tool.get("function"), dict):
        told["function"] = _tool(tool["function"])
    if isinstance(tool.get("tools"), list):
        told["tools"] = _tools(tool["tools"])
    if isinstance(tool.get("description"), str):
        told["description"] = tool["description"][:TOOL]
    for name in ("parameters", "input_schema"):
        if name in tool:
            told[name] = _without(tool[name], ("description",))
    return told


def _without(schema: Any, names: tuple[str, ...]) -> Any:
    """A schema without such words, wherever they are no names of properties."""
    if isinstance(schema, dict):
        return {
            k: {name: _without(one, names) for name, one in v.items()} if k == "properties" else _without(v, names)
            for k, v in schema.items()
            if k not in names
        }
    return [_without(one, names) for one in schema] if isinstance(schema, list) else schema


def learned(body: dict) -> dict:
    """A body whose tools look as the demo knows them."""
    tools = body.get("tools")
    if not isinstance(tools, list):
        return body
    return {**body, "tools": [_learned(one) for one in tools]}


def _learned(tool: dict) -> dict:
    inner = {k: _learned(v) if k == "function" else v for k, v in tool.items()}
    names = ("additionalProperties", "title")
    return {k: _without(v, names) if k == "parameters" else v for k, v in inner.items()}


CHANGES: dict[str, Callable[[dict], dict]] = {"shortened": shorten, "schemas": learned}


class Forward:
    """A proxy in front of `target` on a free port of this machine, until `close`."""

    def __init__(self, target: str, change: str = "", log: Path | None = None):
        self.target, self.change, self.log = urlsplit(target), CHANGES.get(change), log
        self.refused: list[Refusal] = []
        self.answered = 0
        forward = self

        class Handler(_Handler):
            owner = forward

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where clients ask, without a path."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def note(self, path: str, status: int, sent: bytes, answer: bytes) -> None:
        """Count an answer, or keep what was refused."""
        if self.log:
            with open(self.log, "a", encoding="utf-8") as file:
                said = {"path": path, "status": status, "sent": sent.decode(errors="replace")}
                file.write(json.dumps({**said, "answer": answer.decode(errors="replace")}) + "\n")
        if status < 400:
            self.answered += 1
            return
        try:
            error = json.loads(answer)["error"]
        except (ValueError, KeyError, TypeError):
            error = answer.decode(errors="replace")[:200]
        error = error if isinstance(error, dict) else {"message": error}
        self.refused.append(Refusal(path, status, error.get("param") or "", str(error.get("message"))))

    def close(self) -> None:
        """Take no more requests."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Forward

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _forward(self) -> None:
        self.close_connection = True
        sent = self._body()
        if self.owner.change and sent.startswith(b"{"):
            sent = json.dumps(self.owner.change(json.loads(sent))).encode()
        target = self.owner.target
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=SECONDS)
        try:
            connection.request(self.command, target.path + self.path, sent or None, headers)
            response = connection.getresponse()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            answer = b""
            while piece := response.read1(65536):
                answer += piece
                self.wfile.write(piece)
                self.wfile.flush()
            self.owner.note(self.path, response.status, sent, answer)
        except OSError as error:
            self.owner.note(self.path, 599, sent, f"{type(error).__name__}: {error}".encode())
        finally:
            connection.close()

    def _body(self) -> bytes:
        """A body with its length, or in chunks, as node's fetch sends streams."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_HEAD = do_DELETE = do_OPTIONS = _forward
