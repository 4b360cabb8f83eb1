"""Requests together on one thread: who waits, who is denoised, who is told what."""

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
    """The first event of a request that was understood: it will be generated."""

    prompt_tokens: int
    seed: int


@dataclass(frozen=True)
class Failed:
    """The last event of a request that came to nothing."""

    error: Exception  # a DgemmaError is the asker's mistake; `Stopping` where the scheduler closes


Event = Accepted | Draft | Block | Finished | Failed


class Busy(Exception):
    """Too many requests are waiting."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting, which is all that may; try again in {retry_after} s.")
        self.retry_after = retry_after  # seconds


class Stopping(Exception):
    """The scheduler is closing."""

    def __init__(self):
        super().__init__("The server is stopping; ask again later.")


@dataclass(eq=False)
class Ticket:
    """A request's handle."""

    prepare: Callable[[], Request]
    listener: Callable[[Event], None]
    drafts: bool
    request: Request | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop it at the next denoising step; its listener hears nothing more. Harmless when it is over."""
        self.cancelled.set()


@dataclass(frozen=True)
class Load:
    """What a scheduler is doing and has done."""

    running: int
    waiting: int
    counters: dict[str, int]  # `COUNTERS`, since the start
    cache_bytes: int = 0
    cache_entries: int = 0


class Scheduler:
    """Generates what is submitted, on a thread of its own.

    Args:
        engine: a loaded checkpoint; nobody else may use it meanwhile.
        rows: requests denoised together at most.
        waiting: requests that may wait beyond these.
        cache_bytes: unified memory for prefixes of earlier requests; 0 keeps none.
        cache_dir: a folder where they outlive the process.
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
        # What is still lazy could be computed on the thread alone that it was made on.
        mx.eval([a for module in engine.model.modules() for a in module.values() if isinstance(a, mx.array)])
        self.engine = engine
        self._rows, self._most = rows, waiting
        folder = None if cache_dir is None else cache_dir / engine.checkpoint.path.name  # each model has its own
        self._cache = PrefixCache(engine, cache_bytes, folder)
        self._loop = Loop(engine.model, engine.load_seconds)
        self._woken = threading.Condition()
        self._new: deque[Ticket] = deque()  # submitted; guarded by the condition, as are the next three
        self._waiting: deque[Ticket] = deque()  # accepted
        self._running: dict[Request, Ticket] = {}
        self._deadline: float | None = None  # of a clock; closing where there is one
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._kept = self._cache.nbytes, len(self._cache)
        self._seconds = 1.0  # that a request takes, of late
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Request], listener: Callable[[Event], None], drafts: bool = False) -> Ticket:
        """Ask for a generation.

        Args:
            prepare: makes the request; called on the scheduler's thread.
            listener: told every event on the scheduler's thread: `Accepted`, `Draft`s if asked for, `Block`s, and
                `Finished` or `Failed` at last; it must not block.
            drafts: whether drafts are wanted.

        Raises:
            Busy: too many are waiting.
            Stopping: `close` was called.
        """
        ticket = Ticket(prepare, listener, drafts)
        with self._woken:
            if self._deadline is not None:
                raise Stopping
            ahead = len(self._new) + len(self._waiting)
            if ahead >= self._most + max(self._rows - len(self._running), 0):
                raise Busy(ahead, max(1, round(self._seconds * ahead / self._rows)))
            self._new.append(ticket)
            self._woken.notify()
        return ticket

    def load(self) -> Load:
        """What is going on; from any thread."""
        with self._woken:
            waiting = len(self._new) + len(self._waiting)
            return Load(len(self._running), waiting, dict(self._counters), *self._kept)

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, give those that run so much time to finish, and end the thread."""
        with self._woken:
            self._deadline = time.monotonic() + seconds
            self._woken.notify()
        self._thread.join()

    def _work(self) -> None:
        with device.wired_limit():
            while True:
                self._admit()
                if self._running:
                    self._advance()
                elif not self._rest():
                    break
            while self._cache.save_one():
                pass
        mx.synchronize()
        mx.clear_streams()

    def _rest(self) -> bool:
        """Nothing runs: write one prefix, or wait for a request; returns whether to go on."""
        if self._cache.save_one():
            return True
        with self._woken:
            while not self._new and self._deadline is None:
                self._woken.wait()
            return bool(self._new) or self._deadline is None

    def _admit(self) -> None:
        """Take in what was submitted, forget what was cancelled, and start what there is room for."""
        with self._woken:
            new, late = list(self._new)[:1], self._deadline is not None and time.monotonic() >= self._deadline
        for ticket in new:  # no more than one, since the others' canvases wait for it
            self._understand(ticket)
        for ticket in [*self._waiting, *self._running.values()]:
            if ticket.cancelled.is_set() or late:
                self._forget(ticket)
                self._tell(ticket, Failed(Stopping()))
        while self._waiting and len(self._running) < self._rows:
            with self._woken:
                ticket = self._waiting.popleft()
                assert ticket.request is not None
                self._running[ticket.request] = ticket
            session, snapshot_at = self._cache.find(ticket.request.prompt.cache_key)
            self._loop.add(ticket.request, session, snapshot_at)

    def _understand(self, ticket: Ticket) -> None:
        """Prepare what was submitted; until then it is among `_new`, so that it is counted all the while."""
        self._counters["requests"] += 1
        error = None
        try:
            if not ticket.cancelled.is_set():
                ticket.request = ticket.prepare()
                ticket.request.drafts = ticket.drafts
        except Exception as mistake:
            error = mistake
        with self._woken:
            self._new.popleft()
            if ticket.request is not None:
                self._waiting.append(ticket)
        if error is not None:
            self._fail(ticket, error)
        elif ticket.request is not None:
            self._tell(ticket, Accepted(len(ticket.request.prompt.tokens), ticket.request.seed))
        else:
            self._counters["cancelled"] += 1

    def _advance(self) -> None:
        """One step of everything that runs."""
        try:
            for request, event in self._loop.step():
                ticket = self._running[request]
                if isinstance(event, Exception):
                    self._end(request, keep=False)
                    self._fail(ticket, event)
                elif not ticket.cancelled.is_set():  # else it is forgotten before the next step, even at its end
                    if isinstance(event, Finished):
                        self._count(event.result.stats)
                        self._end(request)
                    self._tell(ticket, event)
        except Exception as error:  # of a whole batch: what it did to whom cannot be told
            for request, ticket in list(self._running.items()):
                self._loop.remove(request)
                self._end(request, keep=False)
                self._fail(ticket, error)

    def _count(self, stats: Stats) -> None:
        self._seconds = 0.8 * self._seconds + 0.2 * stats.seconds["total"]
        for name in COUNTERS[3:]:
            told = {"cached_tokens": "reused_tokens"}.get(name, name)
            self._counters[name] += getattr(stats, told)

    def _forget(self, ticket: Ticket) -> None:
        assert ticket.request is not None
        self._counters["cancelled"] += 1
        if ticket.request in self._running:
            self._loop.remove(ticket.request)
            self._end(ticket.request)
        else:
            with self._woken:
                self._waiting.remove(ticket)

    def _end(self, request: Request, keep: bool = True) -> None:
        """A request has left the loop; what it encoded may be of use to others."""
        with self._woken:
            del self._running[request]
        for session in (request.session.take_snapshot(), request.session) if keep else ():
            try:
                if session is not None:
                    self._cache.put(session)
            except (OSError, RuntimeError) as error:  # MLX raises the latter; the thread must go on
                warnings.warn(f"A prefix could not be kept ({error}); it will be encoded again.", stacklevel=2)
        self._kept = self._cache.nbytes, len(self._cache)
        mx.clear_cache()  # buffers of shapes that nobody may ask for again

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._counters["failed"] += 1
        self._tell(ticket, Failed(error))

    @staticmethod
    def _tell(ticket: Ticket, event: Event) -> None:
        if not ticket.cancelled.is_set():
            ticket.listener(event)
