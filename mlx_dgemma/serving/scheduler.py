"""Continuous batching on one thread: a queue of requests, the running batch, and events for the callers."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..decoding.events import Block, Draft, Finished
from ..decoding.loop import Loop
from ..model import device
from .prefix_cache import PrefixCache

if TYPE_CHECKING:
    from ..decoding.events import Stats
    from ..decoding.request import Request
    from ..engine import Engine


COUNTERS = (
    "requests", "cancelled", "failed", "prompt_tokens", "cached_tokens", "generated_tokens", "blocks",
    "denoising_steps", "canvas_positions",
)  # fmt: skip


@dataclass(frozen=True)
class Accepted:
    """The first event of a request: it was prepared and will be generated."""

    prompt_tokens: int
    seed: int


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed."""

    error: Exception  # a DgemmaError is the caller's mistake; `Stopping` means that the scheduler is closing


Event = Accepted | Draft | Block | Finished | Failed


class Busy(Exception):
    """The queue is full."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"The queue is full ({waiting} waiting); retry in {retry_after} s.")
        self.retry_after = retry_after  # seconds


class Stopping(Exception):
    """The scheduler is closing."""

    def __init__(self):
        super().__init__("The server is stopping; ask again later.")


@dataclass(eq=False)
class Ticket:
    """Handle of a submitted request."""

    prepare: Callable[[], Request]
    listener: Callable[[Event], None]
    drafts: bool
    request: Request | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop the request at the next denoising step, without further events. Does nothing if it has ended."""
        self.cancelled.set()


@dataclass(frozen=True)
class Load:
    """State of a scheduler and its counters."""

    running: int
    waiting: int
    counters: dict[str, int]  # totals since the start, by the names in `COUNTERS`
    cache_bytes: int = 0
    cache_entries: int = 0


