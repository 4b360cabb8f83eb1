"""Threads that prepare requests: messages are rendered and tokenized, pictures decoded, constraints become automata.

A few requests compute at a time, since Python runs one thread at a time and the scheduler's must not wait for many. The
slow parts have lanes of their own, in which a request holds up only those that need the same: pictures are decoded one
after another, for each may take a gigabyte, and automata are made by other processes. Both leave the processor to the
steps where there is not enough for all.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any, TypeVar

from ..constraints.language import Language
from ..constraints.tokens import TokenBytes
from ..errors import as_exception
from ..prompt.lanes import LANES, Lanes
from .automata import Automata, Cancelled
from .automaton_worker import NICENESS
from .process_memory import Trimmer
from .tickets import Ticket

T = TypeVar("T")
SLOTS = 2  # requests that compute at a time


class Preparation:
    """Prepares requests in the order in which they come, each in a thread of its own that ends with it.

    Args:
        done: called with a ticket, in any thread, when its `request` or `error` is set or it was cancelled.
        slots: how many requests compute at a time.
        automata: makes the languages.
    """

    def __init__(self, done: Callable[[Ticket], None], slots: int = SLOTS, automata: Automata | None = None):
        self._done, self.automata = done, automata or Automata()
        self._condition = threading.Condition()  # guards the next four
        self._queue: deque[Ticket] = deque()
        self._free, self._returning, self._closed = slots, 0, False
        # One thread for all pictures: each thread's memory allocator keeps what it freed.
        self.pictures = ThreadPoolExecutor(1, "pictures", initializer=_run_behind)
        self._trimmer = Trimmer()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Those that were cancelled while they waited are dropped."""
        with self._condition:
            dropped = [one for one in self._queue if one.cancelled.is_set()]
            self._queue = deque(one for one in self._queue if one not in dropped)
            self._queue.append(ticket)
            failed = self._start()
        for one in (*dropped, *failed):
            self._done(one)

    def close(self) -> None:
        """Forget what waits, and end the processes. What computes at this moment ends by itself."""
        with self._condition:
            self._closed = True
            self._queue.clear()
        self.pictures.shutdown(wait=False, cancel_futures=True)
        self.automata.close()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Let another request compute while this one waits in a lane."""
        self._leave()
        try:
            yield
        finally:
            with self._condition:
                self._returning += 1
                self._condition.wait_for(lambda: self._free > 0)
                self._returning -= 1
                self._free -= 1

    def _leave(self) -> None:
        with self._condition:
            self._free += 1
            failed = self._start()
            self._condition.notify_all()
        for one in failed:
            self._done(one)

    def _start(self) -> list[Ticket]:
        """Start threads while slots are free; returns the tickets whose thread the system refused."""
        failed = []
        while self._queue and self._free > self._returning:
            ticket = self._queue.popleft()
            try:
                threading.Thread(target=self._run, args=(ticket,), name="prepare", daemon=True).start()
                self._free -= 1
            except RuntimeError as error:
                ticket.error = error
                failed.append(ticket)
        return failed

    def _run(self, ticket: Ticket) -> None:
        LANES.set(_RequestLanes(self, ticket))
        try:
            if not ticket.cancelled.is_set():
                request = ticket.prepare()
                request.drafts = ticket.drafts
                ticket.request = request
        except BaseException as error:  # a panic of the tokenizer is no Exception
            ticket.error = as_exception(error)
        finally:
            self._leave()
        self._done(ticket)
        self._trimmer.trim()


class _RequestLanes(Lanes):
    """The lanes of one request."""

    def __init__(self, preparation: Preparation, ticket: Ticket):
        self._preparation, self._ticket = preparation, ticket

    def language(self, kind: str, source: Any, token_bytes: TokenBytes, what: str) -> Language:
        with self._preparation.elsewhere():
            stop = self._ticket.cancelled.is_set
            return self._preparation.automata.make(kind, source, token_bytes, what, stop)

    def picture(self, decode: Callable[[], T]) -> T:
        def decode_if_wanted() -> T:
            if self._ticket.cancelled.is_set():
                raise Cancelled
            return decode()

        with self._preparation.elsewhere():
            return self._preparation.pictures.submit(copy_context().run, decode_if_wanted).result()

    def wait(self, call: Callable[[], T]) -> T:
        with self._preparation.elsewhere():
            return call()


def _run_behind() -> None:
    """Let this thread run behind the steps, where threads have a priority of their own: Linux alone has that."""
    with suppress(OSError):
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
