"""The scheduler: cancelled requests and closing."""

import gc
import threading
import time
import weakref

import pytest
from listeners import LIMIT, Listener, alone, ask, load_of, tokens_of, told, until
from loop import tiny_request

from mlx_dgemma.decoding.events import Block, Draft
from mlx_dgemma.decoding.session import Session
from mlx_dgemma.errors import PromptError
from mlx_dgemma.serving.scheduler import COUNTERS, Accepted, Failed, Stopping

one_row = pytest.mark.parametrize("tiny_scheduler", [{"rows": 1, "waiting": 3}], indirect=True)


@one_row
@pytest.mark.parametrize("accepted", [False, True])
def test_who_is_cancelled_while_waiting_hears_nothing_more(tiny_scheduler, accepted):
    first = ask(tiny_scheduler, 1, Block, Block)
    first.wait()
    second, third = ask(tiny_scheduler, 2), ask(tiny_scheduler, 3)
    if accepted:
        first.go_on()
        first.wait()
    assert load_of(tiny_scheduler) == (1, 2)
    second.ticket.cancel()
    for _ in range(2 - accepted):
        first.go_on()
    assert [told(first.last), told(third.last)] == [alone(1), alone(3)]
    assert second.kinds == [Accepted] * accepted
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert {name: tiny_scheduler.load().counters[name] for name in COUNTERS[:3]} == {
        "requests": 3,
        "cancelled": 1,
        "failed": 0,
    }


def test_who_is_cancelled_while_prepared_hears_nothing(tiny_scheduler):
    listener, submitted = Listener(), threading.Event()
    first = ask(tiny_scheduler, 1, Accepted)
    first.wait()

    def prepare():
        assert submitted.wait(LIMIT)
        tickets[0].cancel()
        return tiny_request(tokens_of(2))

    def mistaken():
        assert submitted.wait(LIMIT)
        tickets[1].cancel()
        raise PromptError("nobody hears this")

    tickets = [tiny_scheduler.submit(prepare, listener), tiny_scheduler.submit(mistaken, listener)]
    submitted.set()
    first.go_on()
    assert told(first.last) == alone(1)
    assert told(ask(tiny_scheduler, 3).last) == alone(3)
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert listener.kinds == []
    assert [tiny_scheduler.load().counters[name] for name in COUNTERS[:3]] == [4, 2, 0]


def test_who_is_cancelled_while_encoded_hears_nothing_more(tiny_scheduler, monkeypatch):
    encode, encoded = Session.encode, Listener(int)

    def watched(session, *arguments):
        for chunk in encode(session, *arguments):
            encoded(session.prefix.offset)
            yield chunk

    monkeypatch.setattr(Session, "encode", watched)
    listener = ask(tiny_scheduler, 1, prefill_chunk=4)
    encoded.wait()
    assert load_of(tiny_scheduler) == (1, 0)
    listener.ticket.cancel()
    encoded.go_on()
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert (encoded.events, listener.kinds) == ([4], [Accepted])
    assert tiny_scheduler.load().counters["cancelled"] == 1
    assert told(ask(tiny_scheduler, 2).last) == alone(2)


@pytest.mark.parametrize("when", [Draft, Block])
def test_who_is_cancelled_while_denoised_hears_nothing_more_and_is_let_go(tiny_scheduler, when):
    listener, other = ask(tiny_scheduler, 1, when, drafts=True), ask(tiny_scheduler, 2)
    listener.wait()
    assert load_of(tiny_scheduler)[0] >= 1
    prefix = weakref.ref(listener.ticket.request.session.prefix)
    heard = len(listener.events)
    listener.ticket.cancel()
    listener.go_on()
    assert told(other.last) == alone(2)
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert len(listener.events) == heard
    assert listener.kinds[-1] is when
    counters = tiny_scheduler.load().counters
    assert [counters[name] for name in COUNTERS[:3]] == [2, 1, 0]
    assert counters["generated_tokens"] == len(alone(2)[0])  # of those who were told
    assert tiny_scheduler._loop.requests == []
    del listener
    gc.collect()
    assert prefix() is None


def test_who_is_cancelled_at_the_last_block_hears_no_end(tiny_scheduler):
    listener = ask(tiny_scheduler, 1, Block, Block)
    for _ in range(2):
        listener.wait()
        if not listener.stops:
            listener.ticket.cancel()
        listener.go_on()
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert listener.kinds == [Accepted, Block, Block]
    assert [tiny_scheduler.load().counters[name] for name in COUNTERS[:3]] == [1, 1, 0]
    listener.ticket.cancel()  # harmless


@one_row
def test_closing_at_once_tells_everyone(tiny_scheduler):
    running = ask(tiny_scheduler, 1, Block)
    running.wait()
    waiting, cancelled = ask(tiny_scheduler, 2), ask(tiny_scheduler, 3)
    cancelled.ticket.cancel()
    closing = threading.Thread(target=tiny_scheduler.close)
    closing.start()
    until(lambda: tiny_scheduler._deadline is not None)
    with pytest.raises(Stopping, match=r"^The server is stopping; ask again later\.$"):
        ask(tiny_scheduler, 4)
    running.go_on()
    closing.join(LIMIT)
    assert not tiny_scheduler._thread.is_alive()
    for listener, kinds in ((running, [Accepted, Block, Failed]), (waiting, [Accepted, Failed])):
        assert isinstance(listener.last.error, Stopping)
        assert listener.kinds == kinds
    assert cancelled.kinds == []
    assert load_of(tiny_scheduler) == (0, 0)
    with pytest.raises(Stopping):
        ask(tiny_scheduler, 4)
    tiny_scheduler.close()  # again is harmless


@one_row
def test_closing_gives_the_running_time_to_finish_and_refuses_the_queued_at_once(tiny_scheduler):
    running, go_on = ask(tiny_scheduler, 1, Block, Block), threading.Event()
    running.wait()
    waiting, unprepared = ask(tiny_scheduler, 2), Listener()
    until(lambda: tiny_scheduler._prepared)
    tiny_scheduler.submit(lambda: go_on.wait(LIMIT), unprepared)
    closing = threading.Thread(target=tiny_scheduler.close, args=(LIMIT,))
    closing.start()
    until(lambda: tiny_scheduler._deadline is not None)
    running.go_on()
    running.wait()  # still running
    assert [type(one.last.error) for one in (waiting, unprepared)] == [Stopping] * 2
    assert (waiting.kinds, unprepared.kinds) == ([Accepted, Failed], [Failed])
    running.go_on()
    closing.join(LIMIT)
    assert told(running.last) == alone(1)
    go_on.set()  # what is still being prepared hurts nobody


def test_the_time_to_finish_ends(tiny_scheduler):
    endless = ask(tiny_scheduler, 1, Block)
    endless.wait()
    closing = threading.Thread(target=tiny_scheduler.close, args=(0.05,))
    closing.start()
    until(lambda: tiny_scheduler._deadline is not None and time.monotonic() > tiny_scheduler._deadline)
    endless.go_on()
    closing.join(LIMIT)
    assert isinstance(endless.last.error, Stopping)
