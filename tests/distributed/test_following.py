"""Rank 0 tells, the others follow: in one process, with a follower that has the whole model, so that all it computes is
compared with what rank 0 computed, step by step."""

import gc
from collections import deque
from contextlib import nullcontext
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from listeners import Listener, until
from serving import WEATHER
from support import RED, engine_of, strip

import mlx_dgemma
from mlx_dgemma.cli import chat_input, main, stdin
from mlx_dgemma.errors import CircumstanceError
from mlx_dgemma.ranks.following import Apart, Follower
from mlx_dgemma.ranks.leading import Leader, LeadingCache, LeadingEngine
from mlx_dgemma.serving.scheduler import Scheduler
from mlx_dgemma.tasks import choose
from mlx_dgemma.tasks.edit import edit
from mlx_dgemma.tasks.fill import fill
from mlx_dgemma.tasks.infill import infill

SHORT = {"max_tokens": 12, "seed": 3}
FEW = {**SHORT, "max_tokens": 40, "max_denoising_steps": 1}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
ANNA = "Write JSON for: Anna is 31 years old and lives in Oslo."


class Failed(Exception):
    """Rank 0 has given up."""


class Wire:
    """A connection to a follower in this process, which does at once what it hears, before rank 0 does."""

    def __init__(self, engine):
        self.follower, self.kinds, self.error = Follower(None), [], None
        self.follower.engine, self.hold, self.kept = engine, False, deque()

    def send_bytes(self, data):
        self.kept.append(data)
        while self.kept and not self.hold:
            try:
                self.follower.do(self.kept.popleft())
            except Apart as error:
                self.error = error


def fail(sentence):
    raise Failed(sentence)


@pytest.fixture(scope="module")
def ranks(demo):
    """Rank 0's engine and the wire to the other rank."""
    wire = Wire(mlx_dgemma.load(demo, dtype="float32"))
    me = SimpleNamespace(fail=fail, uninterrupted=nullcontext)
    return LeadingEngine.of(mlx_dgemma.load(demo, dtype="float32"), Leader(me, [wire])), wire


def requests(builder):
    """A request of every kind."""
    answer = partial(mlx_dgemma.tasks.answer.answer, builder)
    yield answer("Spell the word frog.", seed=1)
    yield answer("What is 25 + 31?", thinking=True, thinking_budget=4, **FEW)
    yield answer("What is the weather in Oslo?", tools=[WEATHER], seed=0)
    yield answer(ANNA, schema=PERSON, **FEW)
    yield answer(ANNA, regex=r"[a-z ]{3,9}\.", mode="causal", **SHORT)
    yield answer("What color is the shape?", images=[strip(RED)], **FEW)
    yield answer("Count from 3 to 30.", mode="causal", temperature=0.7, repetition_penalty=1.1, **SHORT)
    yield answer("Count from 3 to 30.", mode="speculative", **SHORT)
    yield answer("Count from 3 to 30.", exact=True, stop=("7",), **FEW)
    yield infill(builder, "Once there was a cat", " in a meadow.", seed=0, max_denoising_steps=1, max_tokens=6)
    yield edit(builder, "The cat sleeps.", "Replace cat with dog", **FEW)
    yield fill(builder, "{who} is {age}.", {"who": ["Anna", "Leo"], "age": 3}, **FEW)


def test_every_kind_of_request_is_followed_beside_others(demo, ranks):
    leading, wire = ranks
    alone = engine_of(demo)
    few = islice(requests(alone.builder), 3)  # the follower's others are compared with rank 0's
    expected = [list(alone.run(one, drafts=False))[-1].result for one in few]
    loop, texts = leading.loop(), {}
    for one in requests(leading.builder):
        loop.add(one)
        texts[one] = None
    while loop.requests:
        for request, event in loop.step():
            texts[request] = getattr(event, "result", None)
    loop.remove(next(iter(texts)))  # asks a follower that has heard the last step's outcome
    del request, event, one
    assert [one.tokens for one in islice(texts.values(), 3)] == [one.tokens for one in expected]
    assert all(texts.values())
    next(iter(leading.loop().step()), None)
    assert wire.error is None
    asked = choose.ask(leading.builder, "Which is larger, 51 or 23?", ["51", "23"])
    assert leading.call(choose.compute, leading.model, asked).probabilities == alone.choose(
        "Which is larger, 51 or 23?", ["51", "23"]
    )
    loop.close()
    del loop, texts
    gc.collect()
    leading.session()
    gc.collect()
    leading.session()
    assert len(wire.follower._known) <= 3  # what rank 0 has let go, the other has too