class Scheduler:
    """Runs submitted requests on its own thread.

    Args:
        engine: a loaded checkpoint, used by this scheduler alone.
        rows: maximum number of requests in a batch.
        waiting: maximum number of requests in the queue.
        cache_bytes: unified memory for the prefix cache; 0 disables it.
        cache_dir: folder that keeps the prefix cache across restarts.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rows: int = 8,
        waiting: int = 64,
        cache_bytes: int = 2**30,
        cache_dir: Path | None = None,
    ):
        # Lazy arrays can only be evaluated on the thread that made them.
        mx.eval([a for module in engine.model.modules() for a in module.values() if isinstance(a, mx.array)])
        self.engine = engine
        self._rows, self._max_waiting = rows, waiting
        folder = None if cache_dir is None else cache_dir / engine.checkpoint.path.name  # one folder for each model
        self._cache = PrefixCache(engine, cache_bytes, folder)
        self._loop = Loop(engine.model, engine.load_seconds)
        self._condition = threading.Condition()
        self._submitted: deque[Ticket] = deque()  # not yet prepared; the condition guards this and the next three
        self._waiting: deque[Ticket] = deque()  # prepared
        self._running: dict[Request, Ticket] = {}
        self._deadline: float | None = None  # in terms of time.monotonic(); set when closing
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._cache_load = self._cache.nbytes, len(self._cache)
        self._request_seconds = 1.0  # moving average of the time that a request takes
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Request], listener: Callable[[Event], None], drafts: bool = False) -> Ticket:
        """Queue a request.

        Args:
            prepare: makes the request; called on the scheduler's thread.
            listener: called with every event on the scheduler's thread: `Accepted`, `Draft`s if `drafts` is true,
                `Block`s, and finally `Finished` or `Failed`. It must not block.
            drafts: whether to send drafts.

        Raises:
            Busy: the queue is full.
            Stopping: `close` was called.
        """
        ticket = Ticket(prepare, listener, drafts)
        with self._condition:
            if self._deadline is not None:
                raise Stopping
            ahead = len(self._submitted) + len(self._waiting)
            if ahead >= self._max_waiting + max(self._rows - len(self._running), 0):
                raise Busy(ahead, max(1, round(self._request_seconds * ahead / self._rows)))
            self._submitted.append(ticket)
            self._condition.notify()
        return ticket

    def load(self) -> Load:
        """Current state and counters. Any thread may call this."""
        with self._condition:
            waiting = len(self._submitted) + len(self._waiting)
            return Load(len(self._running), waiting, dict(self._counters), *self._cache_load)

    def close(self, seconds: float = 0.0) -> None:
        """Refuse new requests, give the others `seconds` to finish, and end the thread."""
        with self._condition:
            self._deadline = time.monotonic() + seconds
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        with device.wired_limit():
            while True:
                self._admit()
                if self._running:
                    self._advance()
                elif not self._idle():
                    break
            while self._cache.save_one():
                pass
        mx.synchronize()
        mx.clear_streams()

    def _idle(self) -> bool:
        """Save one prefix, or wait for a request. Returns false when the scheduler should end."""
        if self._cache.save_one():
            return True
        with self._condition:
            while not self._submitted and self._deadline is None:
                self._condition.wait()
            return bool(self._submitted) or self._deadline is None

    def _admit(self) -> None:
        """Queue new requests, drop cancelled ones, and start requests while rows are free."""
        with self._condition:
            new, late = list(self._submitted)[:1], self._deadline is not None and time.monotonic() >= self._deadline
        for ticket in new:  # at most one, since the running requests wait meanwhile
            self._prepare(ticket)
        for ticket in [*self._waiting, *self._running.values()]:
            if ticket.cancelled.is_set() or late:
                self._cancel(ticket)
                self._notify(ticket, Failed(Stopping()))
        while self._waiting and len(self._running) < self._rows:
            with self._condition:
                ticket = self._waiting.popleft()
                assert ticket.request is not None
                self._running[ticket.request] = ticket
            session, snapshot_at = self._cache.find(ticket.request.prompt.cache_key)
            self._loop.add(ticket.request, session, snapshot_at)

    def _prepare(self, ticket: Ticket) -> None:
        """Prepare a request. It stays in `_submitted` until then, so that it counts as waiting."""
        self._counters["requests"] += 1
        error = None
        try:
            if not ticket.cancelled.is_set():
                ticket.request = ticket.prepare()
                ticket.request.drafts = ticket.drafts
        except Exception as caught:
            error = caught
        with self._condition:
            self._submitted.popleft()
            if ticket.request is not None:
                self._waiting.append(ticket)
        if error is not None:
            self._fail(ticket, error)
        elif ticket.request is not None:
            self._notify(ticket, Accepted(len(ticket.request.prompt.tokens), ticket.request.seed))
        else:
            self._counters["cancelled"] += 1

    def _advance(self) -> None:
        """Compute one step of all running requests."""
        try:
            for request, event in self._loop.step():
                ticket = self._running[request]
                if isinstance(event, Exception):
                    self._remove(request, keep=False)
                    self._fail(ticket, event)
                elif not ticket.cancelled.is_set():  # cancelled requests are dropped before the next step
                    if isinstance(event, Finished):
                        self._count(event.result.stats)
                        self._remove(request)
                    self._notify(ticket, event)
        except Exception as error:  # of the whole batch, so every request in it fails
            for request, ticket in list(self._running.items()):
                self._loop.remove(request)
                self._remove(request, keep=False)
                self._fail(ticket, error)

    def _count(self, stats: Stats) -> None:
        self._request_seconds = 0.8 * self._request_seconds + 0.2 * stats.seconds["total"]
        for name in COUNTERS[3:]:
            attribute = {"cached_tokens": "reused_tokens"}.get(name, name)
            self._counters[name] += getattr(stats, attribute)

    def _cancel(self, ticket: Ticket) -> None:
        assert ticket.request is not None
        self._counters["cancelled"] += 1
        if ticket.request in self._running:
            self._loop.remove(ticket.request)
            self._remove(ticket.request)
        else:
            with self._condition:
                self._waiting.remove(ticket)

    def _remove(self, request: Request, keep: bool = True) -> None:
        """Free the row of a request that has left the loop, and cache what it encoded."""
        with self._condition:
            del self._running[request]
        for session in (request.session.take_snapshot(), request.session) if keep else ():
            try:
                if session is not None:
                    self._cache.put(session)
            except (OSError, RuntimeError) as error:  # MLX raises RuntimeError; the thread must continue
                warnings.warn(f"A prefix could not be kept ({error}); it will be encoded again.", stacklevel=2)
        self._cache_load = self._cache.nbytes, len(self._cache)
        mx.clear_cache()  # buffers of shapes that may not be needed again

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._counters["failed"] += 1
        self._notify(ticket, Failed(error))

    @staticmethod
    def _notify(ticket: Ticket, event: Event) -> None:
        if not ticket.cancelled.is_set():
            ticket.listener(event)
