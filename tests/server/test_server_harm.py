"""Requests that would harm others: what fails, or takes long, stays its asker's own."""

import asyncio
import shutil
import threading
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import httpx
import mlx.core as mx
import pytest
from listeners import LIMIT
from serving import CHAT, Script, said
from support import engine_of

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.server.endpoints.completions import StopCutter
from mlx_dgemma.server.follow import follow
from mlx_dgemma.server.schemas.messages import Function, tool_declarations
from mlx_dgemma.server.schemas.ollama import OllamaCall, OllamaChat, OllamaFunction, OllamaMessage, ollama_messages
from mlx_dgemma.serving.scheduler import Failed, Scheduler


@pytest.fixture
def schedule():
    """Makes schedulers of the demo, which are closed afterwards."""
    made = []

    def make(**options):
        made.append(Scheduler(mlx_dgemma.load(DEMO, dtype="float32"), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def submit(scheduler, prompt, **arguments):
    """A function that waits for the last event of a request."""
    events, over = [], threading.Event()

    def listen(event):
        events.append(event)
        if isinstance(event, (Finished, Failed)):
            over.set()

    scheduler.submit(lambda: scheduler.engine.prepare(prompt, **arguments), listen)

    def last():
        assert over.wait(LIMIT)
        return events[-1]

    return last


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_cache_folder_that_goes_away_ends_no_scheduler(schedule, tmp_path):
    folder = tmp_path / "cache"
    scheduler = schedule(cache_dir=folder)
    shutil.rmtree(folder)
    folder.write_text("a file, where a folder cannot be made again")
    with pytest.warns(UserWarning, match="^The prefix cache stays in memory for now: .* cannot be written"):
        submit(scheduler, "Spell the word cat. " * 20, seed=0, max_tokens=5)()
        assert submit(scheduler, "Spell the word cat.", seed=0)().result.text == "c a t"
        scheduler.close()  # what is not written yet is tried once more


class Broken:
    """A control whose guide fails once it must choose."""

    def prepare(self, *_):
        return ()

    def layout(self):
        return None

    def guide(self, left):
        guide = SimpleNamespace(tokens=mx.array([5], mx.int32))
        guide.choose = lambda row, reading: 1 / 0
        return guide


def test_a_batch_that_fails_takes_no_other_along(schedule):
    scheduler = schedule(rows=2)
    same = engine_of(DEMO).generate("Count from 1 to 30.", seed=0, max_tokens=80, exact=True)
    good = submit(scheduler, "Count from 1 to 30.", seed=0, max_tokens=80, exact=True)
    events, over = [], threading.Event()
    prepare = lambda: replace(scheduler.engine.prepare("Spell the word cat.", seed=0), control=Broken())  # noqa: E731
    scheduler.submit(prepare, lambda event: (events.append(event), isinstance(event, Failed) and over.set()))
    assert over.wait(LIMIT)
    assert isinstance(events[-1].error, ZeroDivisionError)
    assert good().result.tokens == same.tokens
    assert (scheduler.load().running, scheduler.load().counters["failed"]) == (0, 1)


class CountedText(str):
    """A string that counts how often a string of this class is compared or sliced."""

    operations = 0

    def __eq__(self, other):
        CountedText.operations += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def __getitem__(self, key):
        CountedText.operations += 1
        return str.__getitem__(self, key)


def test_many_tools_are_read_in_proportion(monkeypatch):
    """Finding a duplicate name must not compare each name with all others."""
    monkeypatch.setattr(CountedText, "operations", 0)
    names = [CountedText(f"f{i}") for i in range(2000)]
    tools = tool_declarations([Function.model_construct(name=name) for name in names], "tools[{}].name")
    assert CountedText.operations < 10 * len(names)
    assert [one["function"]["name"] for one in tools] == names


def test_results_find_their_calls_in_proportion(monkeypatch):
    """A result must not be compared with every call that waits for one."""
    monkeypatch.setattr(CountedText, "operations", 0)
    names = [f"f{i}" for i in range(1000)]
    calls = [
        OllamaCall(function=OllamaFunction.model_construct(name=CountedText(name), arguments={})) for name in names
    ]
    results = [
        OllamaMessage.model_construct(role="tool", content="a", tool_name=CountedText(name)) for name in names[::-1]
    ]
    messages = [OllamaMessage.model_construct(role="assistant", content="", tool_calls=calls), *results]
    found = ollama_messages(OllamaChat.model_construct(messages=messages))
    assert CountedText.operations < 10 * len(names)
    assert [one["tool_call_id"] for one in found[1:]] == [f"call_0_{i}" for i in range(1000)][::-1]


def test_a_long_stop_string_costs_no_more_than_the_text(monkeypatch):
    """The parts of a stop string that are longer than the text are not looked at."""
    monkeypatch.setattr(CountedText, "operations", 0)
    cutter = StopCutter([CountedText("b" * 3_000_000)])
    pieces = [cutter.add(piece) for piece in ("abb", "b", "c", "b")]
    assert [*pieces, cutter.add("", last=True)] == ["a", "", "bbbc", "", "b"]
    assert 0 < CountedText.operations < 100


@pytest.mark.parametrize("pattern", ["[ab]*a[ab]{30}", "[ab]*a[ab]{5000}", "(?:){4294967294}(ab?){99999}"])
def test_automata_that_explode_are_refused(scheduler, url, pattern):
    answer = httpx.post(url + CHAT, json={"messages": said("Hi."), "regex": pattern}, timeout=LIMIT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "regex")
    print(answer.json()["error"]["message"])


def test_a_long_regex_is_not_read(url):
    answer = httpx.post(url + CHAT, json={"messages": said("Hi."), "regex": "a" * 20_001}, timeout=LIMIT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "regex")
    assert answer.json()["error"]["message"] == (
        "regex is 'aaaaaaaaaaaa...aaaaaaaaaaaaa'; at most 20,000 characters are read: give a shorter one."
    )


def test_a_listener_whose_loop_is_closed_is_silent():
    script = Script()

    async def leave():
        async with aclosing(follow(script, [lambda: None])) as events:
            await anext(events)

    asyncio.run(leave())
    (ticket,) = script.submitted
    assert ticket.cancelled.is_set()
    assert ticket.listener(Failed(ZeroDivisionError())) is None
