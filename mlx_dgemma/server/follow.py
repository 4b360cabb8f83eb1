"""From the scheduler's thread to asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from ..decoding.events import Block, Draft, Finished
from ..decoding.request import Request
from ..errors import DgemmaError
from ..serving.scheduler import Accepted, Busy, Event, Failed, Scheduler, Stopping
from .errors import ApiError


@asynccontextmanager
async def follow(
    scheduler: Scheduler,
    prepare: Callable[[], Request],
    drafts: bool = False,
    translate: Callable[[Draft | Block | Finished], Any] = lambda event: event,
) -> AsyncIterator[tuple[Accepted, AsyncGenerator[Any]]]:
    """Submit a request: what was accepted, and its events; leaving the context cancels it.

    Args:
        scheduler: runs it.
        prepare: makes it, on the scheduler's thread; raises DgemmaError or ApiError where the request is wrong.
        drafts: whether `Draft`s are wanted.
        translate: makes of each event what is yielded, on the scheduler's thread, where alone arrays and the
            tokenizer may be used; it must be quick.

    Raises:
        ApiError: the request is wrong (400), too many wait (429), the server stops (503).
    """
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[Event, Any]]()

    def listen(event: Event) -> None:
        told = None
        if not isinstance(event, (Accepted, Failed)):
            try:
                told = translate(event)
            except Exception as error:  # it must not end the scheduler's thread
                event = Failed(error)
        with suppress(RuntimeError):  # the loop is closed: nobody hears it, and the scheduler goes on
            loop.call_soon_threadsafe(heard.put_nowait, (event, told))

    async def events() -> AsyncGenerator[Any]:
        event: Event | None = None
        while not isinstance(event, Finished):
            event, told = await heard.get()
            _check(event)
            yield told

    try:
        ticket = scheduler.submit(prepare, listen, drafts)
    except Busy as busy:
        raise ApiError(str(busy), status=429, code="busy", headers={"Retry-After": str(busy.retry_after)}) from None
    except Stopping:
        raise _stopping() from None
    try:
        first, _ = await heard.get()
        _check(first)
        assert isinstance(first, Accepted)
        async with aclosing(events()) as rest:
            yield first, rest
    finally:
        ticket.cancel()


async def follow_all(
    scheduler: Scheduler,
    prepares: Sequence[Callable[[], Request]],
    drafts: bool = False,
    translate: Callable[[Draft | Block | Finished], Any] = lambda event: event,
) -> AsyncGenerator[tuple[int, Any]]:
    """Submit several requests at once: (which, event) as they come, first of each `Accepted`.

    Closing the generator cancels all; so does an error of any, which is raised as `follow` does.
    """
    heard: asyncio.Queue[tuple[int, Any] | Exception | None] = asyncio.Queue()

    async def one(i: int) -> None:
        try:
            async with follow(scheduler, prepares[i], drafts, translate) as (accepted, events):
                heard.put_nowait((i, accepted))
                async for event in events:
                    heard.put_nowait((i, event))
            heard.put_nowait(None)
        except Exception as error:
            heard.put_nowait(error)

    tasks = [asyncio.create_task(one(i)) for i in range(len(prepares))]
    try:
        going = len(tasks)
        while going:
            told = await heard.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                going -= 1
            else:
                yield told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stopping() -> ApiError:
    return ApiError("The server is stopping; ask again later.", status=503, code="stopping")


def _check(event: Event) -> None:
    if isinstance(event, Failed):
        if isinstance(event.error, DgemmaError):
            raise ApiError(str(event.error)) from None
        raise _stopping() if isinstance(event.error, Stopping) else event.error
