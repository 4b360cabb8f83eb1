"""Requests are prepared beside each other: the slow ones hold up nobody, and every language is bounded."""

import os
import pickle
import sys
import threading
import time

import numpy as np
import pytest
from listeners import LIMIT, Listener, until
from loop import tiny_request

from mlx_dgemma.errors import OptionError
from mlx_dgemma.prompt.lanes import HERE, LANES, make_language
from mlx_dgemma.prompt.languages import Languages
from mlx_dgemma.serving.automata import Automata, Cancelled
from mlx_dgemma.serving.automaton_worker import NICENESS
from mlx_dgemma.serving.preparation import Preparation
from mlx_dgemma.serving.tickets import Ticket


class Held:
    """In the place of `Automata`: languages that are made when `go_on` is set."""

    def __init__(self):
        self.go_on, self.asked, self.closed = threading.Event(), [], False

    def make(self, kind, source, token_bytes, what, stop):
        self.asked.append(source)
        while not self.go_on.wait(0.01):
            if stop():
                raise Cancelled
        return source

    def close(self):
        self.closed = True


@pytest.fixture
def prepared():
    """(preparation with one slot, its automata, tickets that are done in their order)"""
    done, automata = [], Held()
    preparation = Preparation(done.append, slots=1, automata=automata)
    yield preparation, automata, done
    automata.go_on.set()
    preparation.close()


def ticket(prepare):
    return Ticket(prepare, Listener(), False)


def constrained(pattern="a"):
    def prepare():
        LANES.get().language("regex", pattern, None, "It")
        return tiny_request([1])

    return ticket(prepare)


def test_automata_and_pictures_hold_up_only_their_own_kind(prepared):
    preparation, automata, done = prepared
    decoding, go_on = [], threading.Event()

    def decode():
        decoding.append(1)
        assert go_on.wait(LIMIT)
        assert len(decoding) == 1  # one at a time
        decoding.pop()

    def picture():
        LANES.get().picture(decode)
        return tiny_request([1])

    pictures, patterns = [ticket(picture) for _ in range(3)], [constrained(f"{i}") for i in range(20)]
    plain = ticket(lambda: tiny_request([1]))
    for one in (*pictures, *patterns, plain):
        preparation.submit(one)
    until(lambda: done)
    assert done == [plain]
    go_on.set()
    until(lambda: len(done) == 4)
    assert set(done) == {plain, *pictures}
    automata.go_on.set()
    until(lambda: len(done) == 24)
    assert all(one.request is not None and one.error is None for one in done)


def test_those_who_compute_are_bounded(prepared):
    preparation, _, done = prepared
    inside, order = [], []

    def computing(i):
        inside.append(i)
        time.sleep(0.001)
        order.append(list(inside))
        inside.remove(i)
        return tiny_request([1])

    tickets = [ticket(lambda i=i: computing(i)) for i in range(20)]
    for one in tickets:
        preparation.submit(one)
    until(lambda: len(done) == 20)
    assert order == [[i] for i in range(20)]


def test_who_leaves_while_waiting_is_never_prepared(prepared):
    preparation, automata, done = prepared
    go_on, called = threading.Event(), []
    first = ticket(lambda: go_on.wait(LIMIT) and tiny_request([1]))
    second, third = (ticket(lambda: called.append(1)) for _ in range(2))
    preparation.submit(first)
    preparation.submit(second)
    second.cancel()
    preparation.submit(third)  # sees that the second one has left
    assert done == [second]
    third.cancel()
    go_on.set()
    until(lambda: len(done) == 3)
    assert not called
    leaving = constrained()
    preparation.submit(leaving)
    until(lambda: automata.asked)
    leaving.cancel()
    until(lambda: leaving in done)
    assert isinstance(leaving.error, Cancelled)


def test_who_leaves_while_others_look_decodes_no_picture(prepared):
    preparation, _, done = prepared
    go_on, asked, inside = threading.Event(), [], []

    def decode():
        inside.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        assert go_on.wait(LIMIT)

    def picture():
        asked.append(1)
        LANES.get().picture(decode)
        return tiny_request([1])

    first, second = ticket(picture), ticket(picture)
    preparation.submit(first)
    preparation.submit(second)
    until(lambda: inside and len(asked) == 2)
    second.cancel()
    go_on.set()
    until(lambda: len(done) == 2)
    assert isinstance(second.error, Cancelled)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert inside == [NICENESS if sys.platform == "linux" else own]


# Languages.


@pytest.fixture(scope="module")
def token_bytes(engine):
    return engine.builder.token_bytes