def test_a_conversation_and_an_answer_that_is_left_are_followed(demo, ranks):
    leading, wire = ranks
    talks = [leading.session(), engine_of(demo).session()]
    for prompt in ("Spell the word frog.", "Spell the word dog."):
        found, wanted = (
            one.generate(prompt, session=talk, seed=0) for one, talk in zip((leading, engine_of(demo)), talks)
        )
        assert (found.tokens, found.stats.reused_tokens) == (wanted.tokens, wanted.stats.reused_tokens)
    stream = leading.stream("Count from 3 to 30.", session=talks[0], **FEW)
    next(stream)
    stream.close()
    again = leading.generate("Spell the word frog.", session=talks[0], seed=0)
    assert again.text == "f r o g" and wire.error is None


def test_a_server_is_followed_with_its_prefix_cache(demo, ranks):
    leading, wire = ranks
    long = "Count from 3 to 30. " * 9
    scheduler = Scheduler(leading, rows=2, cache_bytes=2**21, make_cache=LeadingCache)
    results = []
    for tail in ("Spell the word frog.", "Spell the word dog.", "Spell the word frog."):
        listener = Listener()
        listener.ticket = scheduler.submit(partial(leading.prepare, long + tail, **FEW), listener)
        until(lambda listener=listener: hasattr(listener.last, "result"))
        results.append(listener.last.result)
    left = Listener()
    left.ticket = scheduler.submit(partial(leading.prepare, "Count from 3 to 30.", seed=1), left)
    left.ticket.cancel()
    scheduler.close()
    assert [one.stats.reused_tokens > 0 for one in results] == [False, False, True]
    assert results[0].tokens == results[2].tokens == engine_of(demo).generate(long + tail, **FEW).tokens
    mine, theirs = scheduler._cache, wire.follower._cache
    assert list(mine._sessions) == list(theirs._sessions) and mine.nbytes == theirs.nbytes > 0
    assert wire.error is None
    with pytest.raises(CircumstanceError, match="leave it out"):
        LeadingCache(leading, 0, demo)


def test_a_rank_that_computes_something_else_says_so(ranks):
    leading, wire = ranks
    wire.hold = True
    loop = leading.loop()
    loop.add(leading.prepare("Spell the word frog.", seed=1))
    while loop.requests:
        list(loop.step())
    list(loop.step())
    begin, add, *steps = wire.kept
    wire.kept.clear()
    wire.hold = False
    wire.follower.do(begin)
    wire.follower.do(add)
    request, other = wire.follower._known[loop._number].requests[0], leading.prepare("Spell the word dog.")
    vars(request.prompt).update(vars(other.prompt))
    with pytest.raises(Apart):
        for one in steps:
            wire.follower.do(one)


def test_errors_of_one_rank_end_the_group_and_those_of_all_do_not(ranks, monkeypatch):
    leading, wire = ranks
    broken = leading.prepare("Spell the word frog.", seed=1)
    monkeypatch.setattr(type(broken.reader), "feed", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    wire.hold = True
    with pytest.raises(Failed, match=r"Rank 0 has failed \(RuntimeError: no memory\)"):
        list(leading.run(broken))
    wire.kept.clear()
    wire.hold = False


def test_what_ranks_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(main, "rank_here", object)
    refused = CliRunner().invoke(main.main, ["fuse", "--help"])
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (
        2, "Error: fuse runs in one process; leave out mlx.launch.",
    )  # fmt: skip
    monkeypatch.setattr(stdin, "rank_here", object)
    monkeypatch.setattr(stdin, "_is_pipe", lambda: True)
    with pytest.raises(CircumstanceError, match=r"passes stdin on without its end.* name a file in place of -"):
        stdin.read_prompt("-", (), None)
    monkeypatch.setattr(chat_input, "rank_here", object)
    said = []
    chat_input.chat_input(SimpleNamespace(warn=said.append))
    assert said == [chat_input.ENDLESS]
