"""From the scheduler's thread to asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from ..errors import DgemmaError
from ..generate import Block, Draft, Finished
from ..schedule import Accepted, Busy, Event, Failed, Scheduler, Stopping
from ..session import Job
from .errors import ApiError


@asynccontextmanager
async def follow(
    scheduler: Scheduler, prepare: Callable[[], Job], drafts: bool = False
) -> AsyncIterator[tuple[Accepted, AsyncGenerator[Draft | Block | Finished]]]:
    """Submit a request: what was accepted, and its events; leaving the context cancels it.

    Args:
        scheduler: runs it.
        prepare: makes the job, on the scheduler's thread; raises DgemmaError or ApiError where the request is wrong.
        drafts: whether `Draft`s are wanted.

    Raises:
        ApiError: the request is wrong (400), too many wait (429), the server stops (503).
    """
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def listen(event: Event) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, event)

    async def events() -> AsyncGenerator[Draft | Block | Finished]:
        while True:
            event = _checked(await heard.get())
            if not isinstance(event, Accepted):
                yield event
            if isinstance(event, Finished):
                return

    try:
        ticket = scheduler.submit(prepare, listen, drafts)
    except Busy as busy:
        raise ApiError(str(busy), status=429, code="busy", headers={"Retry-After": str(busy.retry_after)}) from None
    except Stopping as stopping:
        raise ApiError(str(stopping), status=503, code="stopping") from None
    try:
        first = _checked(await heard.get())
        assert isinstance(first, Accepted)
        async with aclosing(events()) as rest:
            yield first, rest
    finally:
        ticket.cancel()


def _checked(event: Event) -> Accepted | Draft | Block | Finished:
    if isinstance(event, Failed):
        if isinstance(event.error, ApiError):
            raise event.error
        if isinstance(event.error, DgemmaError):
            raise ApiError(str(event.error)) from None
        if isinstance(event.error, Stopping):
            raise ApiError("The server is stopping; ask again later.", status=503, code="stopping") from None
        raise event.error
    return event
