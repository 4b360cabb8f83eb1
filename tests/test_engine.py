"""The public names: what they take, give, and refuse at once."""

import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import fields, replace

import mlx.core as mx
import pytest
from support import engine_of, refusal

import mlx_dgemma
from mlx_dgemma import Block, Draft, Engine, Finished, GenerationOptions, OptionError, PromptError, Result
from mlx_dgemma.decoding import lookahead
from mlx_dgemma.decoding.events import Stats
from mlx_dgemma.decoding.options import OptionKeywords
from mlx_dgemma.model import device
from mlx_dgemma.tasks import answer, choose, edit, fill, infill

JSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
ANSWER = '{"name": "Anna", "age": 31, "city": "Oslo"}'
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture(scope="module")
def result(engine):
    return engine.generate(JSON, seed=0)


def message(kind, function, *arguments, **keywords):
    with pytest.raises(kind) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def test_the_package_gives_its_public_names():
    for name in mlx_dgemma.__all__:
        assert inspect.isclass(getattr(mlx_dgemma, name)) or inspect.isfunction(getattr(mlx_dgemma, name))
    assert {"load", "Draft", "Block", "Finished"} <= set(mlx_dgemma.__all__)
    with pytest.raises(AttributeError, match=r"^module 'mlx_dgemma' has no attribute 'nothing'$"):
        mlx_dgemma.nothing  # noqa: B018


