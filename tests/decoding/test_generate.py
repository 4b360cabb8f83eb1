"""The block loop: against a plain loop over fresh prefixes, by rows, and through the engine on the demo."""

from dataclasses import fields, replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from loop import OPTIONS, Reader, plain_loop, request_of, run
from support import engine_of, gap, random_tokens, small_model

from mlx_dgemma.decoding.events import Block, Draft, Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import chunks, fitting_chunk, prefill
from mlx_dgemma.errors import OptionError
from mlx_dgemma.model.config import GenerationConfig, ProcessorConfig

PROMPTS = [
    "Write JSON for: Anna is 31 years old and lives in Oslo.",
    "Count from 3 to 30.",
    "Spell the word cat.",
    "What is the capital of France?",
]


@pytest.fixture(scope="module")
def model():
    return small_model(3, scale=0.2)  # calm enough for rounding not to grow from step to step


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.mark.parametrize(("seed", "stability"), [(3, 0), (4, 1), (2**63 + 5, 2), (3, 2)])
def test_generate_equals_a_plain_loop(model, seed, stability):
    options = replace(OPTIONS, stability_threshold=stability)
    prompt = random_tokens(1, 9).tolist()
    (events,), _ = run(model, [prompt], [4], [seed], options)
    blocks = [(event.tokens, event.steps) for event in events if isinstance(event, Block)]
    assert blocks == [told[:2] for told in plain_loop(model, prompt, 4, seed, options)]


def test_some_canvases_settle_and_some_do_not(model):
    """Otherwise the tests around this one would not reach the stop rule."""
    taken = set()
    for stability in range(3):
        (events,), _ = run(
            model, [random_tokens(1, 9).tolist()], [4], [3], replace(OPTIONS, stability_threshold=stability)
        )
        steps = tuple(event.steps for event in events if isinstance(event, Block))
        assert min(steps) < OPTIONS.max_denoising_steps
        taken.add(steps)
    assert len(taken) == 3
    assert max(steps) == OPTIONS.max_denoising_steps


@pytest.mark.parametrize("stability", [0, 1])
def test_rows_of_a_batch_equal_rows_alone(model, stability):
    """Prompts of other lengths, rows that settle and end at other times: each is as if it were alone."""
    prompts = [random_tokens(20 + n, n).tolist() for n in (7, 2, 11, 5)]
    blocks, seeds = [2, 4, 1, 3], [5, 6, 7, 8]
    options = replace(OPTIONS, stability_threshold=stability)
    events, readers = run(model, prompts, blocks, seeds, options)
    for row in range(4):
        (alone,), (reader,) = run(model, [prompts[row]], [blocks[row]], [seeds[row]], options)
        assert readers[row].taken == reader.taken
        mine = events[row]
        assert [(type(e), e.block) for e in mine] == [(type(e), e.block) for e in alone]
        assert [e.steps for e in mine if isinstance(e, Block)] == [e.steps for e in alone if isinstance(e, Block)]
        drafts = [(e.step, np.array(e.tokens).tolist()) for e in mine if isinstance(e, Draft)]
        assert drafts == [(e.step, np.array(e.tokens).tolist()) for e in alone if isinstance(e, Draft)]


def test_equal_rows_with_other_seeds_differ(model):
    prompt = random_tokens(1, 9).tolist()
    _, readers = run(model, [prompt] * 3, [3] * 3, [1, 2, 1])
    assert readers[0].taken == readers[2].taken != readers[1].taken


def test_events_of_a_block_are_its_drafts_and_then_the_block(model):
    (events,), _ = run(model, [random_tokens(1, 9).tolist()], [3], [0])
    for number in range(3):
        *drafts, block = [event for event in events if event.block == number]
        assert isinstance(block, Block)
        assert [draft.step for draft in drafts] == list(range(1, block.steps + 1))
        assert drafts[-1].tokens.tolist() == list(block.tokens)
        assert all(draft.accepted.any().item() and draft.entropy.shape == (4,) for draft in drafts)
    assert [event.block for event in events] == sorted(event.block for event in events)


