"""How the processes that watch the ranks find each other, before MLX's transport takes the same port."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

from ..errors import CircumstanceError
from .launched import Address, Place
from .lines import Lines

JOIN_SECONDS = 12.0  # within which all ranks must have started
POLL_SECONDS = 0.1
OTHER_PORT = "end what listens there, or give mlx.launch another --starting-port."


class Fact(NamedTuple):
    """Something that must be the same on all ranks.

    Attributes:
        name: as a sentence holds it.
        value: of this rank; None: not known here, and not compared.
        remedy: what to do where another rank has another value.
    """

    name: str
    value: str | None
    remedy: str


@dataclass(eq=False)
class Peer:
    """The process that watches another rank.

    Attributes:
        rank: its rank.
        lines: the connection.
        host: name of its machine.
        here: whether that is this machine.
        processes: its own, and the rank's when that has started.
        silent: how often in a row the clock has ticked without a word of it.
    """

    rank: int
    lines: Lines
    host: str
    here: bool
    processes: list[int] = field(default_factory=list)
    silent: int = 0

    def __str__(self) -> str:
        return f"Rank {self.rank} (process {self.processes[0]} on {self.host})"


def meet(
    place: Place, command: list[str], check: Callable[[], None], facts: Sequence[Fact] = (), trouble: str = ""
) -> list[Peer]:
    """The peers of this rank: all others on rank 0, rank 0 alone on the others.

    Args:
        place: of this process.
        command: that all ranks were started with.
        check: called now and then; it raises to give up.
        facts: about this rank.
        trouble: why this rank cannot take part; rank 0 says so for it.

    Raises:
        CircumstanceError: a port is taken, a rank does not come in time, it belongs to another group, or a fact
            differs.
    """
    hello = {
        "rank": place.rank,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "facts": {fact.name: fact.value for fact in facts},
        "group": sha256(repr((place.size, command)).encode()).hexdigest(),
    }
    deadline = time.monotonic() + JOIN_SECONDS
    if place.rank:
        return [_find_first(place, hello, deadline, check, trouble)]
    return _gather(place, hello, deadline, check, facts)


def _gather(place: Place, hello: dict, deadline: float, check: Callable[[], None], facts: Sequence[Fact]) -> list[Peer]:
    listener = _listener(place, place.meeting)
    peers: dict[int, Peer] = {}
    strangers: list[Lines] = []
    with closing(listener):
        while len(peers) < place.size - 1:
            check()
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(1, place.size) if rank not in peers)
                raise CircumstanceError(
                    f"Rank {missing} of {place.size} has not come to {_shown(place.meeting)} within "
                    f"{JOIN_SECONDS:.0f} s; see that mlx-dgemma starts there and reaches this address."
                )
            watched: list[Any] = [listener, *strangers]
            ready, _, _ = select.select(watched, [], [], POLL_SECONDS)
            if listener in ready:
                strangers.append(Lines(listener.accept()[0]))
            for one in [one for one in strangers if one in ready]:
                strangers.remove(one)
                if (peer := _introduced(one, place, hello, facts)) is None or peer.rank in peers:
                    one.close()
                else:
                    peers[peer.rank] = peer
    for one in strangers:
        one.close()
    found = [peers[rank] for rank in sorted(peers)]
    for peer in found:
        peer.lines.send(**hello)
    return found


def _introduced(lines: Lines, place: Place, hello: dict, facts: Sequence[Fact]) -> Peer | None:
    """The rank that says hello; None: whoever called is none.

    Raises:
        CircumstanceError: it is one and cannot take part.
    """
    told = lines.receive(1)
    if not told or not {"rank", "group"} <= set(told[0]) or told[0]["rank"] not in range(1, place.size):
        return None
    first = told[0]
    if first.get("trouble"):
        raise CircumstanceError(str(first["trouble"]))
    theirs = first.get("facts")
    for fact in facts:  # first of all: a rank of another version may say other things than this one
        value = theirs.get(fact.name) if isinstance(theirs, dict) else None
        if None not in (fact.value, value) and value != fact.value:
            raise CircumstanceError(
                f"Rank {first['rank']} has {fact.name} {value}, but rank 0 has {fact.value}; {fact.remedy}."
            )
    if set(first) - {"trouble"} != set(hello):
        return None
    if first["group"] != hello["group"]:
        raise CircumstanceError(
            f"Rank {first['rank']} was started with another command or number of ranks than rank 0; start all with "
            "one mlx.launch, and two groups with a --starting-port of their own."
        )
    return Peer(first["rank"], lines, str(first["host"]), lines.local, [int(first["process"])])


def _find_first(place: Place, hello: dict, deadline: float, check: Callable[[], None], trouble: str) -> Peer:
    try:
        for address in place.own:
            _listener(place, address).close()
    except CircumstanceError as error:
        trouble = trouble or str(error)
    while True:
        check()
        try:
            connection = socket.create_connection(place.meeting, timeout=max(deadline - time.monotonic(), POLL_SECONDS))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise CircumstanceError(
                    f"Rank {place.rank} does not reach rank 0 at {_shown(place.meeting)} ({error.strerror}) within "
                    f"{JOIN_SECONDS:.0f} s; see that mlx-dgemma starts there and that this address is the right one."
                ) from None
            time.sleep(POLL_SECONDS)
    connection.settimeout(None)
    lines = Lines(connection)
    lines.send(**hello, **({"trouble": trouble} if trouble else {}))
    while time.monotonic() < deadline + 1 and lines.open:
        check()
        if select.select([lines], [], [], POLL_SECONDS)[0] and (told := lines.receive(1)):
            return Peer(0, lines, str(told[0]["host"]), lines.local, [int(told[0]["process"])])
    raise CircumstanceError(
        trouble or f"{_shown(place.meeting)} is not rank 0 of this group, or it has ended; rank {place.rank} ends."
    )


def _listener(place: Place, address: Address) -> socket.socket:
    """A socket that listens where MLX's transport will: nobody else does, then."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for earlier groups' closed connections
        listener.bind(address)
        listener.listen(place.size)
    except OSError as error:
        listener.close()
        raise CircumstanceError(
            f"Rank {place.rank} cannot listen on {_shown(address)} ({error.strerror}); {OTHER_PORT}"
        ) from None
    return listener


def _shown(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
