"""Which replica answers a request: the one that has seen its conversation, or the least busy one."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import httpx

from ...adapters import peft
from ...checkpoint.together import digest_of
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine

MOST_MARKS = 2**15  # of conversations and responses that are remembered
CONNECT_SECONDS = 5.0
# A machine that has lost its power closes no connection: after about 25 s without an answer to probes it is lost.
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPALIVE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]
TIMEOUT = httpx.Timeout(None, connect=CONNECT_SECONDS)
NO_LIMITS = httpx.Limits(max_connections=None)
REFERENCE = "item_reference"  # type of an item that stands for one of an earlier response


@dataclass(eq=False)
class Replica:
    """A server that holds the model.

    Attributes:
        name: as errors and the log call it.
        url: of a server on another machine, or "http://localhost"; "" is this process.
        socket_path: path of the Unix socket at which a child process takes requests from this one alone.
        api_key: that it wants.
        digest: of what it serves, see `digest_of_served`; it must be the same when it comes back.
        alive: whether it gets requests.
        requests: how many it answers at the moment for this process.
    """

    name: str
    url: str = ""
    socket_path: str | None = None
    api_key: str | None = None
    digest: str | None = None
    alive: bool = True
    requests: int = 0

    @property
    def is_here(self) -> bool:
        """Whether it is this process or a child of it, and takes what comes over this user's socket."""
        return not self.url or self.socket_path is not None

    @cached_property
    def client(self) -> httpx.AsyncClient:
        """Sends requests to it, in one event loop."""
        options = None if self.socket_path else KEEPALIVE
        transport = httpx.AsyncHTTPTransport(uds=self.socket_path, limits=NO_LIMITS, socket_options=options)
        return httpx.AsyncClient(transport=transport, base_url=self.url, headers=self._headers, timeout=TIMEOUT)

    def health(self) -> dict[str, Any]:
        """What it tells of itself; waits until it has loaded the model.

        Raises:
            httpx.HTTPError, ValueError: it does not answer, or not as a server of ours.
        """
        transport = httpx.HTTPTransport(uds=self.socket_path)
        with httpx.Client(transport=transport, base_url=self.url, headers=self._headers, timeout=TIMEOUT) as client:
            told = client.get("/health").json()
            return told if isinstance(told, dict) else {}

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class Spread:
    """Chooses replicas.

    Args:
        others: the replicas besides this process.
        rows: a conversation leaves its replica if that answers so many more requests than another one. Encoding it
            once more then takes less time than waiting.

    Attributes:
        replicas: all of them, this process first.
    """

    def __init__(self, others: Sequence[Replica], rows: int):
        self.replicas, self._rows = (Replica("Replica 0"), *others), rows
        self._seen: OrderedDict[str, Replica] = OrderedDict()

    def choose(self, marks: Sequence[str] = (), private: bool = False, bound: bool = False) -> Replica:
        """The replica for a request.

        Args:
            marks: of the request, from `marks_of`.
            private: the request came over this user's socket, so only this machine's replicas take it.
            bound: only the replica that knows a mark can answer.
        """
        found = [one for one in self.replicas if one.alive and (one.is_here or not private)]
        idle = min(found, key=lambda one: one.requests)
        for mark in reversed(marks):
            known = self._seen.get(mark)
            if known in found and (bound or known.requests < idle.requests + self._rows):
                return known
        return idle

    def remember(self, marks: Sequence[str], replica: Replica) -> None:
        """Where a conversation was answered. The least recently used are forgotten."""
        for mark in marks:
            self._seen[mark] = replica
            self._seen.move_to_end(mark)
        while len(self._seen) > MOST_MARKS:
            self._seen.popitem(last=False)


def marks_of(body: Any) -> tuple[list[str], bool]:
    """What is known of a request's conversation, the most specific last; and whether it names an earlier response.

    There is a mark for its beginning up to each message of a user. A shared system prompt alone has none, or all
    conversations would go to one replica. A response and its items have their ids.
    """
    if not isinstance(body, dict):
        return [], False
    items = body.get("messages") or body.get("input") or body.get("arguments")
    if isinstance(items, list) and items and isinstance(items[0], list):  # of a command of this machine
        items = items[0]
    messages = [one for one in items if isinstance(one, dict)] if isinstance(items, list) else []
    digest = hashlib.sha256(json.dumps([body.get(name) for name in ("system", "instructions", "tools")]).encode())
    marks = []
    for one in messages:
        digest.update(json.dumps(one).encode())
        if one.get("role") == "user":
            marks.append(digest.hexdigest())
    named = [body.get("previous_response_id"), *(one.get("id") for one in messages if one.get("type") == REFERENCE)]
    ids = [one for one in named if isinstance(one, str)]
    return marks + ids, bool(ids)


def digest_of_served(engine: Engine, settings: Settings) -> str:
    """A digest of what is served: two servers with the same one give the same answers to the same seeds."""
    found = hashlib.sha256("".join([digest_of(engine.checkpoint), *settings.identity.split("\n")[2:]]).encode())
    if adapter := getattr(engine, "adapter", None):
        for name in (peft.CONFIG, peft.WEIGHTS):
            found.update((adapter / name).read_bytes())
    return found.hexdigest()[:32]
