"""The scheduler: every request gets what it would get alone; failures stay its own."""

import subprocess
import sys
import threading
from functools import partial

import pytest
from listeners import LIMIT, Listener, alone, ask, load_of, tokens_of, told, until
from loop import tiny_engine, tiny_request
from serving import WEATHER
from support import RED, engine_of, strip

import mlx_dgemma
from mlx_dgemma.decoding.events import Block, Draft, Finished
from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.serving.prefix_cache import PrefixCache
from mlx_dgemma.serving.preparation import SLOTS
from mlx_dgemma.serving.scheduler import COUNTERS, Accepted, Busy, Failed, Scheduler
from mlx_dgemma.tasks import infill

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
FEW = {"max_tokens": 64, "max_denoising_steps": 2}


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


def test_more_than_there_are_rows_for_give_what_each_gives_alone(tiny_scheduler):
    listeners = [ask(tiny_scheduler, n, drafts=n == 2, max_denoising_steps=2 + n) for n in range(5)]
    for n, listener in enumerate(listeners):
        assert told(listener.last) == alone(n, max_denoising_steps=2 + n)
    blocks = [event for event in listeners[2].events if isinstance(event, Block)]
    steps = [event for event in listeners[2].events if isinstance(event, Draft)]
    assert [draft.block for draft in steps] == [block.block for block in blocks for _ in range(block.steps)]


def test_a_mistake_fails_alone(tiny_scheduler):
    def mistaken():
        raise PromptError("The prompt is empty; write something.")

    listener = Listener()
    before = ask(tiny_scheduler, 1)
    tiny_scheduler.submit(mistaken, listener)
    after = ask(tiny_scheduler, 2)
    assert str(listener.last.error) == "The prompt is empty; write something."
    assert listener.kinds == [Failed]
    assert [told(before.last), told(after.last)] == [alone(1), alone(2)]
    assert tiny_scheduler.load().counters["failed"] == 1


def test_a_mistake_that_shows_while_it_runs_fails_alone(tiny_scheduler):
    request, listener = tiny_request(tokens_of(1)), Listener()

    def feed(tokens, log_probs):
        raise OptionError("too much")

    request.reader.feed = feed
    other = ask(tiny_scheduler, 2)
    tiny_scheduler.submit(lambda: request, listener)
    assert str(listener.last.error) == "too much"
    assert listener.kinds == [Accepted, Failed]
    assert told(other.last) == alone(2)


def test_as_many_may_wait_as_there_is_room_for(tiny_scheduler):
    """2 rows and 3 places, whether requests are not yet prepared or running."""
    listeners = [ask(tiny_scheduler, 0, Accepted, Block)]
    listeners[0].wait()
    listeners += [ask(tiny_scheduler, n) for n in range(1, 5)]
    full = "The queue is full ({} waiting); retry in 2 s."
    with pytest.raises(Busy) as busy:
        ask(tiny_scheduler, 9)
    assert (str(busy.value), busy.value.retry_after, load_of(tiny_scheduler)) == (full.format(5), 2, (0, 5))
    listeners[0].go_on()
    listeners[0].wait()
    with pytest.raises(Busy) as busy:
        ask(tiny_scheduler, 9)
    assert (str(busy.value), load_of(tiny_scheduler)) == (full.format(3), (2, 3))
    listeners[0].go_on()
    assert [told(one.last) for one in listeners] == [alone(n) for n in range(5)]
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert tiny_scheduler.load().counters["requests"] == 5


def test_what_is_being_prepared_counts_as_waiting(tiny_scheduler):
    preparing, go_on = threading.Semaphore(0), threading.Event()

    def slow():
        preparing.release()
        assert go_on.wait(LIMIT)
        return tiny_request(tokens_of(0))

    for _ in range(SLOTS):
        tiny_scheduler.submit(slow, Listener())
        assert preparing.acquire(timeout=LIMIT)
    assert load_of(tiny_scheduler) == (0, SLOTS)
    listeners = [ask(tiny_scheduler, n) for n in range(1, 6 - SLOTS)]
    with pytest.raises(Busy, match=r"^The queue is full \(5 waiting\); retry in 2 s\.$"):
        ask(tiny_scheduler, 9)
    go_on.set()
    assert [told(one.last) for one in listeners] == [alone(n) for n in range(1, 6 - SLOTS)]


def test_what_fails_a_whole_batch_fails_all_that_run_and_no_other(tiny_scheduler, monkeypatch):
    first = ask(tiny_scheduler, 1, Accepted)
    first.wait()
    second = ask(tiny_scheduler, 2, Draft, drafts=True)
    until(lambda: second.ticket in tiny_scheduler._prepared)  # before the third one
    third = ask(tiny_scheduler, 3)
    first.go_on()
    second.wait()  # beside the first one
    until(lambda: load_of(tiny_scheduler) == (2, 1))  # the third may still be prepared
    denoise, errors = tiny_scheduler.engine.model.denoise, [RuntimeError("out of memory")]

    def breaking(self, *arguments):
        if errors:
            raise errors.pop()
        return denoise(*arguments)

    monkeypatch.setattr(type(tiny_scheduler.engine.model), "denoise", breaking)
    second.go_on()
    assert [str(one.last.error) for one in (first, second)] == ["out of memory"] * 2
    assert told(third.last) == alone(3)
    until(lambda: load_of(tiny_scheduler) == (0, 0))
    assert tiny_scheduler.load().counters["failed"] == 2
    assert tiny_scheduler._loop.requests == []


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