def test_chunks_of_the_prompt_do_not_change_the_tokens(model):
    prompt = random_tokens(1, 23).tolist()
    whole = run(model, [prompt], [3], [0])[1][0].taken
    for chunk in (1, 4, 6):
        assert run(model, [prompt], [3], [0], chunk=chunk)[1][0].taken == whole


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_chunks_never_cut_a_picture(size):
    """Runs of true stay whole in every row; a chunk is longer than asked for only where a run is."""
    random = np.random.default_rng(size)
    for _ in range(30):
        held = np.repeat(random.random((2, 12)) < 0.3, 2, axis=1)
        borders = [0]
        for start, end in chunks(held, size):
            assert borders[-1] == start < end
            assert end == held.shape[1] or not (held[:, end - 1] & held[:, end]).any()
            inside = (held[:, start + 1 : end] & held[:, start : end - 1]).any(axis=0)
            assert end - start <= size or inside[size - 1 :].all()
            borders.append(end)
        assert borders[-1] == held.shape[1]


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_soft_tokens_land_on_their_placeholders_in_any_chunking(chunk):
    """Two padded rows with pictures of two sizes against one pass of each row alone."""
    model = small_model(5, scale=0.2)
    model.config = replace(model.config, image_token_id=7)
    rows = [[1, 2, 7, 7, 7, 3, 7, 4], [5, 7, 7, 6]]
    features = [mx.random.normal((row.count(7), 16), key=mx.random.key(i)) for i, row in enumerate(rows)]
    tokens, mask = np.array([rows[0], [0] * 4 + rows[1]], np.int32), np.array([[True] * 8, [False] * 4 + [True] * 4])
    prefix, canvas = model.new_prefix(2), random_tokens(0, 2, 4)
    prefill(model, prefix, tokens, chunk, mask, features)
    together = model.denoise(canvas, prefix)
    for i, row in enumerate(rows):
        alone = model.new_prefix()
        model.encode(mx.array([row]), alone, features=features[i])
        assert gap(together[i], model.denoise(canvas[i : i + 1], alone)[0]) < 1e-5


def test_a_chunk_fits_the_budget_of_scores():
    """At the release's 16 heads and window: halved while a sliding layer's scores exceed 256 MiB, never below 256."""
    release = SimpleNamespace(text=SimpleNamespace(num_attention_heads=16, sliding_window=1024))
    model = SimpleNamespace(config=release, dtype=mx.bfloat16, low_memory=False)
    assert [fitting_chunk(model, batch, 4096) for batch in (1, 2, 4, 8, 16, 64)] == [512, 512, 512, 512, 256, 256]
    assert [fitting_chunk(model, batch, 4097) for batch in (1, 2, 4, 8, 16, 64)] == [1024, 1024, 1024, 512, 256, 256]
    model.dtype = mx.float32
    assert [fitting_chunk(model, batch, 8192) for batch in (1, 2, 4)] == [1024, 1024, 512]
    release.text.sliding_window = 32768
    assert fitting_chunk(model, 1, 64) == 256


@pytest.mark.parametrize(("chunk", "taken"), [(None, [512] * 4), (2000, [2000, 48])])
def test_a_prefill_chunk_that_is_asked_for_is_taken_as_it_is(chunk, taken):
    encoded, tokens = [], np.zeros((4, 2048), np.int32)
    text = SimpleNamespace(num_attention_heads=16, sliding_window=1024)
    model = SimpleNamespace(
        config=SimpleNamespace(text=text, image_token_id=7, canvas_length=4),
        dtype=mx.bfloat16,
        low_memory=False,
        encode=lambda tokens, prefix, mask, features: encoded.append(tokens.shape[1]),
    )
    prefill(model, SimpleNamespace(batch_size=4, state=[], stages=[], in_flight=2**28), tokens, chunk)
    assert encoded == taken


def test_the_last_block_is_not_committed(model, monkeypatch):
    reader, encode, calls = Reader(3), model.encode, []
    request, session = request_of(model, [1, 2, 3], reader, 0, OPTIONS)
    monkeypatch.setattr(
        type(model),
        "encode",
        lambda self, tokens, *rest, **named: calls.append(tokens.tolist()) or encode(tokens, *rest, **named),
    )
    loop = Loop(model)
    loop.add(request, session)
    while loop.requests:
        list(loop.step())
    assert calls == [[[1, 2, 3]], [list(reader.taken[0])], [list(reader.taken[1])]]
    assert request.session.prefix.offset == 3 + 2 * 4