def test_typed_keywords_are_those_that_the_verbs_take():
    """Type checkers read these; the functions themselves check at run time."""
    options = {f.name for f in fields(GenerationOptions)}
    assert set(OptionKeywords.__annotations__) == options
    for task, keywords in (
        (answer.answer, answer.AnswerKeywords),
        (infill.infill, infill.InfillKeywords),
        (fill.fill, fill.FillKeywords),
        (edit.edit, edit.EditKeywords),
    ):
        own = {n for n, one in inspect.signature(task).parameters.items() if one.kind is one.KEYWORD_ONLY}
        assert set(keywords.__annotations__) == own | options
    own = {n for n, one in inspect.signature(choose.ask).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert set(choose.ChooseKeywords.__annotations__) == own | set(choose.OPTIONS)


def test_engines_and_sessions_are_shown_in_a_line(demo):
    engine = engine_of(demo)
    assert repr(engine) == f"Engine({str(demo)!r}, mlx.core.float32)"
    assert repr(engine.session()) == "Session(0 tokens)"


def test_an_engine_is_not_pickled(demo):
    told = "An Engine holds a model's weights, so it is not pickled; give its path, and load it there."
    assert refusal(TypeError, pickle.dumps, engine_of(demo)) == told


def test_importing_the_package_does_not_import_mlx():
    code = "import sys, mlx_dgemma; sys.exit('mlx' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_engine_shows_its_parts(engine):
    assert isinstance(engine, Engine)
    assert engine.config is engine.model.config
    assert engine.config.canvas_length == 64
    assert engine.tokenizer.decode(engine.tokenizer.encode("Hi", add_special_tokens=False)) == "Hi"
    assert isinstance(engine.options, GenerationOptions)


def test_the_options_are_the_checkpoints(engine):
    options = engine.options
    assert (options.max_tokens, options.max_denoising_steps, options.entropy_bound) == (256, 48, 0.1)
    assert (options.t_min, options.t_max) == (0.4, 0.8)
    assert (options.stability_threshold, options.confidence_threshold) == (1, 0.005)
    assert options.end_tokens == (1, 16, 9)  # the generation config's, not the config's (1, 16)


def test_the_bundled_demo_is_the_default(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)
    assert mlx_dgemma.load().generate(JSON, seed=0).text == ANSWER


def test_a_result_says_everything(engine, result):
    assert isinstance(result, Result)
    assert (result.text, result.thinking, result.tool_calls, result.finish_reason) == (ANSWER, "", [], "stop")
    assert engine.tokenizer.decode(result.tokens) == ANSWER


def test_statistics(engine, result):
    names = [f.name for f in fields(Stats)]
    expected = """prompt_tokens reused_tokens generated_tokens blocks denoising_steps canvas_positions seconds
        time_to_first_block tokens_per_second peak_memory_bytes seed""".split()
    assert set(expected) <= set(names)
    stats = result.stats
    assert stats.prompt_tokens == len(
        engine.tokenizer.encode(f"<bos><|turn>user\n{JSON}<turn|>\n<|turn>model\n", add_special_tokens=False)
    )
    assert (stats.reused_tokens, stats.generated_tokens, stats.blocks, stats.seed) == (0, len(result.tokens), 1, 0)
    assert 1 <= stats.denoising_steps <= 48
    assert stats.canvas_positions == 64 * stats.denoising_steps
    assert set(stats.seconds) == {"load", "prefill", "denoise", "total"}
    assert all(value > 0 for value in stats.seconds.values())
    assert stats.seconds["total"] == pytest.approx(stats.seconds["prefill"] + stats.seconds["denoise"])
    assert 0 < stats.time_to_first_block <= stats.seconds["total"]
    assert stats.tokens_per_second == pytest.approx(stats.generated_tokens / stats.seconds["total"])
    assert stats.peak_memory_bytes > 4 * engine.checkpoint.parameters


def test_events_come_in_order(engine, result):
    events = list(engine.stream(JSON, seed=0))
    kinds = [type(event) for event in events]
    steps = result.stats.denoising_steps
    assert kinds == [Draft] * steps + [Block, Finished]
    assert [event.step for event in events[:steps]] == list(range(1, steps + 1))
    draft, block, finished = events[-3:]
    assert draft.text == block.text == finished.result.text == ANSWER
    assert (draft.block, block.block, block.steps) == (0, 0, steps)
    assert draft.tokens.tolist() == list(block.tokens)
    assert draft.accepted.shape == draft.entropy.shape == (64,)
    assert finished.result.tokens == result.tokens
    assert finished.result.stats.seed == 0


def test_drafts_can_be_left_out(engine):
    assert [type(event) for event in engine.stream(JSON, seed=0, drafts=False)] == [Block, Finished]


def test_thinking_is_a_field(engine):
    events = list(engine.stream("What is 25 + 31?", seed=0, thinking=True, drafts=False))
    result = events[-1].result
    assert result.thinking.startswith("Ones: ")
    assert result.text.startswith("25 + 31 = ")
    assert "".join(event.thinking for event in events[:-1]) == result.thinking
    assert engine.generate("What is 25 + 31?", seed=0).thinking == ""


def test_tool_calls_are_a_field(engine):
    result = engine.generate("What is the weather in Oslo?", tools=[TOOL], seed=0)
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert result.tool_calls == [{"id": "call_0", "type": "function", "function": function}]
    assert (result.text, result.finish_reason) == ("", "tool_calls")


def test_a_system_message_counts(engine):
    plain = engine.generate("What is the capital of France?", seed=0)
    loud = engine.generate("What is the capital of France?", system="Answer in uppercase.", seed=0)
    assert plain.text == "The capital of France is Paris."
    assert loud.text == plain.text.upper()


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_mistakes_are_told_before_anything_is_computed(engine, call, monkeypatch):
    """A stream raises when it is called, not when it is first asked for an event."""
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))
    ask = getattr(engine, call)
    assert message(OptionError, ask, "Hi", entropy_bond=0.2) == (
        "entropy_bond is not an option; did you mean entropy_bound?"
    )
    assert message(OptionError, ask, "Hi", max_tokens=0) == "max_tokens is 0; it should be a whole number, at least 1."
    assert message(PromptError, ask, "") == "The prompt is empty; say what you want."
    for seed in (-1, 2**64, 1.5, "0", True):
        assert message(OptionError, ask, "Hi", seed=seed) == (
            f"seed is {seed!r}; it should be a whole number from 0 to 2**64 - 1."
        )


