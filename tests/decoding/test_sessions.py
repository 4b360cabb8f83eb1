"""Sessions have one owner, and whatever interrupts an answer leaves a session that answers as a fresh one does."""

import random
from dataclasses import replace
from itertools import count

import mlx.core as mx
import numpy as np
import pytest
from loop import OPTIONS, Reader, request_of, tiny_engine, tiny_request
from prefixes import alone, some
from support import engine_of, gap, random_tokens, small_model

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.session import PromptTokens, Session
from mlx_dgemma.errors import OptionError
from mlx_dgemma.model.layers import Layer

PROMPT = some(1, 23)  # the window is 5, so that every chunk wraps the rings


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


def answer(engine, session, prompt=PROMPT):
    """The result of an answer with a session, whose tokens are those without one."""
    (*_, finished) = engine.run(tiny_request(prompt, 1), session)
    assert finished.result.tokens == alone(tuple(prompt))[0]
    assert_in_step(session)
    return finished.result


def assert_in_step(session):
    assert len(session.cache_key) == session.prefix.offset


def interrupted(engine, monkeypatch, session, prompt, layer, error, **options):
    """Run a request whose layer with this number, counted over all passes, raises; returns whether it was reached."""
    numbers = count()

    def apply(*arguments):
        if next(numbers) == layer:
            raise error
        return Layer.__call__(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "_apply", apply)
        try:
            for _ in engine.run(tiny_request(prompt, **options), session):
                pass
        except type(error):
            return True
    return False


def test_an_answer_without_a_session_holds_its_rings_once(engine):
    def after(session):
        request = tiny_request(PROMPT, 1)
        [*engine.run(request, session)]
        return request.session.prefix

    prefix, kept = after(None), after(engine.session())
    assert prefix.nbytes == sum(array.nbytes for array in prefix.state) < kept.nbytes


def test_a_second_stream_on_a_session_is_refused_and_the_first_goes_on(engine):
    session = engine.session()
    events = engine.run(tiny_request(PROMPT, 2), session)
    for _ in range(3):
        next(events)
    with pytest.raises(OptionError, match="in use by another answer"):
        next(engine.run(tiny_request(some(2, 9)), session))
    (*_, finished) = events
    assert finished.result.tokens == alone(tuple(PROMPT), 2)[0]
    answer(engine, session, some(2, 9))


@pytest.mark.parametrize("how", ["close", "finished", "garbage"])
def test_a_stream_that_is_left_lets_its_session_go(engine, how):
    session = engine.session()
    events = engine.run(tiny_request(PROMPT, 2, prefill_chunk=4), session)
    for event in events:
        if how != "finished" or isinstance(event, Finished):
            break
    if how == "close":
        events.close()
    elif how == "garbage":
        del events
    assert session.owner is None
    assert_in_step(session)
    answer(engine, session)


def test_a_session_of_another_model_is_refused_at_once(engine):
    with pytest.raises(OptionError, match="belongs to another engine"):
        next(tiny_engine().run(tiny_request(PROMPT), engine.session()))


def test_a_stream_with_a_session_of_another_engine_is_refused_before_its_first_event(demo):
    with pytest.raises(OptionError, match="belongs to another engine"):
        engine_of(demo).stream("Hi", session=tiny_engine().session())


def test_a_refused_request_leaves_the_owner_as_it_is(engine):
    loop, session = Loop(engine.model), engine.session()
    first, second = tiny_request(PROMPT), tiny_request(PROMPT)
    loop.add(first, session)
    with pytest.raises(OptionError):
        loop.add(second, session)
    assert loop.requests == [first]
    assert session.owner is first
    loop.remove(second)
    assert session.owner is first
    loop.remove(first)
    assert session.owner is None


def test_a_row_that_comes_late_joins_at_the_next_step(engine):
    """It waits for the step that is under way, not for the end of a canvas."""
    steady = replace(OPTIONS, max_denoising_steps=30, stability_threshold=30)
    first, second = (request_of(engine.model, random_tokens(n, 6).tolist(), Reader(1), n, steady) for n in (1, 2))
    loop = Loop(engine.model)
    loop.add(*first)
    for _ in range(3):
        list(loop.step())
    loop.add(*second)
    assert [request for request, _ in loop.step()] == [first[0]]  # its prompt, and the step that was under way
    assert [request for request, _ in loop.step()] == [first[0], second[0]]


@pytest.mark.parametrize(
    ("first", "error"), [(1, KeyboardInterrupt()), (4, GeneratorExit()), (7, RuntimeError("[metal::malloc] too much"))]
)
def test_an_interrupt_between_two_layers_changes_no_later_answer(engine, monkeypatch, first, error):
    """In layers of every pass: chunks of a prompt, canvases and commits, with and without a rewind point."""
    second = [*PROMPT[:19], *some(3, 14)]
    for begun in (False, True):
        for layer in count(first, 9):
            session = engine.session()
            if begun:
                answer(engine, session)
            options = {"blocks": 2, "prefill_chunk": 6, "max_denoising_steps": 1}
            reached = interrupted(engine, monkeypatch, session, second, layer, error, **options)
            assert session.owner is None
            assert_in_step(session)
            answer(engine, session, second)
            if not reached:
                break
        assert layer > 6 * len(engine.model.model.decoder.layers)


def test_an_interrupt_keeps_what_the_rewind_point_holds(engine, monkeypatch):
    session = engine.session()
    answer(engine, session)
    longer = [*PROMPT, *some(4, 12)]
    assert interrupted(engine, monkeypatch, session, longer, 5, KeyboardInterrupt(), prefill_chunk=6)
    assert session.prefix.offset == len(PROMPT)
    assert answer(engine, session, longer).stats.reused_tokens == len(PROMPT)