@pytest.mark.parametrize(("length", "blocks"), [(52, 3), (53, 2), (60, 1), (61, 0)])
def test_the_context_limit_cuts_the_text(model, length, blocks):
    """64 positions: a canvas is begun only where it fits."""
    _, (reader,) = run(model, [random_tokens(1, length).tolist()], [9], [0])
    assert len(reader.taken) == blocks
    assert reader.reason == "length"


def test_a_step_costs_one_forward_for_all_rows(model, monkeypatch):
    """Save for what is built ahead and thrown away when a row leaves."""
    calls = []
    denoise = model.denoise
    monkeypatch.setattr(type(model), "denoise", lambda self, *arguments: calls.append(1) or denoise(*arguments))
    prompt, options = random_tokens(1, 9).tolist(), replace(OPTIONS, stability_threshold=0)
    (events,), _ = run(model, [prompt], [1], [1], options)
    (block,) = [e for e in events if isinstance(e, Block)]
    assert block.steps == len(calls) == OPTIONS.max_denoising_steps  # the last possible step builds none ahead
    calls.clear()
    events, _ = run(model, [prompt] * 3, [1] * 3, [1, 0, 2], options)
    steps = [e.steps for row in events for e in row if isinstance(e, Block)]
    assert len(set(steps)) == 3
    assert max(steps) <= len(calls) < sum(steps)
    assert sum(isinstance(e, Draft) for row in events for e in row) == sum(steps)


@pytest.mark.parametrize("stability", [0, 1])
def test_rows_that_come_late_join_between_steps_and_change_nothing(model, stability):
    prompts = [random_tokens(20 + n, n).tolist() for n in (7, 2, 11, 5)]
    options = replace(OPTIONS, stability_threshold=stability)
    _, alone = run(model, prompts, [2] * 4, [5, 6, 7, 8], options)
    for late in ({1: 1, 2: 4}, {0: 3, 1: 12, 3: 2}, {3: 30}):
        _, readers = run(model, prompts, [2] * 4, [5, 6, 7, 8], options, late=late.items(), chunk=4)
        assert [reader.taken for reader in readers] == [reader.taken for reader in alone]


def test_a_job_that_is_removed_leaves_the_others_as_they_are(model):
    """While its prompt is encoded, while it is denoised beside others, and alone."""
    prompts = [random_tokens(20 + n, n).tolist() for n in (7, 2, 11)]
    _, alone = run(model, prompts, [2] * 3, [5, 6, 7])
    for removed in range(3):
        for after in (0, 1, 3, 6):
            readers = [Reader(2) for _ in prompts]
            requests = [request_of(model, *one, OPTIONS, None, 4) for one in zip(prompts, readers, (5, 6, 7))]
            loop = Loop(model)
            for one in requests:
                loop.add(*one)
            for _ in range(after):
                list(loop.step())
            loop.remove(requests[removed][0])
            assert requests[removed][0] not in loop.requests
            while loop.requests:
                list(loop.step())
            for row in {0, 1, 2} - {removed}:
                assert readers[row].taken == alone[row].taken


def test_a_job_that_fails_ends_alone(model):
    class Failing(Reader):
        def feed(self, tokens, log_probs):
            raise OptionError("too much")

    readers = [Reader(2), Failing(2)]
    requests = [request_of(model, random_tokens(3, 5).tolist(), reader, 1, OPTIONS) for reader in readers]
    loop, ends = Loop(model), []
    for one in requests:
        loop.add(*one)
    while loop.requests:
        ends += [(one, event) for one, event in loop.step() if isinstance(event, (Finished, Exception))]
    (failed, error), (finished, end) = ends
    assert (failed, str(error)) == (requests[1][0], "too much")
    assert (finished, type(end)) == (requests[0][0], Finished)
    assert readers[0].taken == run(model, [requests[0][0].prompt.tokens], [2], [1])[1][0].taken


# Through the engine.


@pytest.fixture(scope="module")
def answers(engine):
    return [engine.generate(prompt, seed=seed, max_tokens=100) for seed, prompt in enumerate(PROMPTS)]


def test_the_demo_answers(answers):
    assert answers[0].text == '{"name": "Anna", "age": 31, "city": "Oslo"}'
    assert answers[1].text.startswith("3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, ")
    assert answers[1].stats.blocks == 2
    assert answers[2].text == "c a t"


