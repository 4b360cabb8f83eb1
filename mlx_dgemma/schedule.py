"""Requests together on one thread: who waits, who is denoised, who is told what."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .generate import Block, Draft, Finished

if TYPE_CHECKING:
    from .engine import Engine
    from .session import Job


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


@dataclass
class Ticket:
    """A request's handle."""

    prepare: Callable[[], Job]
    listener: Callable[[Event], None]
    drafts: bool
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop it at the next denoising step; its listener hears nothing more. Harmless when it is over."""
        self.cancelled.set()


@dataclass(frozen=True)
class Load:
    """What a scheduler is doing and has done."""

    running: int
    waiting: int
    counters: dict[str, int]  # since the start: requests, cancelled, failed, prompt_tokens, cached_tokens,
    # generated_tokens, blocks, denoising_steps, canvas_positions
    cache_bytes: int = 0
    cache_entries: int = 0


class Scheduler:
    """Generates what is submitted, on a thread of its own.

    Args:
        engine: a loaded checkpoint; nobody else may use it meanwhile.
        rows: requests denoised together at most.
        waiting: requests that may wait beyond these.
    """

    def __init__(self, engine: Engine, *, rows: int = 8, waiting: int = 64):
        self.engine = engine
        self._rows, self._most = rows, waiting
        self._tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._counters = dict.fromkeys(
            ("requests", "cancelled", "failed", "prompt_tokens", "cached_tokens", "generated_tokens", "blocks",
             "denoising_steps", "canvas_positions"), 0)  # fmt: skip
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Job], listener: Callable[[Event], None], drafts: bool = False) -> Ticket:
        """Ask for a generation.

        Args:
            prepare: makes the job; called on the scheduler's thread.
            listener: told every event on the scheduler's thread: `Accepted`, `Draft`s if asked for, `Block`s, and
                `Finished` or `Failed` at last; it must not block.
            drafts: whether drafts are wanted.

        Raises:
            Busy: too many are waiting.
            Stopping: `close` was called.
        """
        ticket = Ticket(prepare, listener, drafts)
        self._tickets.put(ticket)
        return ticket

    def load(self) -> Load:
        """What is going on; from any thread."""
        return Load(0, self._tickets.qsize(), dict(self._counters))

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, give those that run so much time to finish, and end the thread."""
        self._tickets.put(None)
        self._thread.join()

    def _work(self) -> None:
        while ticket := self._tickets.get():
            self._counters["requests"] += 1
            try:
                job = ticket.prepare()
                ticket.listener(Accepted(len(job.row.tokens), job.row.seed))
                for event in self.engine.run(job, drafts=ticket.drafts):
                    if ticket.cancelled.is_set():
                        break
                    ticket.listener(event)
            except Exception as error:
                ticket.listener(Failed(error))