def test_an_error_of_a_step_resets_the_sessions_of_its_batch(engine, monkeypatch):
    session, passes = engine.session(), -(-len(PROMPT) // 512)
    layer = passes * len(engine.model.model.decoder.layers) + 1
    assert interrupted(engine, monkeypatch, session, PROMPT, layer, RuntimeError("no memory"))
    assert session.prefix.offset == 0 == len(session.cache_key)


def test_a_prompt_that_comes_again_forgets_what_came_behind_it(engine):
    """Its whole is reused, so that no chunk sets the tokens right."""
    session = engine.session()
    for _ in range(2):
        session.encode_all(PromptTokens(PROMPT, list(PROMPT)))
        session.commit(mx.array([[1, 2, 3, 4]]))
    assert session.rewind_to_shared(PROMPT) == len(PROMPT)
    assert session.cache_key == PROMPT
    session.commit(mx.array([[1, 2, 3, 4]]))
    session.encode_all(PromptTokens(PROMPT, list(PROMPT)))
    assert session.cache_key == PROMPT
    assert session.reused_tokens == len(PROMPT) == session.prefix.offset


def test_a_conversation_keeps_the_newest_pictures_alone(engine):
    session = engine.session()
    session.features = {str(i): mx.zeros((1, 2)) for i in range(70)}
    session.encode_all(PromptTokens(PROMPT, list(PROMPT)))
    assert list(session.features) == [str(i) for i in range(6, 70)]


def test_random_operations_on_sessions_leave_what_a_fresh_prefix_holds():
    """Prompts that share beginnings, commits, forks, snapshots and interrupts, in any order."""
    model, draw = small_model(1), random.Random(0)
    canvas, sessions = random_tokens(2, 1, 4), [Session(model)]
    layers = len(model.model.decoder.layers)
    for turn in range(60):
        session = draw.choice(sessions)
        what = draw.choice(["encode", "encode", "commit", "fork", "interrupt"])
        shared = session.cache_key[: draw.randint(0, len(session.cache_key))]
        tokens = [*shared, *(draw.randrange(40) for _ in range(draw.randint(1, 12)))][:48]
        prompt, chunk, at = PromptTokens(tokens, list(tokens)), draw.choice([2, 5, 64]), draw.randint(0, len(tokens))
        if what == "encode":
            for _ in session.encode(prompt, chunk, at):
                if draw.random() < 0.1:
                    break
            else:
                assert session.cache_key == tokens
            snapshot = session.take_snapshot()
            sessions += [snapshot] if snapshot else []
        elif what == "commit" and session.prefix.offset < 56:
            session.commit(mx.array([[draw.randrange(40) for _ in range(4)]]))
        elif what == "fork":
            sessions.append(session.fork())
        elif what == "interrupt":
            numbers, last = count(), draw.randrange(2 * layers)

            def apply(*arguments, numbers=numbers, last=last):
                if next(numbers) == last:
                    raise KeyboardInterrupt
                return Layer.__call__(*arguments)

            model._apply = apply
            try:
                session.encode_all(prompt, chunk)
            except KeyboardInterrupt:
                pass
            finally:
                model._apply = Layer.__call__
        sessions = draw.sample(sessions, min(len(sessions), 4))
        for one in sessions if turn % 10 == 9 else [session]:
            assert_in_step(one)
            fresh = model.new_prefix()
            if one.cache_key:
                model.encode(mx.array([one.cache_key]), fresh)
            assert gap(model.denoise(canvas, one.prefix), model.denoise(canvas, fresh)) < 1e-5


def test_random_operations_on_a_batch_leave_what_a_fresh_prefix_holds():
    """Encoding, dropping rows, forks, rewinding, rewind points, trimming and arrays, in any order."""
    model, draw = small_model(1), random.Random(1)
    for _ in range(8):
        rows = draw.randint(1, 3)
        prefix, tokens = model.new_prefix(rows), np.zeros((rows, 0), np.int32)
        for _ in range(12):
            what = draw.choice(["encode", "encode", "rewind", "mark", "rows", "fork", "trim", "arrays", "denoise"])
            rows = prefix.batch_size
            if what == "encode" and tokens.shape[1] < 48:
                new = np.array([[draw.randrange(40) for _ in range(draw.randint(1, 9))]] * rows, np.int32)
                new = (new + 7 * np.arange(rows)[:, None].astype(np.int32)) % 40
                model.encode(mx.array(new), prefix)
                tokens = np.concatenate([tokens, new], axis=1)
            elif what == "rewind":
                tokens = tokens[:, : prefix.rewind(draw.randint(0, tokens.shape[1]))]
            elif what == "mark":
                prefix.set_rewind_point()
            elif what == "rows":
                kept = draw.sample(range(rows), draw.randint(1, rows))
                prefix.select_rows(kept)
                tokens = tokens[kept]
            elif what == "fork":
                left, prefix = prefix, prefix.fork()
                model.encode(mx.array(np.full((rows, 6), 3)), left)  # in one of the two alone
            elif what == "trim":
                prefix.trim()
            elif what == "arrays" and tokens.size:
                saved, prefix = prefix.to_arrays(), model.new_prefix(rows)
                prefix.load_arrays(*saved)
            canvas = random_tokens(2, prefix.batch_size, 4)
            fresh = model.new_prefix(prefix.batch_size)
            if tokens.size:
                model.encode(mx.array(tokens), fresh)
            assert prefix.offset == tokens.shape[1]
            assert gap(model.denoise(canvas, prefix), model.denoise(canvas, fresh)) < 1e-5
