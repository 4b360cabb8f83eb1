"""The scheduler's thread outlives every exception; what it cannot outlive is told."""

import threading
from types import SimpleNamespace

import pytest
from listeners import LIMIT, Listener, alone, ask, load_of, tokens_of, told, until
from loop import tiny_engine, tiny_request

from mlx_dgemma.decoding.events import Block, Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.serving.prefix_cache import PrefixCache
from mlx_dgemma.serving.scheduler import Scheduler
from mlx_dgemma.serving.tickets import Accepted, Broken, Failed, Stopping

pytestmark = pytest.mark.filterwarnings("ignore:A prefix could not:UserWarning", "ignore:The prefix cache:UserWarning")


class Panic(BaseException):
    """As a library in Rust raises it: not an Exception."""


@pytest.fixture
def scheduler():
    one = Scheduler(tiny_engine(), rows=2)
    yield one
    one.close()


def fails_alone(scheduler, first):
    """The first request has ended; the next one is answered as ever, by the same thread."""
    until(lambda: load_of(scheduler) == (0, 0))
    assert told(ask(scheduler, 2).last) == alone(2)
    assert scheduler.health().alive
    assert scheduler.broken is None
    assert sum(isinstance(event, Finished | Failed) for event in first.events) <= 1


PLACES = [(PrefixCache, "find"), (PrefixCache, "put"), (PrefixCache, "save_one")]
PLACES += [(Loop, "add"), (Loop, "step"), (Loop, "remove")]


@pytest.mark.parametrize("error", [Panic("broken"), ValueError("broken")], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("owner", "name"), PLACES)
def test_an_exception_anywhere_ends_one_request_at_most(scheduler, owner, name, error, monkeypatch):
    first, errors = ask(scheduler, 1, Block if name == "remove" else Accepted), [error]
    first.wait()
    original = getattr(owner, name)

    def failing(*arguments, **keywords):
        if errors:
            raise errors.pop()
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, failing)
    if name == "remove":
        first.ticket.cancel()
    first.go_on()
    fails_alone(scheduler, first)
    until(lambda: not errors)
    if name in ("add", "step"):
        assert str(first.last.error) == (f"Panic: {error}" if isinstance(error, Panic) else str(error))
    elif name != "remove":
        assert told(first.last) == alone(1)


def test_a_panic_of_one_requests_reader_or_preparation_is_its_own(scheduler):
    def panic(*_):
        raise Panic("tokenizer")

    request, listeners = tiny_request(tokens_of(1)), [Listener(), Listener()]
    request.reader.feed = panic
    other = ask(scheduler, 2)
    for prepare, listener in zip((lambda: request, panic), listeners):
        scheduler.submit(prepare, listener)
    assert [str(one.last.error) for one in listeners] == ["Panic: tokenizer"] * 2
    assert told(other.last) == alone(2)
    fails_alone(scheduler, listeners[0])


@pytest.mark.parametrize("kind", [Accepted, Block, Finished])
def test_a_listener_that_raises_is_dropped(scheduler, kind):
    heard = []

    def listener(event):
        heard.append(event)
        if isinstance(event, kind):
            raise Panic("listener")

    other = ask(scheduler, 3, Accepted)
    other.wait()
    with pytest.warns(UserWarning, match=r"A listener of the scheduler raised Panic \(listener\)"):
        scheduler.submit(lambda: tiny_request(tokens_of(1)), listener)
        other.go_on()
        until(lambda: load_of(scheduler) == (0, 0) and heard)
    assert isinstance(heard[-1], kind)
    assert told(other.last) == alone(3)
    fails_alone(scheduler, SimpleNamespace(events=heard))


def test_finished_is_told_before_the_prefix_is_kept(scheduler, monkeypatch):
    put, listener = PrefixCache.put, Listener()

    def watched(self, session):
        order.append("put")
        put(self, session)

    order = []
    monkeypatch.setattr(PrefixCache, "put", watched)

    def listen(event):
        order.append(type(event))
        listener(event)

    scheduler.submit(lambda: tiny_request(tokens_of(1), seed=1), listen)
    assert told(listener.last) == alone(1)
    until(lambda: order[-1] == "put")
    assert order[order.index(Finished) :] == [Finished, "put"]


def test_a_thread_that_dies_tells_everyone(monkeypatch):
    scheduler, died = Scheduler(tiny_engine(), rows=1), threading.Event()
    scheduler.on_death = died.set
    running = ask(scheduler, 1, Block)
    running.wait()
    waiting, preparing = ask(scheduler, 2), Listener()
    go_on = threading.Event()
    scheduler.submit(lambda: go_on.wait(LIMIT), preparing)

    def broken(self):
        raise Panic("bug")

    monkeypatch.setattr(Scheduler, "_drop", broken)
    with pytest.warns(UserWarning, match="The scheduler has failed"):
        running.go_on()
        errors = [one.last.error for one in (running, waiting, preparing)]
        assert died.wait(LIMIT)
    text = "The scheduler has failed (Panic: bug), so nothing is generated any more; start the server again."
    assert [(type(error), str(error)) for error in errors] == [(Broken, text)] * 3
    until(lambda: not scheduler.health().alive)
    assert (load_of(scheduler), str(scheduler.broken)) == ((0, 0), text)
    with pytest.raises(Stopping, match=r"^The scheduler has failed \(Panic: bug\)"):
        ask(scheduler, 4)
    go_on.set()
    scheduler.close()


def test_health_tells_how_long_a_pass_takes(scheduler):
    assert scheduler.health().seconds_since_pass == 0
    listener = ask(scheduler, 1, Block)
    listener.wait()
    first = scheduler.health()
    assert first.alive
    assert 0 < first.seconds_since_pass < scheduler.health().seconds_since_pass  # while the listener holds it up
    listener.go_on()
    assert told(listener.last) == alone(1)
    until(lambda: scheduler.health().seconds_since_pass == 0)
