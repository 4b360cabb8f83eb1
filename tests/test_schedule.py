"""The scheduler: who waits, who runs, who is told what; and that everybody gets what they would alone."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from functools import partial

import pytest
from loop import tiny_engine, tiny_request
from serving import WEATHER
from support import RED, engine_of, random_tokens, strip

import mlx_dgemma
from mlx_dgemma.decoding.events import Block, Draft, Finished
from mlx_dgemma.decoding.session import Session
from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.serving.prefix_cache import PrefixCache
from mlx_dgemma.serving.scheduler import COUNTERS, Accepted, Busy, Failed, Scheduler, Stopping
from mlx_dgemma.tasks import infill

LIMIT = 60  # seconds; nothing here takes so long unless it hangs
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
FEW = {"max_tokens": 64, "max_denoising_steps": 2}


class Listener:
    """Keeps what it is told, and holds the scheduler up after each kind of event in `stops`, in their order."""

    def __init__(self, *stops):
        self.events, self.stops = [], deque(stops)
        self.over, self._held, self._free = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.over.set()
        if self.stops and isinstance(event, self.stops[0]):
            self.stops.popleft()
            self._held.release()
            assert self._free.acquire(timeout=LIMIT)

    def wait(self):
        """Until the scheduler is held up."""
        assert self._held.acquire(timeout=LIMIT)

    def go_on(self):
        self._free.release()

    @property
    def kinds(self):
        return [type(event) for event in self.events]

    @property
    def last(self):
        """The last event, once there is one."""
        assert self.over.wait(LIMIT)
        return self.events[-1]


def tokens_of(n, length=9):
    return random_tokens(n, length).tolist()


def ask(scheduler, n=1, *stops, drafts=False, **options):
    """Submit a tiny request with its own prompt and seed."""
    listener = Listener(*stops)
    listener.ticket = scheduler.submit(lambda: tiny_request(tokens_of(n), seed=n, **options), listener, drafts)
    return listener


def alone(n=1, **options):
    """(tokens, steps) of that request by itself."""
    (*_, finished) = tiny_engine().run(tiny_request(tokens_of(n), seed=n, **options))
    return told(finished)


def told(finished):
    assert isinstance(finished, Finished), finished
    return finished.result.tokens, finished.result.stats.denoising_steps


def until(true):
    """Wait for what no event tells."""
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def load_of(scheduler):
    load = scheduler.load()
    return load.running, load.waiting


@pytest.fixture
def tiny(request):
    """A scheduler of a random model that keeps no prefixes; `rows` and more by parametrize."""
    scheduler = Scheduler(tiny_engine(), cache_bytes=0, **getattr(request, "param", {"rows": 2, "waiting": 3}))
    yield scheduler
    scheduler.close()


one_row = pytest.mark.parametrize("tiny", [{"rows": 1, "waiting": 3}], indirect=True)


# The demo.

ASKED = [
    ("generate", ("Spell the word frog.",), {}),
    ("generate", ("What is 25 + 31?",), {"thinking": True, **FEW}),
    ("generate", ("What is the weather in Oslo?",), {"tools": [WEATHER]}),
    ("generate", ("Write JSON for: Anna is 31 years old.",), {"schema": SCHEMA, **FEW}),
    ("generate", ("What color is the shape?",), {"images": [strip(RED)], **FEW}),
    ("infill", ("Once there was a cat", " in a meadow."), {"length": 2}),
    ("generate", ("Spell the word cat.",), {"exact": True, **FEW}),
    ("generate", ("Spell the word dog.",), {"fast": True, **FEW}),
    ("generate", ("Count from 3 to 30.",), {"max_tokens": 80, "max_denoising_steps": 1}),
]


@pytest.fixture(scope="module")
def demo_scheduler(demo):
    scheduler = Scheduler(mlx_dgemma.load(demo, dtype="float32"), rows=len(ASKED))
    yield scheduler
    scheduler.close()


def submit(scheduler, way, arguments, options, seed, drafts=False):
    listener, engine = Listener(), scheduler.engine
    prepare = partial(infill.infill, engine.builder) if way == "infill" else engine.prepare
    listener.ticket = scheduler.submit(partial(prepare, *arguments, seed=seed, **options), listener, drafts)
    return listener


def test_many_kinds_of_requests_at_once_give_what_each_gives_alone(demo, demo_scheduler):
    listeners = [submit(demo_scheduler, *one, seed) for seed, one in enumerate(ASKED)]
    bad = submit(demo_scheduler, "generate", ("Hi",), {"max_tokens": 0}, 0)
    assert str(bad.last.error) == "max_tokens is 0; it should be a whole number, at least 1."
    engine, texts = engine_of(demo), []
    for seed, ((way, arguments, options), listener) in enumerate(zip(ASKED, listeners)):
        expected, result = getattr(engine, way)(*arguments, seed=seed, **options), listener.last.result
        assert (result.tokens, result.stats.denoising_steps) == (expected.tokens, expected.stats.denoising_steps)
        for name in ("text", "thinking", "tool_calls", "finish_reason"):
            assert getattr(result, name) == getattr(expected, name), (seed, name)
        assert listener.kinds == [Accepted, *[Block] * expected.stats.blocks, Finished]
        texts.append(result.text)
    assert texts[0] == "f r o g"
    assert listeners[2].last.result.tool_calls
    until(lambda: load_of(demo_scheduler) == (0, 0))
    load, stats = demo_scheduler.load(), [listener.last.result.stats for listener in listeners]
    assert load.counters == {
        "requests": len(ASKED) + 1,
        "cancelled": 0,
        "failed": 1,
        "cached_tokens": 0,
        **{name: sum(getattr(one, name) for one in stats) for name in COUNTERS[3:] if name != "cached_tokens"},
    }
    assert load.cache_entries == sum(len(one.ticket.request.session.cache_key) >= 64 for one in listeners) > 0
    assert load.cache_bytes == demo_scheduler._cache.nbytes > 0


def test_drafts_are_told_in_order_to_those_who_ask(demo, demo_scheduler):
    one = ("generate", ("Spell the word frog.",), {})
    plain, watched = (submit(demo_scheduler, *one, 0, drafts=drafts) for drafts in (False, True))
    expected = list(engine_of(demo).stream("Spell the word frog.", seed=0))
    assert plain.last.result.tokens == watched.last.result.tokens == expected[-1].result.tokens
    assert plain.kinds == [Accepted, Block, Finished]
    assert watched.kinds == [Accepted, *map(type, expected)]
    assert watched.events[0] == Accepted(expected[-1].result.stats.prompt_tokens, 0)
    drafts = [event for event in watched.events if isinstance(event, Draft)]
    assert [(d.block, d.step, d.text) for d in drafts] == [(d.block, d.step, d.text) for d in expected[:-2]]
    assert drafts


# A random model: milliseconds a step.


def test_more_than_there_are_rows_for_give_what_each_gives_alone(tiny):
    listeners = [ask(tiny, n, drafts=n == 2, max_denoising_steps=2 + n) for n in range(5)]
    for n, listener in enumerate(listeners):
        assert told(listener.last) == alone(n, max_denoising_steps=2 + n)
    blocks = [event for event in listeners[2].events if isinstance(event, Block)]
    steps = [event for event in listeners[2].events if isinstance(event, Draft)]
    assert [draft.block for draft in steps] == [block.block for block in blocks for _ in range(block.steps)]


def test_a_mistake_fails_alone(tiny):
    def mistaken():
        raise PromptError("The prompt is empty; write something.")

    listener = Listener()
    before = ask(tiny, 1)
    tiny.submit(mistaken, listener)
    after = ask(tiny, 2)
    assert str(listener.last.error) == "The prompt is empty; write something."
    assert listener.kinds == [Failed]
    assert [told(before.last), told(after.last)] == [alone(1), alone(2)]
    assert tiny.load().counters["failed"] == 1


def test_a_mistake_that_shows_while_it_runs_fails_alone(tiny):
    request, listener = tiny_request(tokens_of(1)), Listener()

    def feed(tokens, log_probs):
        raise OptionError("too much")

    request.reader.feed = feed
    other = ask(tiny, 2)
    tiny.submit(lambda: request, listener)
    assert str(listener.last.error) == "too much"
    assert listener.kinds == [Accepted, Failed]
    assert told(other.last) == alone(2)


def test_as_many_may_wait_as_there_is_room_for(tiny):
    """2 rows and 3 places, whether requests are not yet prepared or running."""
    listeners = [ask(tiny, 0, Accepted, Block)]
    listeners[0].wait()
    listeners += [ask(tiny, n) for n in range(1, 5)]
    full = "{} requests are waiting, which is all that may; try again in 2 s."
    with pytest.raises(Busy) as busy:
        ask(tiny, 9)
    assert (str(busy.value), busy.value.retry_after, load_of(tiny)) == (full.format(5), 2, (0, 5))
    listeners[0].go_on()
    listeners[0].wait()
    with pytest.raises(Busy) as busy:
        ask(tiny, 9)
    assert (str(busy.value), load_of(tiny)) == (full.format(3), (2, 3))
    listeners[0].go_on()
    assert [told(one.last) for one in listeners] == [alone(n) for n in range(5)]
    until(lambda: load_of(tiny) == (0, 0))
    assert tiny.load().counters["requests"] == 5


def test_what_is_being_prepared_counts_as_waiting(tiny):
    preparing, go_on = threading.Event(), threading.Event()

    def slow():
        preparing.set()
        assert go_on.wait(LIMIT)
        return tiny_request(tokens_of(0))

    tiny.submit(slow, Listener())
    assert preparing.wait(LIMIT)
    assert load_of(tiny) == (0, 1)
    listeners = [ask(tiny, n) for n in range(1, 5)]
    with pytest.raises(Busy, match=r"^5 requests are waiting, which is all that may; try again in 2 s\.$"):
        ask(tiny, 9)
    go_on.set()
    assert [told(one.last) for one in listeners] == [alone(n) for n in range(1, 5)]


@one_row
@pytest.mark.parametrize("accepted", [False, True])
def test_who_is_cancelled_while_waiting_hears_nothing_more(tiny, accepted):
    first = ask(tiny, 1, Block, Block)
    first.wait()
    second, third = ask(tiny, 2), ask(tiny, 3)
    if accepted:
        first.go_on()
        first.wait()
    assert load_of(tiny) == (1, 2)
    second.ticket.cancel()
    for _ in range(2 - accepted):
        first.go_on()
    assert [told(first.last), told(third.last)] == [alone(1), alone(3)]
    assert second.kinds == [Accepted] * accepted
    until(lambda: load_of(tiny) == (0, 0))
    assert {name: tiny.load().counters[name] for name in COUNTERS[:3]} == {"requests": 3, "cancelled": 1, "failed": 0}


def test_who_is_cancelled_while_prepared_hears_nothing(tiny):
    listener, tickets = Listener(), []
    first = ask(tiny, 1, Accepted)
    first.wait()

    def prepare():
        tickets[0].cancel()
        return tiny_request(tokens_of(2))

    def mistaken():
        tickets[1].cancel()
        raise PromptError("nobody hears this")

    tickets += [tiny.submit(prepare, listener), tiny.submit(mistaken, listener)]
    first.go_on()
    assert told(first.last) == alone(1)
    assert told(ask(tiny, 3).last) == alone(3)
    assert listener.kinds == []
    assert [tiny.load().counters[name] for name in COUNTERS[:3]] == [4, 1, 1]


def test_who_is_cancelled_while_encoded_hears_nothing_more(tiny, monkeypatch):
    encode, encoded = Session.encode, Listener(int)

    def watched(session, *arguments):
        for chunk in encode(session, *arguments):
            encoded(session.prefix.offset)
            yield chunk

    monkeypatch.setattr(Session, "encode", watched)
    listener = ask(tiny, 1, prefill_chunk=4)
    encoded.wait()
    assert load_of(tiny) == (1, 0)
    listener.ticket.cancel()
    encoded.go_on()
    until(lambda: load_of(tiny) == (0, 0))
    assert (encoded.events, listener.kinds) == ([4], [Accepted])
    assert tiny.load().counters["cancelled"] == 1
    assert told(ask(tiny, 2).last) == alone(2)


@pytest.mark.parametrize("when", [Draft, Block])
def test_who_is_cancelled_while_denoised_hears_nothing_more_and_is_let_go(tiny, when):
    listener, other = ask(tiny, 1, when, drafts=True), ask(tiny, 2)
    listener.wait()
    assert load_of(tiny)[0] >= 1
    prefix = weakref.ref(listener.ticket.request.session.prefix)
    heard = len(listener.events)
    listener.ticket.cancel()
    listener.go_on()
    assert told(other.last) == alone(2)
    until(lambda: load_of(tiny) == (0, 0))
    assert len(listener.events) == heard
    assert listener.kinds[-1] is when
    counters = tiny.load().counters
    assert [counters[name] for name in COUNTERS[:3]] == [2, 1, 0]
    assert counters["generated_tokens"] == len(alone(2)[0])  # of those who were told
    assert tiny._loop.requests == []
    del listener
    gc.collect()
    assert prefix() is None


def test_who_is_cancelled_at_the_last_block_hears_no_end(tiny):
    listener = ask(tiny, 1, Block, Block)
    for _ in range(2):
        listener.wait()
        if not listener.stops:
            listener.ticket.cancel()
        listener.go_on()
    until(lambda: load_of(tiny) == (0, 0))
    assert listener.kinds == [Accepted, Block, Block]
    assert [tiny.load().counters[name] for name in COUNTERS[:3]] == [1, 1, 0]
    listener.ticket.cancel()  # harmless


@one_row
def test_closing_at_once_tells_everyone(tiny):
    running = ask(tiny, 1, Block)
    running.wait()
    waiting, cancelled = ask(tiny, 2), ask(tiny, 3)
    cancelled.ticket.cancel()
    closing = threading.Thread(target=tiny.close)
    closing.start()
    until(lambda: tiny._deadline is not None)
    with pytest.raises(Stopping, match=r"^The server is stopping; ask again later\.$"):
        ask(tiny, 4)
    running.go_on()
    closing.join(LIMIT)
    assert not tiny._thread.is_alive()
    for listener, kinds in ((running, [Accepted, Block, Failed]), (waiting, [Accepted, Failed])):
        assert isinstance(listener.last.error, Stopping)
        assert listener.kinds == kinds
    assert cancelled.kinds == []
    assert load_of(tiny) == (0, 0)
    with pytest.raises(Stopping):
        ask(tiny, 4)
    tiny.close()  # again is harmless


@one_row
def test_closing_gives_those_that_are_there_time_to_finish(tiny):
    running = ask(tiny, 1, Block)
    running.wait()
    waiting = ask(tiny, 2)
    closing = threading.Thread(target=tiny.close, args=(LIMIT,))
    closing.start()
    until(lambda: tiny._deadline is not None)
    running.go_on()
    closing.join(LIMIT)
    assert [told(running.last), told(waiting.last)] == [alone(1), alone(2)]


def test_the_time_to_finish_ends(tiny):
    endless = ask(tiny, 1, Block)
    endless.wait()
    closing = threading.Thread(target=tiny.close, args=(0.05,))
    closing.start()
    until(lambda: tiny._deadline is not None and time.monotonic() > tiny._deadline)
    endless.go_on()
    closing.join(LIMIT)
    assert isinstance(endless.last.error, Stopping)


def test_what_fails_a_whole_batch_fails_all_that_run_and_no_other(tiny, monkeypatch):
    first, second = ask(tiny, 1, Accepted), ask(tiny, 2, Draft, drafts=True)
    first.wait()
    third = ask(tiny, 3)
    first.go_on()
    second.wait()  # beside the first one
    assert load_of(tiny) == (2, 1)
    denoise, errors = tiny.engine.model.denoise, [RuntimeError("out of memory")]

    def breaking(self, *arguments):
        if errors:
            raise errors.pop()
        return denoise(*arguments)

    monkeypatch.setattr(type(tiny.engine.model), "denoise", breaking)
    second.go_on()
    assert [str(one.last.error) for one in (first, second)] == ["out of memory"] * 2
    assert told(third.last) == alone(3)
    until(lambda: load_of(tiny) == (0, 0))
    assert tiny.load().counters["failed"] == 2
    assert tiny._loop.requests == []


SCRIPT = """
import threading
import mlx_dgemma
from mlx_dgemma.serving.scheduler import Scheduler

engine, over, heard = mlx_dgemma.load(dtype="float32"), threading.Event(), []
scheduler = Scheduler(engine)

def listener(event):
    heard.append(event)
    if len(heard) == 3:
        over.set()

scheduler.submit(lambda: engine.prepare("Spell the word frog.", seed=0), listener)
assert over.wait(60)
scheduler.close()
print(heard[-1].result.text)
"""


def test_a_process_with_a_scheduler_ends_well():
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "f r o g\n", "")


@pytest.mark.parametrize("cancel", [False, True])
def test_a_cache_that_fails_hurts_nobody(cancel, monkeypatch):
    def put(self, session):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(PrefixCache, "put", put)
    scheduler = Scheduler(tiny_engine())
    with pytest.warns(UserWarning, match="A prefix could not be kept"):
        first = ask(scheduler, 1, Draft, drafts=True)
        first.wait()
        if cancel:
            first.ticket.cancel()
        first.go_on()
        assert told(ask(scheduler, 2).last) == alone(2)
        scheduler.close()
