"""Option values at the edges of their types are accepted or refused by one sentence."""

import numpy as np
import pytest
from support import engine_of

from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.prompt.answer import Answer
from mlx_dgemma.tasks.edit import edit

HUGE = 10**5000  # Python refuses to print it
A_HUGE = pytest.param(HUGE, id="huge")
WHOLE = ["max_tokens", "max_denoising_steps", "stability_threshold", "patience", "prefill_chunk", "max_frames"]
REAL = ["entropy_bound", "t_min", "t_max", "confidence_threshold", "certainty_threshold", "fps"]


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_at_the_edges_of_their_type(name):
    greatest = 100_000 if name == "max_denoising_steps" else 2**31 - 1
    for value in (greatest + 1, 2**63, HUGE, -1, 1.0, float("nan"), np.float32(1), True, np.bool_(True), "1", [1]):
        with pytest.raises(OptionError, match=rf"^{name} is .*; it should be a whole number.*\.$"):
            GenerationOptions(**{name: value})
    for value in (1, greatest, np.int64(5), np.uint8(5)):
        kept = getattr(GenerationOptions(**{name: value}), name)
        assert type(kept) is int
        assert kept == value


@pytest.mark.parametrize("name", REAL)
def test_numbers_at_the_edges_of_their_type(name):
    for value in (float("nan"), float("inf"), np.float64("nan"), HUGE, 1e39, -1, -1e-300, True, "1", 1j):
        with pytest.raises(OptionError, match=rf"^{name} is .*; it should be a number.*\.$"):
            GenerationOptions(**{name: value})
    for value in (1, np.int64(1), np.float32(1.5)):
        kept = getattr(GenerationOptions(**{"t_max": 2, name: value}), name)
        assert type(kept) in (int, float)
        assert kept == value


@pytest.mark.parametrize("value", [1e-44, 1e-300, 0.0009])
def test_a_temperature_that_overflows_is_refused(value):
    with pytest.raises(OptionError, match=r"^t_max is .*; it should be a number, at least 0.001"):
        GenerationOptions(t_min=0, t_max=value)


@pytest.mark.parametrize("value", [-1, 2**31, A_HUGE, [1, -1], 1.5, [None], True, np.float32(1)])
def test_end_tokens_are_token_ids(value):
    with pytest.raises(OptionError, match=r"^end_tokens is .*; it should be token ids"):
        GenerationOptions(end_tokens=value)


def test_numpy_integers_are_end_tokens():
    for value in (np.int32(5), [np.int64(5)], np.array([5])):
        kept = GenerationOptions(end_tokens=value).end_tokens
        assert kept == (5,)
        assert type(kept[0]) is int


@pytest.mark.parametrize("more", [{}, {"schema": {"type": "boolean"}}, {"regex": "[a-z]"}])
def test_end_tokens_outside_the_vocabulary_are_refused(engine, more):
    for token in (engine.config.text.vocab_size, 10**9):
        with pytest.raises(OptionError, match=f"^end_tokens has {token}, but the vocabulary has "):
            engine.prepare("Say yes", end_tokens=[1, token], **more)


def test_a_text_that_must_end_needs_an_end_token(engine):
    with pytest.raises(OptionError, match=r"^The schema needs an end token, but end_tokens is \(\); give one\.$"):
        engine.prepare("Say yes", end_tokens=(), schema={"type": "boolean"})


@pytest.mark.parametrize("seed", [-1, 2**64, A_HUGE, 1.0, True, "1", np.int64(-1)])
def test_a_seed_is_a_whole_number(engine, seed):
    with pytest.raises(OptionError, match=r"^seed is .*; it should be a whole number from 0"):
        engine.prepare("Hi", seed=seed)


def test_a_numpy_integer_is_a_seed(engine):
    assert engine.prepare("Hi", seed=np.uint64(2**64 - 1)).seed == 2**64 - 1


@pytest.mark.parametrize("prompts", ["abc", {"role": "user", "content": "Hi"}, 5, None])
def test_a_batch_is_a_list_of_prompts(engine, prompts):
    with pytest.raises(PromptError, match=r"^prompts is .*; it should be a list of prompts"):
        engine.generate_batch(prompts)


def test_hole_lengths_and_counts_are_whole_numbers(engine):
    for length in (2**31, HUGE, 1.0, True):
        with pytest.raises(OptionError, match=r"^length is .*; it should be a whole number"):
            engine.infill("a", "b", length=length)
    for hole in (HUGE, 2**31, 0, True, 1.0):
        with pytest.raises(OptionError, match=r"^The hole 'x' is "):
            engine.fill("{x}", {"x": hole})


def test_none_leaves_an_edits_length_as_it_is(engine):
    text = "word " * 300
    with_none = edit(engine.builder, text, "Repeat", max_tokens=None)
    without = edit(engine.builder, text, "Repeat")
    assert with_none.reader.max_tokens == without.reader.max_tokens > engine.options.max_tokens


@pytest.mark.parametrize("strength", [float("nan"), A_HUGE, -0.1, True, "1"])
def test_strength_is_a_share(engine, strength):
    with pytest.raises(OptionError, match=r"^strength is .*; it should be a number from 0"):
        engine.edit("a", "b", strength=strength)


def read(engine, text, stop, cut="stop"):
    """What an answer makes of a text that comes a token for each character."""
    answer = Answer(engine.tokenizer, (1,), 100, stop=stop)
    taken = ""
    for character in text:
        answer.feed(engine.tokenizer.encode(character, add_special_tokens=False), [0.0])
        taken += answer.take()[0]
        if answer.finish_reason:
            break
    else:
        answer.cut(cut)
        taken += answer.take()[0]
    assert taken == answer.text
    return answer.text, answer.finish_reason


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abXcd", ("bXc", "X"), "a"),  # the longer one begins first and is complete last
        ("abXd", ("bXc", "X"), "ab"),
        ("abX", ("bXc", "X"), "ab"),
        ("abXXc", ("bXXc", "XX", "X"), "a"),
        ("abcd", ("cd", "bcX"), "ab"),
        ("abab", ("abab", "b"), ""),
    ],
)
@pytest.mark.parametrize("cut", ["stop", "length"])
def test_the_stop_string_that_begins_first_ends_the_text(engine, text, stop, expected, cut):
    for order in (stop, stop[::-1]):
        assert read(engine, text, order, cut) == (expected, "stop")
