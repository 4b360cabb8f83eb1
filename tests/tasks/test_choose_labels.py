"""Labels and answer templates of a choice: the edges of tokens, and every refusal."""

import gc
import weakref

import pytest
from support import RED, engine_of, refusal, small_model, square

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.tasks import labels
from mlx_dgemma.tasks.templates import Slot, split_template

LARGER, COLOR = "Which is larger, 51 or 23?", "What color is the shape?"
LONG_ANSWER = f"The answer '{{}}{'5' * 64}' has 65 tokens with 'a', more than a canvas of 64; shorten it."


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


def test_words_of_the_vocabulary(engine):
    edges = labels.token_edges(engine.tokenizer, 2048)
    token = dict(engine.tokenizer.get_vocab())
    assert edges.flags[token["1"]].tolist() == [1, 0, 1, 0]
    assert edges.flags[token["▁Paris"]].tolist() == [0, 0, 0, 1]
    assert edges.flags[token["Paris"]].tolist() == [0, 1, 0, 1]
    assert not edges.flags[token["<0x41>"]].any()
    assert {0, 1, 9, 16, 18} <= edges.special
    assert not edges.flags[sorted(edges.special)].any()


class Tokenizer:
    """Two tokens of text, and one that is special."""

    all_special_ids = (0,)

    def __init__(self):
        self.added_tokens_decoder = {}

    def get_vocab(self):
        return {"<s>": 0, "a1": 1, "▁é": 2}

    def convert_ids_to_tokens(self, ids):
        return [["<s>", "a1", "▁é"][i] for i in ids]


def test_edges_are_kept_while_their_tokenizer_lives():
    tokenizer = Tokenizer()
    edges = labels.token_edges(tokenizer, 4)
    assert edges.flags.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert labels.token_edges(tokenizer, 4) is edges
    assert labels.token_edges(tokenizer, 3).flags.shape == (3, 4)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


def test_templates_are_split_at_their_slots():
    assert split_template("") == ([""], [])
    assert split_template("{{a}} {x}{y!r:>3} {{") == (["{a} ", "", " {"], [Slot("x", ""), Slot("y", "!r:>3")])
    assert split_template("{}b") == (["", "b"], [Slot("", "")])
    with pytest.raises(ValueError, match="Single '}'"):
        split_template("a}")


# Mistakes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels is [], which is empty; give at least one label."),
        (range(0), "labels is range(0, 0), which is empty; give at least one label."),
        ({}, "labels is an empty dict; name at least one question."),
        ("yes", "labels is 'yes'; give a list of texts, a range, or bool."),
        (int, "labels is int; give a list of texts, a range, or bool."),
        ({"color": "red"}, "labels of color is 'red'; give a list of texts, a range, or bool."),
        ({"a b": ["x"]}, "A question is named 'a b'; use letters, digits and _, as in 'color'."),
        (["a", ""], "Label 1 is ''; it should be a text that is not empty."),
        (["a", " \n"], "Label 1 is ' \\n'; it should be a text that is not empty."),
        ([1, 2], "Label 0 is 1; it should be a text that is not empty."),
        (["a", "b", " a"], "The label 'a' is given 2 times; give every label once."),
        (range(10001), "labels has 10001 labels; give at most 10000."),
        (["a b", "a▁b"], "The labels 'a b' and 'a▁b' are the same tokens; leave one out."),
        (["5" * 65], f"The label '{'5' * 65}' has 65 tokens, more than a canvas of 64; shorten it."),
        (
            ["5" * 5000],
            "The label '555555555555...5555555555555' has 5000 characters, more than a canvas takes; "
            "give at most 4096.",
        ),
        (["a<turn|>"], "The label 'a<turn|>' holds the special token <turn|>; leave it out."),
        (
            {"color": ["red"], "shape": ["circle"]},
            "There are 2 questions and no answer template; give one such as '{color} {shape}'.",
        ),
    ],
)
def test_wrong_labels_are_told(engine, labels, message):
    assert refusal(OptionError, engine.choose, LARGER, labels) == message


@pytest.mark.parametrize(
    ("labels", "answer", "message"),
    [
        (["a"], "It is.", "The answer template 'It is.' has 0 slots {}; give it one."),
        (["a"], "", "The answer template '' has 0 slots {}; give it one."),
        (["a"], "{} {}", "The answer template '{} {}' has 2 slots {}; give it one."),
        (["a"], "{size}", "The answer template '{size}' has a slot {size}; its slots should be {}."),
        (["a"], "{:>3}", "The answer template '{:>3}' has a slot {:>3}; its slots should be {}."),
        (
            ["a"],
            "{} }",
            "The answer template '{} }' is malformed (Single '}' encountered in format string); write {{ for a brace.",
        ),
        (["a"], 3, "answer is 3; give a text with a slot such as 'It is {}.'."),
        ({"c": ["a"], "d": ["b"]}, "{c}", "The answer template '{c}' has 0 slots {d}; give it one."),
        (
            {"c": ["a"], "d": ["b"]},
            "{c} {d} {}",
            "The answer template '{c} {d} {}' has a slot {}; its slots should be {c}, {d}.",
        ),
        (
            {"c": ["a"], "d": ["t"]},
            "c{c}{d}",
            "The answer template 'c{c}{d}' has slots that touch; put a space between them.",
        ),
        (["a"], "{}<eos>", "The answer template '{}<eos>' holds the special token <eos>; leave it out."),
        (["a"], "{}" + "5" * 64, LONG_ANSWER),
        (["a b", "a▁b"], "{}.", "The labels 'a b' and 'a▁b' are the same tokens; leave one out."),
    ],
)
def test_wrong_templates_are_told(engine, labels, answer, message):
    assert refusal(OptionError, engine.choose, LARGER, labels, answer=answer) == message


def test_wrong_prompts_and_options_are_told(engine, monkeypatch):
    labels = ["a", "b"]
    assert refusal(PromptError, engine.choose, " ", labels) == "The prompt is empty; say what you want."
    assert refusal(PromptError, engine.choose, "5" * 4100, labels) == (
        "The prompt has 4111 tokens, but the context leaves room for 4032 beside a canvas of 64; shorten it."
    )
    assert refusal(OptionError, engine.choose, "x", labels, seed=-1) == (
        "seed is -1; it should be a whole number from 0 to 2**64 - 1."
    )
    assert refusal(OptionError, engine.choose, "x", labels, t_max=1.0) == (
        "t_max is not an option of choose; the options are image_tokens, fps, max_frames, prefill_chunk."
    )
    monkeypatch.setattr(engine, "model", small_model())
    assert refusal(PromptError, engine.choose, COLOR, labels, images=[square(RED)]) == (
        "This checkpoint has no vision tower, so it cannot look at pictures; send text alone."
    )