def test_watching_changes_nothing(engine, answers):
    events = list(engine.stream(PROMPTS[1], seed=1, max_tokens=100))
    assert events[-1].result.tokens == answers[1].tokens
    assert sum(isinstance(e, Draft) for e in events) == answers[1].stats.denoising_steps
    assert "".join(e.text for e in events if isinstance(e, Block)) == answers[1].text


def test_chunked_prefill_changes_nothing(engine, answers):
    chunked = engine.generate(PROMPTS[1], seed=1, max_tokens=100, prefill_chunk=16)
    assert chunked.tokens == answers[1].tokens


def test_a_batch_changes_nothing(engine, answers):
    together = engine.generate_batch(PROMPTS, seeds=[0, 1, 2, 3], max_tokens=100)
    assert [r.tokens for r in together] == [r.tokens for r in answers]
    assert [r.stats.denoising_steps for r in together] == [r.stats.denoising_steps for r in answers]
    assert [r.stats.blocks for r in together] == [r.stats.blocks for r in answers]


def test_a_batch_of_one_changes_nothing(engine, answers):
    (alone,) = engine.generate_batch(PROMPTS[:1], seeds=[0], max_tokens=100)
    assert alone.tokens == answers[0].tokens


def test_other_seeds_give_other_tokens(engine):
    texts = {
        engine.generate("Tell a story about a cat named Leo.", seed=s, max_denoising_steps=3).text for s in range(3)
    }
    assert len(texts) > 1


def test_max_tokens_cuts_the_text_and_not_the_canvas(engine, answers):
    events = list(engine.stream(PROMPTS[1], seed=1, max_tokens=10, drafts=False))
    block, result = events[0], events[-1].result
    assert result.tokens == answers[1].tokens[:10] == list(block.tokens[:10])
    assert len(block.tokens) == engine.config.canvas_length
    assert result.finish_reason == "length"
    assert answers[1].text.startswith(result.text)


@pytest.mark.parametrize("max_tokens", [64, 65])
def test_max_tokens_at_a_block_border(engine, max_tokens):
    result = engine.generate(PROMPTS[1], seed=1, max_tokens=max_tokens)
    assert len(result.tokens) == max_tokens
    assert result.stats.blocks == max_tokens - 63
    assert result.finish_reason == "length"


def test_an_end_token_ends_the_text_and_is_left_out(engine, answers):
    assert answers[0].finish_reason == "stop"
    assert not set(answers[0].tokens) & set(engine.options.end_tokens)
    comma = engine.tokenizer.encode(",", add_special_tokens=False)[-1]
    at = answers[0].tokens.index(comma)
    cut = engine.generate(PROMPTS[0], seed=0, end_tokens=(comma,))
    assert cut.tokens == answers[0].tokens[:at]
    assert cut.finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_it(engine):
    result = engine.generate(PROMPTS[0], seed=0, stop=('"city"', ' "age"'))
    assert result.text == '{"name": "Anna",'
    assert result.finish_reason == "stop"


def test_a_stop_string_may_straddle_a_block_border(engine, answers):
    first = engine.tokenizer.decode(answers[1].tokens[:64])
    assert answers[1].text.startswith(first)
    stop = answers[1].text[len(first) - 3 : len(first) + 3]
    events = list(engine.stream(PROMPTS[1], seed=1, max_tokens=100, stop=stop, drafts=False))
    at = answers[1].text.find(stop)
    assert len(first) - 3 == at  # the string is nowhere before the border
    assert [e.text for e in events[:-1]] == [first[:-3], ""]
    assert events[-1].result.text == first[:-3]
    assert events[-1].result.finish_reason == "stop"