def test_a_prompt_longer_than_the_context_is_refused(engine):
    text = message(PromptError, engine.stream, "cat " * 5000)
    assert text.startswith("The prompt has ")
    assert text.endswith(" tokens, but the context leaves room for 4032 beside a canvas of 64; shorten it.")
    text = message(PromptError, engine.stream, "x" * 10**6)
    assert re.fullmatch(
        r"The prompt has 1000\d+ characters, but the context leaves room for 4032 tokens of at most \d+; shorten it\.",
        text,
    )


def test_batches_refuse_what_single_prompts_refuse(engine):
    assert message(OptionError, engine.generate_batch, ["a", "b"], seeds=[1]) == (
        "There are 2 prompts and 1 seeds; give one seed a prompt."
    )
    assert message(PromptError, engine.generate_batch, []) == "There are no prompts; give at least one."
    assert message(PromptError, engine.generate_batch, ["a", " "]) == "The prompt is empty; say what you want."
    assert message(OptionError, engine.generate_batch, ["a"], zzz=1).startswith(
        "zzz is not an option; the options are "
    )


def test_without_a_seed_one_is_drawn_and_repeats_the_answer(engine):
    story = "Tell a story about a cat named Leo."
    first = engine.generate(story, max_denoising_steps=2)
    second = engine.generate(story, max_denoising_steps=2)
    assert first.stats.seed != second.stats.seed
    assert engine.generate(story, max_denoising_steps=2, seed=first.stats.seed).tokens == first.tokens


def test_a_batch_without_seeds_draws_one_for_each(engine):
    results = engine.generate_batch(["Hi", "Hi"], max_denoising_steps=1)
    assert results[0].stats.seed != results[1].stats.seed


# Sessions.

FEW = {"max_denoising_steps": 3}
LONG = "Sort these numbers: " + ", ".join(str(n) for n in range(60, 20, -1))  # more tokens than a ring has slots


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def say(engine, session, messages, **arguments):
    """A turn in a session; without the session it is the same."""
    kept = engine.generate(messages, session=session, seed=0, **arguments)
    alone = engine.generate(messages, seed=0, **arguments)
    assert kept.tokens == alone.tokens
    assert kept.stats.denoising_steps == alone.stats.denoising_steps
    assert alone.stats.reused_tokens == 0
    return kept


def test_a_session_reuses_its_prefix_and_changes_nothing(engine):
    session, messages = engine.session(), [user(JSON)]
    first = say(engine, session, messages)
    assert (first.text, first.stats.reused_tokens) == (ANSWER, 0)
    second = say(engine, session, [*messages, assistant(ANSWER), user("Spell the word cat.")], **FEW)
    # The last block was never committed, so the first prompt is what can be shared.
    assert second.stats.reused_tokens == first.stats.prompt_tokens


def test_a_session_reuses_committed_blocks(engine):
    session, messages = engine.session(), [user("Count from 3 to 40.")]
    first = say(engine, session, messages, max_tokens=100)
    assert first.stats.blocks == 2
    second = say(engine, session, [*messages, assistant(first.text), user("Spell the word cat.")], **FEW)
    assert second.stats.reused_tokens == first.stats.prompt_tokens + 64


def test_a_session_goes_back_to_the_prompt_when_the_answer_is_another(engine):
    """The prompt fills the rings and a block moves them on: the mark after the prompt brings them back, twice."""
    session, messages = engine.session(), [user(LONG)]
    first = say(engine, session, messages, max_tokens=70, end_tokens=(3,), **FEW)
    assert first.stats.prompt_tokens > engine.config.text.sliding_window
    assert first.stats.blocks == 2
    again = engine.generate(messages, session=session, seed=0, max_tokens=70, end_tokens=(3,), **FEW)
    assert again.tokens == first.tokens
    assert again.stats.reused_tokens == first.stats.prompt_tokens
    other = say(engine, session, [*messages, assistant("No."), user("Spell the word dog.")], **FEW)
    assert other.stats.reused_tokens == first.stats.prompt_tokens


def test_a_session_starts_anew_when_the_history_is_another(engine):
    session = engine.session()
    say(engine, session, [user(LONG)], **FEW)
    other = say(engine, session, [user(LONG.replace("22", "20"))], **FEW)
    assert other.stats.reused_tokens == 0