def test_a_process_makes_the_same_languages_and_errors(token_bytes):
    automata = Automata(processes=1)
    schema = {"type": "object", "properties": {"a": {"enum": [1, "é"]}}}
    for kind, source in (("regex", "[a-z]{2,5}|é"), ("plain", "abc"), ("schema", schema)):
        made, expected = automata.make(kind, source, token_bytes, "It"), make_language(kind, source, token_bytes, "It")
        assert np.array_equal(made.table, expected.table)
        assert np.array_equal(made.distance, expected.distance)
        assert made.token_bytes is token_bytes
        assert made._walks._token_bytes is token_bytes
    pids = {process._popen.pid for process in automata._idle}
    for kind, source in (("regex", "(a"), ("regex", ".*"), ("schema", {"type": 1}), ("regex", r"a\b")):
        with pytest.raises(OptionError) as expected:
            make_language(kind, source, token_bytes, "It")
        with pytest.raises(OptionError) as error:
            automata.make(kind, source, token_bytes, "It")
        assert str(error.value) == str(expected.value)
    assert {process._popen.pid for process in automata._idle} == pids  # one process did it all
    (process,) = automata._idle
    process._popen.kill()  # as a system without memory does
    process._popen.wait()
    assert len(automata.make("plain", "ab", token_bytes, "It").table) == 4
    (process,) = automata._idle
    automata._idle_seconds = 0.0
    automata.make("plain", "a", token_bytes, "It")
    until(lambda: not automata._idle)
    until(lambda: process.ended)
    automata._idle_seconds = LIMIT
    automata.make("plain", "a", token_bytes, "It")
    (process,) = automata._idle
    automata.close()
    assert process.ended
    with pytest.raises(Cancelled):
        automata.make("plain", "a", token_bytes, "It")


def test_a_language_that_takes_too_long_is_refused_and_one_that_nobody_wants_is_dropped(token_bytes):
    automata = Automata(seconds=0)  # the process needs longer to start
    with pytest.raises(OptionError, match=r"^It takes more than 0 s or too much memory to prepare: ask for smaller"):
        automata.make("plain", "a", token_bytes, "It")
    with pytest.raises(Cancelled):
        Automata(seconds=1).make("plain", "a", token_bytes, "It", stop=lambda: True)
    assert automata._idle == automata._busy == []


def test_a_refusal_is_remembered(token_bytes, monkeypatch):
    languages, calls = Languages(lambda: token_bytes), []

    def language(kind, source, token_bytes, what):
        calls.append(source)
        if source == "lost":
            raise MemoryError
        raise OptionError(f"{what} is no good: {source}.")

    monkeypatch.setattr(HERE, "language", language)
    for source in ("a", "b", "a", {"type": "b"}, {"type": "b"}):
        with pytest.raises(OptionError, match=r"^It is no good: "):
            languages.get("regex", source, "It")
    assert calls == ["a", "b", {"type": "b"}]
    for _ in range(2):
        with pytest.raises(MemoryError):  # which says nothing about the pattern
            languages.get("regex", "lost", "It")
    for i in range(300):
        with pytest.raises(OptionError):
            languages.get("regex", f"{i}", "It")
    assert len(languages._refused) == 256


def test_languages_are_kept_within_a_size(token_bytes):
    languages = Languages(lambda: token_bytes, max_bytes=3 * 10**6)
    patterns = [f".{{50}}|{i}" for i in range(4)]  # a million bytes each
    made = [languages.get("regex", one, "It") for one in patterns]
    sizes = [len(pickle.dumps({name: it for name, it in vars(one).items() if name != "token_bytes"})) for one in made]
    assert [one.nbytes for one in made] == pytest.approx(sizes, rel=0.2)
    assert [*languages._made.values()] == made[2:]
    tokens = np.flatnonzero(token_bytes.length)
    languages._max_bytes = sum(one.nbytes for one in made[2:])
    assert languages.get("regex", patterns[2], "It") is made[2]
    assert [*languages._made.values()] == [made[3], made[2]]
    made[2].likely_moves(tokens[None], np.zeros((1, len(tokens))))  # what it learns of tokens counts, too
    assert languages.get("regex", patterns[2], "It") is made[2]
    assert [*languages._made.values()] == [made[2]]
    languages._max_bytes = 0
    assert languages.get("regex", patterns[0], "It") is languages.get("regex", patterns[0], "It")


def test_large_languages_that_are_asked_for_once_push_none_out(token_bytes):
    languages = Languages(lambda: token_bytes)
    small = languages.get("regex", "a+", "It")
    for i in range(20):
        large = languages.get("regex", f".{{400}}|{i}", "It")
    assert large.nbytes > 2**22 and [*languages._made.values()] == [small] and len(languages._large) == 20
    again = languages.get("regex", ".{400}|19", "It")
    assert again is not large and languages.get("regex", ".{400}|19", "It") is again and len(languages._large) == 19
