"""What a scheduler's callers see: a ticket for each request, the events that they hear, and the scheduler's state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ..decoding.events import Block, Draft, Finished
from ..decoding.request import Request

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

    def __init__(self, message: str = "The server is stopping; ask again later."):
        super().__init__(message)


class Broken(Stopping):
    """The scheduler's thread has died, so no request will be generated any more."""

    def __init__(self, error: BaseException):
        super().__init__(
            f"The scheduler has failed ({type(error).__name__}: {error}), so nothing is generated any more; "
            "start the server again."
        )


class Lost(Broken):
    """Another process that computes the model with this one is gone."""

    def __init__(self, sentence: str):
        Stopping.__init__(self, f"{sentence} The server ends; ask again when it has been started anew.")


@dataclass(eq=False)
class Ticket:
    """Handle of a submitted request."""

    prepare: Callable[[], Request]
    listener: Callable[[Event], None]
    drafts: bool
    request: Request | None = None  # once it is prepared
    error: Exception | None = None  # what preparing it raised
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


@dataclass(frozen=True)
class Health:
    """Whether the scheduler's thread is alive and gets on."""

    alive: bool
    seconds_since_pass: float  # since it last began a pass over its requests; 0 where it has nothing to do