def test_a_short_history_is_shared_as_far_as_it_goes(engine):
    session = engine.session()
    first = say(engine, session, [user("Spell the word cat.")])
    second = say(engine, session, [user("Spell the word dog.")])
    assert 0 < second.stats.reused_tokens < first.stats.prompt_tokens
    assert second.text == "d o g"


def test_an_abandoned_stream_leaves_a_usable_session(engine):
    session, messages = engine.session(), [user("Count from 3 to 40.")]
    stream = engine.stream(messages, session=session, seed=0)
    for event in stream:
        if isinstance(event, Draft) and event.block == 1:
            break
    stream.close()
    messages += [assistant("No."), user("Spell the word dog.")]
    assert say(engine, session, messages, **FEW).stats.reused_tokens > 0


def test_padding_does_not_count_as_context(demo):
    """A short row beside a long one goes on as long as it would alone."""
    engine = engine_of(demo)
    model = engine.model
    config = model.config
    model.config = replace(config, text=replace(config.text, max_position_embeddings=200))
    try:
        engine = replace(engine)  # what it has cached is of the other context
        prompts = ["Count from 1 to 30.", "Sort these numbers: " + ", ".join(["7"] * 20)]
        together = engine.generate_batch(prompts, seeds=[0, 0], max_denoising_steps=2)
        alone = [engine.generate(prompt, seed=0, max_denoising_steps=2) for prompt in prompts]
    finally:
        model.config = config
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.finish_reason for r in together] == [r.finish_reason for r in alone]
    assert together[0].stats.prompt_tokens + 40 < together[1].stats.prompt_tokens


def test_low_memory_changes_chunks_and_limits_and_not_the_tokens(demo, monkeypatch):
    """A long prompt comes in chunks of 256, no step is built ahead, and few freed buffers are kept meanwhile."""
    engine, prompt, limits, built, chunks = engine_of(demo), "one two three " * 80 + "Spell the word frog.", [], [], []
    expected = engine.generate(prompt, seed=0, max_tokens=9, max_denoising_steps=2).tokens
    real_step, real_encode = lookahead.plain_step, type(engine.model).encode

    def plain_step(batch, *arguments):
        built.append(len(batch.steps))
        before = mx.set_cache_limit(2**40)
        mx.set_cache_limit(before)
        limits.append(before)
        return real_step(batch, *arguments)

    def encode(self, tokens, *arguments, **keywords):
        chunks.append(tokens.shape[1])
        return real_encode(self, tokens, *arguments, **keywords)

    usual = mx.set_cache_limit(2**40)
    mx.set_cache_limit(usual)
    monkeypatch.setattr(lookahead, "plain_step", plain_step)
    monkeypatch.setattr(type(engine.model), "encode", encode)
    monkeypatch.setattr(engine.model, "low_memory", True)
    result = engine.generate(prompt, seed=0, max_tokens=9, max_denoising_steps=2)
    assert result.tokens == expected
    assert max(chunks) == 256 and sum(chunks) >= result.stats.prompt_tokens
    assert len(built) == result.stats.denoising_steps
    assert set(limits) == {device.LOW_CACHE_LIMIT} != {usual}
    assert mx.set_cache_limit(usual) == usual


@pytest.mark.parametrize("bits", [8, 4])
def test_answers_with_quantized_keys_and_values_are_right(demo, bits):
    """In both loops, alone, together and turn after turn."""
    engine = mlx_dgemma.load(demo, dtype="float32", kv_bits=bits)
    prompts = ["Spell the word frog.", "Which is larger, 51 or 23?"]
    assert [one.text for one in engine.generate_batch(prompts, seeds=[0, 1])] == ["f r o g", "51 is larger than 23."]
    session = engine.session()
    for mode in ("diffusion", "speculative", "causal"):
        more = {} if mode == "diffusion" else {"temperature": 0}
        assert engine.generate(prompts[0], seed=0, session=session, mode=mode, **more).text == "f r o g"
    assert session.reused_tokens > 0