# Options.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens is 0; it should be a whole number, at least 1."),
        ("max_tokens", 2.0, "max_tokens is 2.0; it should be a whole number, at least 1."),
        ("max_tokens", True, "max_tokens is True; it should be a whole number, at least 1."),
        ("max_denoising_steps", 0, "max_denoising_steps is 0; it should be a whole number, at least 1."),
        ("max_denoising_steps", "8", "max_denoising_steps is '8'; it should be a whole number, at least 1."),
        ("entropy_bound", -0.1, "entropy_bound is -0.1; it should be a number, at least 0."),
        ("entropy_bound", float("nan"), "entropy_bound is nan; it should be a number, at least 0."),
        ("entropy_bound", float("inf"), "entropy_bound is inf; it should be a number, at least 0."),
        ("t_min", -0.5, "t_min is -0.5; it should be a number, at least 0."),
        ("t_max", 0.3, "t_max is 0.3; it should be a number, at least t_min = 0.4."),
        ("stability_threshold", -1, "stability_threshold is -1; it should be a whole number, at least 0."),
        ("stability_threshold", 1.5, "stability_threshold is 1.5; it should be a whole number, at least 0."),
        ("confidence_threshold", -1.0, "confidence_threshold is -1.0; it should be a number, at least 0."),
        ("confidence_threshold", False, "confidence_threshold is False; it should be a number, at least 0."),
        ("prefill_chunk", 0, "prefill_chunk is 0; it should be a whole number, at least 1."),
        ("stop", ("a", ""), "stop is ('a', ''); it should be strings that are not empty."),
        ("prefill_chunk", 2.5, "prefill_chunk is 2.5; it should be a whole number, at least 1."),
        ("max_frames", 0, "max_frames is 0; it should be a whole number, at least 1."),
        ("fps", -1, "fps is -1; it should be a number, at least 0."),
        ("fps", 0, "fps is 0; it should be above 0."),
        ("stop", [3], "stop is [3]; it should be strings that are not empty."),
        ("stop", 3, "stop is 3; it should be strings that are not empty."),
        ("stop", "", "stop is ''; it should be strings that are not empty."),
        ("end_tokens", "x", "end_tokens is 'x'; it should be token ids."),
        ("end_tokens", (1, "x"), "end_tokens is (1, 'x'); it should be token ids."),
    ],
)
def test_a_value_outside_its_bounds_is_named(name, value, message):
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**{name: value})
    assert str(caught.value) == message


def test_temperature_zero_throughout_is_refused():
    with pytest.raises(OptionError) as caught:
        GenerationOptions(t_min=0, t_max=0)
    assert str(caught.value) == "t_max is 0; it should be above 0."


@pytest.mark.parametrize(
    "least",
    [
        {"max_tokens": 1},
        {"max_denoising_steps": 1},
        {"entropy_bound": 0},
        {"t_min": 0},
        {"t_max": 0.4},
        {"stability_threshold": 0},
        {"confidence_threshold": 0},
        {"prefill_chunk": 1},
    ],
)
def test_the_least_value_is_taken(least):
    options = GenerationOptions(**least)
    assert all(getattr(options, name) == value for name, value in least.items())


def test_an_unknown_option_is_named_with_the_nearest_one():
    with pytest.raises(OptionError) as caught:
        GenerationOptions().override(max_denoising_step=3)
    assert str(caught.value) == "max_denoising_step is not an option; did you mean max_denoising_steps?"
    with pytest.raises(OptionError) as caught:
        GenerationOptions().override(zzz=3)
    known = ", ".join(f.name for f in fields(GenerationOptions))
    assert str(caught.value) == f"zzz is not an option; the options are {known}."


def test_override_replaces_what_is_given_and_checks_it():
    options = GenerationOptions(max_tokens=7, t_min=0.5).override(max_tokens=None, t_max=0.6, stop="end")
    assert (options.max_tokens, options.t_min, options.t_max, options.stop) == (7, 0.5, 0.6, ("end",))
    with pytest.raises(OptionError, match=r"^t_max is 0.2; it should be a number, at least t_min = 0.5.$"):
        options.override(t_max=0.2)


def test_one_string_or_token_is_a_tuple_of_one():
    options = GenerationOptions(stop="end", end_tokens=7)
    assert (options.stop, options.end_tokens) == (("end",), (7,))
    assert GenerationOptions(stop=["a", "b"], end_tokens=[]).stop == ("a", "b")


def test_the_checkpoints_own_settings_are_the_defaults():
    own = GenerationConfig(
        max_new_tokens=9,
        max_denoising_steps=8,
        entropy_bound=0.7,
        t_min=0.1,
        t_max=0.2,
        stability_threshold=2,
        confidence_threshold=0.3,
        eos_token_ids=(4, 5),
    )
    assert GenerationOptions.of(own, ProcessorConfig(image_tokens=140, video_frames=6)) == GenerationOptions(
        max_tokens=9,
        max_denoising_steps=8,
        entropy_bound=0.7,
        t_min=0.1,
        t_max=0.2,
        stability_threshold=2,
        confidence_threshold=0.3,
        end_tokens=(4, 5),
        image_tokens=140,
        max_frames=6,
    )
