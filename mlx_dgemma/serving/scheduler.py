"""Continuous batching on one thread: a queue of requests, the running batch, and events for the callers.

Requests are prepared by other threads, so that this one does nothing but compute. Whatever an exception comes from, it
ends one request, or all that run where the batch itself fails, but never the thread.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..decoding.events import Finished
from ..errors import as_exception
from ..model import device
from .prefix_cache import PrefixCache
from .preparation import Preparation
from .tickets import COUNTERS, Accepted, Broken, Busy, Event, Failed, Health, Load, Lost, Stopping, Ticket

if TYPE_CHECKING:
    from ..decoding.events import Stats
    from ..decoding.request import Request
    from ..decoding.session import Session
    from ..engine import Engine


class Scheduler:
    """Prepares submitted requests on a few threads and runs them on one.

    Args:
        engine: a loaded checkpoint, used by this scheduler alone.
        rows: maximum number of requests in a batch.
        waiting: maximum number of requests in the queue.
        cache_bytes: unified memory for the prefix cache; 0 disables it.
        cache_dir: folder that keeps the prefix cache across restarts.
        make_cache: makes the prefix cache of an engine, its bytes and its folder.

    Attributes:
        engine: the checkpoint.
        on_death: called once, on the scheduler's thread, if that ends by an error.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        rows: int = 8,
        waiting: int = 64,
        cache_bytes: int = 2**30,
        cache_dir: Path | None = None,
        make_cache: Callable[[Engine, int, Path | None], PrefixCache] = PrefixCache,
    ):
        # Lazy arrays can only be evaluated on the thread that made them.
        mx.eval([a for module in engine.model.modules() for a in module.values() if isinstance(a, mx.array)])
        self.engine = engine
        self.on_death: Callable[[], None] = lambda: None
        self._rows, self._max_waiting = rows, waiting
        folder = None if cache_dir is None else cache_dir / engine.checkpoint.path.name  # one folder for each model
        self._cache = make_cache(engine, cache_bytes, folder)
        self._loop = engine.loop()
        self._condition = threading.Condition()
        self._preparing: dict[Ticket, None] = {}  # in their order; the condition guards this and the next five
        self._prepared: deque[Ticket] = deque()  # of them, those that this thread has not looked at
        self._waiting: deque[Ticket] = deque()  # for a free row
        self._running: dict[Request, Ticket] = {}
        self._deadline: float | None = None  # in terms of time.monotonic(); set when closing
        self._broken: Broken | None = None
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._cache_load = self._cache.nbytes, len(self._cache)
        self._request_seconds = 1.0  # moving average of the time that a request takes
        self._pass_began: float | None = None  # None while there is nothing to do
        self._preparation = Preparation(self._take_prepared)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Request], listener: Callable[[Event], None], drafts: bool = False) -> Ticket:
        """Queue a request.

        Args:
            prepare: makes the request; called on another thread, so it must not use arrays.
            listener: called with every event on the scheduler's thread: `Accepted`, `Draft`s if `drafts` is true,
                `Block`s, and finally `Finished` or `Failed`. It must not block; if it raises, the request is cancelled.
            drafts: whether to send drafts.

        Raises:
            Busy: the queue is full.
            Stopping: `close` was called; `Broken` if the scheduler's thread has died.
        """
        ticket = Ticket(prepare, listener, drafts)
        with self._condition:
            if self._broken is not None:
                raise self._broken
            if self._deadline is not None:
                raise Stopping
            ahead = sum(not one.cancelled.is_set() for one in (*self._preparing, *self._waiting))
            if ahead >= self._max_waiting + max(self._rows - len(self._running), 0):
                raise Busy(ahead, max(1, round(self._request_seconds * ahead / self._rows)))
            self._preparing[ticket] = None
            self._counters["requests"] += 1
        self._preparation.submit(ticket)
        return ticket

    def load(self) -> Load:
        """Current state and counters. Any thread may call this."""
        with self._condition:
            waiting = len(self._preparing) + len(self._waiting)
            return Load(len(self._running), waiting, dict(self._counters), *self._cache_load)

    def health(self) -> Health:
        """Whether the scheduler gets on. Any thread may call this, and it never waits for a step."""
        began = self._pass_began
        return Health(self._thread.is_alive(), 0.0 if began is None else time.monotonic() - began)

    @property
    def broken(self) -> Broken | None:
        """What the scheduler's thread has died of, or None."""
        return self._broken

    def give_up(self, sentence: str) -> None:
        """Tell all requests why they end, and take no more; any thread may call this while a step hangs."""
        with self._condition:
            self._broken = Lost(sentence)
        self._refuse_all(self._broken)

    def close(self, seconds: float = 0.0) -> None:
        """Refuse new and queued requests, give the running ones `seconds` to finish, and end the threads."""
        with self._condition:
            self._deadline = time.monotonic() + seconds
            self._condition.notify()
        self._preparation.close()
        self._thread.join()

    def _take_prepared(self, ticket: Ticket) -> None:
        """A request has been prepared, or could not be. Other threads call this."""
        with self._condition:
            if ticket in self._preparing:
                self._prepared.append(ticket)
                self._condition.notify()

    def _run(self) -> None:
        try:
            with device.wired_limit(self.engine.model.low_memory):
                while self._pass():
                    pass
                while self._save_one():
                    pass
        except BaseException as error:
            with self._condition:
                self._broken = Broken(error)
            warn(str(self._broken))
        try:
            self._refuse_all(self._broken or Stopping())
            if self._broken is not None:
                self._preparation.close()
                self.on_death()
        finally:
            self._pass_began = None
            mx.synchronize()
            mx.clear_streams()

    def _refuse_all(self, error: Exception) -> None:
        with self._condition:
            tickets = [*self._preparing, *self._waiting, *self._running.values()]
            for group in (self._preparing, self._prepared, self._waiting, self._running):
                group.clear()
        for ticket in tickets:
            self._notify(ticket, Failed(error))

    def _pass(self) -> bool:
        """Admit what was prepared, and compute one step. Returns whether there is more to do."""
        self._pass_began = time.monotonic()
        self._answer_prepared()
        self._drop()
        self._admit()
        if self._running:
            self._advance()
            return True
        return self._save_one() or self._wait()

    def _wait(self) -> bool:
        """Wait for a request. Returns false when the scheduler should end."""
        with self._condition:
            self._pass_began = None
            self._condition.wait_for(lambda: self._prepared or self._deadline is not None)
            return bool(self._preparing) or self._deadline is None

    def _answer_prepared(self) -> None:
        """Queue the requests that were prepared, and tell why others could not be."""
        with self._condition:
            tickets = [one for one in self._prepared if one in self._preparing]
            self._prepared.clear()
            for ticket in tickets:
                del self._preparing[ticket]
                if ticket.request is not None:
                    self._waiting.append(ticket)
                else:
                    self._counters["cancelled" if ticket.cancelled.is_set() else "failed"] += 1
        for ticket in tickets:
            if ticket.request is None:
                error, ticket.error = ticket.error, None  # its traceback knows the ticket: else both wait for the gc
                self._notify(ticket, Failed(error or Stopping()))
            else:
                self._notify(ticket, Accepted(len(ticket.request.prompt.tokens), ticket.request.seed))

    def _drop(self) -> None:
        """Drop cancelled requests; once the scheduler closes also queued ones, and all when its time is over."""
        with self._condition:
            late = self._deadline is not None and time.monotonic() >= self._deadline
            queued = [*self._waiting, *(self._preparing if self._deadline is not None else ())]
            tickets = [one for one in queued if one.cancelled.is_set() or self._deadline is not None]
            for ticket in tickets:
                self._preparing.pop(ticket, None)
                self._counters["cancelled"] += 1
            self._waiting = deque(one for one in self._waiting if one not in tickets)
            running = [one for one in self._running.items() if one[1].cancelled.is_set() or late]
        for request, ticket in running:
            with self._all_fail_if_this_does():
                self._loop.remove(request)
            if request in self._running:
                self._remove(request, "cancelled")
                self._keep(request)
                tickets.append(ticket)
        for ticket in tickets:
            self._notify(ticket, Failed(Stopping()))

    def _admit(self) -> None:
        """Start requests while rows are free."""
        while self._waiting and len(self._running) < self._rows:
            with self._condition:
                ticket = self._waiting.popleft()
                request = ticket.request
                assert request is not None
                self._running[request] = ticket
            try:
                self._loop.add(request, *self._find(request))
            except BaseException as error:
                with self._all_fail_if_this_does():
                    self._loop.remove(request)
                if request in self._running:
                    self._remove(request, "failed")
                    self._notify(ticket, Failed(as_exception(error)))

    def _find(self, request: Request) -> tuple[Session | None, int]:
        try:
            return self._cache.find(request.prompt.cache_key)
        except BaseException as error:
            warn(f"The prefix cache could not be read ({error}); the prompt will be encoded whole.")
            return None, 0

    def _advance(self) -> None:
        """Compute one step of all running requests."""
        with self._all_fail_if_this_does():
            for request, event in self._loop.step():
                ticket = self._running[request]
                if isinstance(event, Exception):
                    self._remove(request, "failed")
                    self._notify(ticket, Failed(event))
                    mx.clear_cache()
                elif not ticket.cancelled.is_set():  # cancelled requests are dropped before the next step
                    if isinstance(event, Finished):
                        self._count(event.result.stats)
                        self._remove(request)
                    self._notify(ticket, event)
                    if isinstance(event, Finished):
                        self._keep(request)

    @contextmanager
    def _all_fail_if_this_does(self) -> Iterator[None]:
        """After an error of the batch nothing is known of it: all that run fail, and a new loop goes on."""
        try:
            yield
        except BaseException as caught:
            error, running = as_exception(caught), list(self._running.items())
            with suppress(BaseException):
                self._loop.close()
            self._loop = self.engine.loop()
            for request, ticket in running:
                self._remove(request, "failed")
                self._notify(ticket, Failed(error))
            with suppress(BaseException):
                mx.clear_cache()

    def _count(self, stats: Stats) -> None:
        self._request_seconds = 0.8 * self._request_seconds + 0.2 * stats.seconds["total"]
        for name in COUNTERS[3:]:
            attribute = {"cached_tokens": "reused_tokens"}.get(name, name)
            self._counters[name] += getattr(stats, attribute)

    def _remove(self, request: Request, counter: str | None = None) -> None:
        """Free the row of a request that has left the loop, and count it."""
        with self._condition:
            del self._running[request]
            if counter is not None:
                self._counters[counter] += 1

    def _keep(self, request: Request) -> None:
        """Cache what a request has encoded."""
        try:
            self._cache.keep(request)
            self._cache_load = self._cache.nbytes, len(self._cache)
            mx.clear_cache()  # buffers of shapes that may not be needed again
        except BaseException as error:
            warn(f"A prefix could not be kept ({error}); it will be encoded again.")

    def _save_one(self) -> bool:
        """Write one prefix to the cache's folder. Returns whether more are left."""
        try:
            return self._cache.save_one()
        except BaseException as error:
            warn(f"A prefix could not be written ({error}); it will be encoded again after a restart.")
            return False

    @staticmethod
    def _notify(ticket: Ticket, event: Event) -> None:
        """Tell a caller; one that raises hears nothing more."""
        if ticket.cancelled.is_set():
            return
        try:
            ticket.listener(event)
        except BaseException as error:
            ticket.cancel()
            warn(f"A listener of the scheduler raised {type(error).__name__} ({error}); its request is dropped.")


def warn(text: str) -> None:
    """Warn, even where warnings are made errors: the scheduler's thread must go on."""
    with suppress(Warning):
        warnings.warn(text, stacklevel=3)
