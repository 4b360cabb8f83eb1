"""Bridge from the scheduler's thread to asyncio: submit requests and receive their events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from ..decoding.events import Block, Draft, Finished
from ..decoding.request import Request
from ..errors import DgemmaError, RangeError
from ..serving.scheduler import Accepted, Busy, Event, Failed, Scheduler, Stopping
from .errors import ApiError


@asynccontextmanager
async def follow(
    scheduler: Scheduler,
    prepare: Callable[[], Request],
    drafts: bool = False,
    translate: Callable[[Draft | Block | Finished], Any] = lambda event: event,
) -> AsyncIterator[tuple[Accepted, AsyncGenerator[Any]]]:
    """Submit a request. Yields its `Accepted` event and a generator of the later ones; leaving the context cancels it.

    Args:
        scheduler: runs the request.
        prepare: makes the request on the scheduler's thread; raises DgemmaError or ApiError if the request is wrong.
        drafts: whether to yield `Draft`s.
        translate: turns each event into the value to yield. It runs on the scheduler's thread, the only one that may
            use arrays and the tokenizer, and must be quick.

    Raises:
        ApiError: the request is wrong (400), the queue is full (429), or the server is stopping (503).
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[Event, Any]]()

    def listen(event: Event) -> None:
        translated = None
        if not isinstance(event, (Accepted, Failed)):
            try:
                translated = translate(event)
            except Exception as error:  # must not end the scheduler's thread
                event = Failed(error)
        with suppress(RuntimeError):  # the event loop is closed, so nobody waits for the event
            loop.call_soon_threadsafe(queue.put_nowait, (event, translated))

    async def events() -> AsyncGenerator[Any]:
        event: Event | None = None
        while not isinstance(event, Finished):
            event, translated = await queue.get()
            _raise_failure(event)
            yield translated

    try:
        ticket = scheduler.submit(prepare, listen, drafts)
    except Busy as busy:
        raise ApiError(str(busy), status=429, code="busy", headers={"Retry-After": str(busy.retry_after)}) from None
    except Stopping:
        raise _stopping_error() from None
    try:
        first, _ = await queue.get()
        _raise_failure(first)
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
    """Submit several requests together and yield (index, event) as events arrive, beginning with each `Accepted`.

    Closing the generator cancels all requests. So does an error of any of them, which is raised as in `follow`.
    """
    queue: asyncio.Queue[tuple[int, Any] | Exception | None] = asyncio.Queue()

    async def one(i: int) -> None:
        try:
            async with follow(scheduler, prepares[i], drafts, translate) as (accepted, events):
                queue.put_nowait((i, accepted))
                async for event in events:
                    queue.put_nowait((i, event))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(one(i)) for i in range(len(prepares))]
    try:
        unfinished = len(tasks)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stopping_error() -> ApiError:
    return ApiError("The server is stopping; ask again later.", status=503, code="stopping")


def _raise_failure(event: Event) -> None:
    if isinstance(event, Failed):
        if isinstance(event.error, RangeError):  # not the request's fault
            raise ApiError(str(event.error), status=500, code="range") from None
        if isinstance(event.error, DgemmaError):
            raise ApiError(str(event.error)) from None
        raise _stopping_error() if isinstance(event.error, Stopping) else event.error
