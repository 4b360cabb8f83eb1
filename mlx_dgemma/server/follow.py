"""Bridge from the scheduler's thread to asyncio: submit requests and receive their events."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..decoding.events import Block, Draft, Finished
from ..decoding.request import Request
from ..errors import DgemmaError, RangeError
from ..serving.scheduler import Busy, Event, Failed, Scheduler, Stopping
from ..serving.tickets import Lost
from .errors import ApiError


async def follow(
    scheduler: Scheduler,
    prepares: Sequence[Callable[[], Request]],
    drafts: bool = False,
    translate: Callable[[Draft | Block | Finished], Any] = lambda event: event,
    observe: Callable[[float, Event], None] = lambda seconds, event: None,
) -> AsyncGenerator[tuple[int, Any]]:
    """Submit requests together and yield (index, event) as events arrive, beginning with each `Accepted`.

    Closing the generator cancels all requests. So does an error of any of them.

    Args:
        scheduler: runs the requests.
        prepares: make the requests on a thread of the scheduler's; they raise DgemmaError or ApiError if a request is
            wrong.
        drafts: whether to yield `Draft`s.
        translate: turns each event into the value to yield. It runs on the scheduler's thread, the only one that may
            use arrays, and must be quick.
        observe: told of every event when it comes, with the seconds since the requests were submitted.

    Raises:
        ApiError: a request is wrong (400), the queue is full (429), or the server is stopping (503).
    """
    loop, started, arrived = asyncio.get_running_loop(), time.monotonic(), asyncio.Event()
    waiting: deque[tuple[int, Event, Any]] = deque()  # for the client to take them

    def take(i: int, event: Event, translated: Any, seconds: float) -> None:
        nonlocal waiting
        observe(seconds, event)
        if isinstance(event, Draft):  # of an answer's drafts only the newest waits
            waiting = deque(one for one in waiting if one[0] != i or not isinstance(one[1], Draft))
        waiting.append((i, event, translated))
        arrived.set()

    def listen(i: int, event: Event) -> None:
        translated: Any = event
        if isinstance(event, (Draft, Block, Finished)):
            try:
                translated = translate(event)
            except Exception as error:  # must not end the scheduler's thread
                event = Failed(error)
        with suppress(RuntimeError):  # the event loop is closed, so nobody waits for the event
            loop.call_soon_threadsafe(take, i, event, translated, time.monotonic() - started)

    tickets = []
    try:
        for i, prepare in enumerate(prepares):
            tickets.append(scheduler.submit(prepare, partial(listen, i), drafts))
        unfinished = len(tickets)
        while unfinished:
            while not waiting:
                arrived.clear()
                await arrived.wait()
            i, event, translated = waiting.popleft()
            if isinstance(event, Failed):
                raise _api_error(event.error) from None
            unfinished -= isinstance(event, Finished)
            yield i, translated
    except (Busy, Stopping) as error:
        raise _api_error(error) from None
    finally:
        for ticket in tickets:
            ticket.cancel()


def _api_error(error: Exception) -> Exception:
    if isinstance(error, Busy):
        return ApiError(str(error), status=429, code="busy", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, Lost):
        return ApiError(str(error), status=503, code="stopping")
    if isinstance(error, Stopping):
        return ApiError("The server is stopping; ask again later.", status=503, code="stopping")
    if isinstance(error, RangeError):  # not the request's fault
        return ApiError(str(error), status=500, code="range")
    return ApiError(str(error)) if isinstance(error, DgemmaError) else error
