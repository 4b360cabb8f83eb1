"""Rank 0: what it computes is told to the others first, so that they compute it with it.

Followers know the same objects (loops, requests, sessions) by numbers. Every random draw comes from a request's seed,
and nothing that a clock decides is left to them: requests join and leave when rank 0 says so, and costs of passes are
rank 0's. What a step came to is told with the next one; a rank that came to something else ends the group.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx

from ..decoding import costs
from ..decoding.events import Block, Event, Finished
from ..decoding.loop import Loop
from ..decoding.request import Request
from ..decoding.session import Session
from ..distributed.group import init
from ..distributed.watched import Watched
from ..engine import Engine, load
from ..errors import CircumstanceError, DgemmaError, failure
from ..serving.prefix_cache import PrefixCache
from .channel import listen, pickled

T = TypeVar("T")
Told = tuple[Request, Event | Exception]


class Leader:
    """Tells the other ranks what to do.

    Args:
        me: this process, rank 0.
        connections: to the others.
    """

    def __init__(self, me: Watched, connections: Sequence[Connection]):
        self.me, self._connections = me, connections
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next = 0
        self._gone: deque[int] = deque()  # objects that nobody here needs any more
        self._lock = threading.Lock()

    def tell(self, what: str, *arguments: Any) -> None:
        """Let the others do something; they begin as soon as they hear it."""
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        data = pickled((what, *arguments, gone))
        try:
            with self._lock:
                for connection in self._connections:
                    connection.send_bytes(data)
        except OSError as error:
            self.fail(error)

    def introduce(self, value: Any) -> int:
        """A number by which the others know an object from now on, until nobody needs it here."""
        number, self._next = self._next, self._next + 1
        self._numbers[value] = number
        weakref.finalize(value, self._gone.append, number).atexit = False
        return number

    def number_of(self, value: Any) -> int | None:
        """The number of an object that the others know."""
        return self._numbers.get(value)

    def fail(self, error: BaseException) -> NoReturn:
        """End the group: what the others compute now waits for this rank."""
        self.me.fail(failure(0, error))


class LeadingLoop(Loop):
    """A loop whose steps all ranks take together."""

    def __init__(self, engine: LeadingEngine):
        super().__init__(engine.model, engine.load_seconds, engine.costs)
        self._leader, self._outcome, self._stepping = engine.leader, 0, False
        self._number = self._leader.introduce(self)
        self._leader.tell("loop", self._number)

    def add(self, request: Request, session: Session | None = None, snapshot_at: int = 0) -> None:
        """Take in a request on every rank."""
        with self._leader.me.uninterrupted():
            super().add(request, session, snapshot_at)
            known = None if session is None else self._leader.number_of(session)
            number = self._leader.introduce(request)
            found = None if session is None or known is not None else len(session.cache_key)
            self._leader.tell("add", self._number, number, sent(request), known, found, snapshot_at)

    def remove(self, request: Request) -> None:
        """Forget a request on every rank."""
        if self._stepping:  # every rank's step does so by itself
            super().remove(request)
            return
        with self._leader.me.uninterrupted():
            super().remove(request)
            self._leader.tell("remove", self._number, self._leader.number_of(request))

    def step(self) -> Iterator[Told]:
        """As `Loop.step`, on every rank: it is taken as a whole before the first event is told."""
        with self._leader.me.uninterrupted():
            self._leader.tell("step", self._number, self._outcome)
            self._stepping = True
            told = list(super().step())
            self._stepping = False
            if (error := failure_in(told)) is not None:
                self._leader.fail(error)
            self._outcome = outcome_of(told)
        yield from told


class LeadingCache(PrefixCache):
    """A prefix cache that every rank has of its own, with the same entries."""

    def __init__(self, engine: Engine, budget: int, folder: Path | None = None):
        assert isinstance(engine, LeadingEngine)
        if folder is not None:
            raise CircumstanceError(
                "--cache-dir keeps the prefixes of one process, and this model is spread over several; leave it out."
            )
        super().__init__(engine, budget)
        self._leader = engine.leader
        self._leader.tell("cache", budget)

    def find(self, wanted: list[int | str]) -> tuple[Session | None, int]:
        """As `PrefixCache.find`, on every rank."""
        self._leader.tell("find", wanted)
        return super().find(wanted)

    def keep(self, request: Request) -> None:
        """As `PrefixCache.keep`, on every rank."""
        self._leader.tell("keep", self._leader.number_of(request))
        super().keep(request)


class LeadingEngine(Engine):
    """An engine whose model is computed by all ranks together."""

    leader: Leader

    @classmethod
    def of(cls, engine: Engine, leader: Leader) -> LeadingEngine:
        """The same engine, leading."""
        leading = object.__new__(cls)
        vars(leading).update(vars(engine), leader=leader)
        return leading

    def loop(self) -> LeadingLoop:
        """What generates requests together, on all ranks."""
        return LeadingLoop(self)

    def session(self) -> Session:
        """A conversation, on every rank."""
        session = super().session()
        self.leader.tell("session", self.leader.introduce(session))
        return session

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that computes with the model, on every rank."""
        with self.leader.me.uninterrupted():
            self.leader.tell("call", function, arguments)
            try:
                return function(*arguments)
            except DgemmaError:
                raise
            except Exception as error:
                self.leader.fail(error)


def lead(me: Watched, name: str | None, **keywords: Any) -> LeadingEngine:
    """Load a checkpoint on all ranks; takes what `mlx_dgemma.load` takes.

    Raises:
        CircumstanceError: the ranks do not find each other, or have other versions or checkpoints.
        CheckpointError, MemoryLimitError, OptionError: as `load`.
    """
    group = init()
    leader = Leader(me, listen(me.place, group))
    name = name or os.environ.get("MLX_DGEMMA_MODEL")  # the others' variable does not count
    leader.tell("load", name, {key: value for key, value in keywords.items() if key != "tokenizer"})
    engine = LeadingEngine.of(load(name, group=group, **keywords), leader)
    known = _costs(engine)
    engine.costs = lambda: known  # type: ignore[assignment]
    leader.tell("costs", known)
    return engine


def _costs(engine: LeadingEngine) -> costs.Costs:
    """What passes cost all ranks together: as rank 0 has kept it, or measures it now."""
    if os.environ.get(costs.NO_MEASURE) == "0":
        return costs.reckoned(engine.config.text)
    path = costs.file_of(engine.model)
    known = costs.read(path)
    if known is None:
        known = engine.call(costs.measure, engine.model)
        costs.write(path, known)
        mx.clear_cache()
    return known


def sent(request: Request) -> Request:
    """A request as it is sent: without what only the asker knows, and not yet begun."""
    sent = copy.copy(request)
    sent.postprocess = None
    del sent.session
    return sent


def outcome_of(told: Sequence[Told]) -> int:
    """A checksum of what a step came to; no rank knows others' requests, so their order counts."""
    seen: list[Any] = []
    for _, event in told:
        if isinstance(event, Block):
            seen.append(event.tokens)
        elif isinstance(event, Finished):
            seen.append(event.result.finish_reason)
        elif isinstance(event, Exception):
            seen.append(type(event).__name__)
    return zlib.crc32(repr(seen).encode()) if seen else 0


def failure_in(told: Sequence[Told]) -> Exception | None:
    """An error that one rank alone may have had, such as a lack of memory: the ranks are no longer alike."""
    return next(
        (event for _, event in told if isinstance(event, Exception) and not isinstance(event, DgemmaError)), None
    )
