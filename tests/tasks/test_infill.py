"""Infill through the engine, on the demo."""

import copy
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from prompts import ADDING, ANSWER, CODE, LEO, ONCE, PERSON, STORY, around, count_of
from support import refusal

from mlx_dgemma import OptionError, PromptError
from mlx_dgemma.constraints.next_token import NextTokens
from mlx_dgemma.decoding.control import fitting_size
from mlx_dgemma.prompt.vocabulary import Vocabulary
from mlx_dgemma.tasks import infill
from mlx_dgemma.tasks.hole import divide
from mlx_dgemma.tasks.infill import HoleContext

HOLES = [
    (CODE, "left, right", 3, ADDING),
    (CODE, "add", 1, ADDING),
    (CODE, "def add(left, right):", 8, ADDING),
    (STORY, "named Leo", 2, LEO),
    (STORY, "amed Le", 2, LEO),  # both context inside of words
    (STORY, "Once", 1, LEO),
    (STORY, "nce there wa", 3, LEO),
    (ANSWER, "Anna", 1, PERSON),
    (ANSWER, 'me": "Anna", "age": 31, "ci', 20, PERSON),
    ("for i in range(5):\n    print(i)", "ange", 1, "Write a Python loop that prints 0 to 4."),
    ("for i in range(5):\n    print(i)", "(5):\n    pr", 8, "Write a Python loop that prints 0 to 4."),
]


@pytest.mark.parametrize(("text", "hole", "length", "prompt"), HOLES)
def test_holes_of_a_given_length_are_filled_as_they_were(engine, text, hole, length, prompt):
    prefix, suffix = around(text, hole)
    result = engine.infill(prefix, suffix, prompt=prompt, length=length, seed=0)
    assert (result.text, result.finish_reason, result.thinking) == (hole, "stop", "")
    assert len(result.tokens) == result.stats.generated_tokens == length
    context = HoleContext.of(engine.tokenizer, prefix, suffix)
    assert engine.tokenizer.decode(result.tokens) == context.tail + hole + context.head


@pytest.mark.parametrize(("text", "hole", "length", "prompt"), [HOLES[i] for i in (1, 3, 4, 6)])
def test_lengths_are_found(engine, few_lengths, text, hole, length, prompt):
    result = engine.infill(*around(text, hole), prompt=prompt, seed=0)
    assert (result.text, len(result.tokens)) == (hole, length)


@pytest.mark.parametrize(
    ("text", "hole", "prompt"),
    [
        (CODE, "left + right", ADDING),
        (CODE, "urn left + right", ADDING),
        (STORY, "was happy.", LEO),
        (STORY, "appy.", LEO),
    ],
)
def test_without_a_suffix_the_text_goes_on_to_its_end(engine, text, hole, prompt):
    assert text.endswith(hole)
    result = engine.infill(text.removesuffix(hole), "", prompt=prompt, seed=0)
    assert (result.text, result.finish_reason) == (hole, "stop")


@pytest.mark.parametrize("name", ["length", "max_tokens"])
def test_a_hole_without_a_suffix_has_room_for_the_word_that_it_begins_with(engine, name):
    """Or is refused: one token, and the end."""
    prefix, given = CODE.removesuffix("left + right"), 0
    for most in (1, 2, 3):
        try:
            result = engine.infill(prefix, "", prompt=ADDING, seed=0, **{name: most}, **ONCE)
        except OptionError:
            continue
        given += 1
        assert 1 <= len(result.tokens) <= most
        assert engine.tokenizer.decode(result.tokens).startswith(" ")  # the blank at the prefix's end
    assert given >= 2


def test_prefix_and_suffix_stay_whatever_comes_between(engine):
    for prefix, suffix in (
        ("Größ", "ße"),
        ("a  ", "  b"),
        ("\n", "\n"),
        ("", "x"),
        ("日", "本"),
        ("(", ")"),
        ("don'", "t"),
    ):
        context = HoleContext.of(engine.tokenizer, prefix, suffix)
        assert engine.tokenizer.decode(context.before) + context.tail == prefix
        assert context.head + engine.tokenizer.decode(context.behind) == suffix
        least = int(engine.builder.language(context.pattern(), "The hole").distance[0])
        result = engine.infill(prefix, suffix, prompt="Hi", length=max(least, 1) + 1, seed=0, **ONCE)
        spelt = engine.builder.token_bytes.to_bytes([*context.before, *result.tokens, *context.behind]).decode()
        assert spelt == prefix + result.text + suffix


def test_context_are_cut_where_words_are_whole(engine):
    def cut(prefix, suffix):
        context = HoleContext.of(engine.tokenizer, prefix, suffix)
        return (
            engine.tokenizer.decode(context.before),
            context.tail,
            context.head,
            engine.tokenizer.decode(context.behind),
        )

    assert cut("Once there was a cat n", "amed Leo.") == ("Once there was a cat", " n", "amed", " Leo.")
    assert cut("return left", " + right") == ("return", " left", "", " + right")
    assert cut("a cat ", "named Leo.") == ("a cat", " ", "named", " Leo.")
    assert cut("", "") == ("", "", "", "")
    assert cut("def add(", ") + 1") == ("def add(", "", "", ") + 1")


def test_of_a_long_word_every_token_is_looked_at_once(engine, monkeypatch):
    pieces, looked = Vocabulary.piece, []
    monkeypatch.setattr(Vocabulary, "piece", lambda self, token: looked.append(token) or pieces(self, token))
    monkeypatch.setattr(type(engine.tokenizer._tokenizer), "decode", lambda *_, **__: pytest.fail("decoded"))
    context = HoleContext.of(engine.tokenizer, "One " + "ab" * 500, "é" * 500 + " end")
    assert (context.tail, context.head) == (" " + "ab" * 500, "é" * 500)
    assert len(looked) <= sum(len(engine.builder.tokenizer.encode(one)) for one in ("One " + "ab" * 500, "é" * 500)) + 9


def test_without_a_prompt_the_gap_is_shown(engine):
    result = engine.infill("Once there was a cat", " in a meadow.", length=2, seed=0)
    shown = "Write this text with something that fits in the place of [...]:\n\nOnce there was a cat[...] in a meadow."
    asked = count_of(engine, f"<bos><|turn>user\n{shown}<turn|>\n<|turn>model\n")
    assert result.stats.prompt_tokens == asked  # what stands before the hole is on the canvas
    assert len(result.tokens) == 2


def test_a_long_prefix_is_encoded_and_the_hole_still_filled(engine):
    long = "Leo lived in a meadow. " * 16 + "One day Leo found a"
    result = engine.infill(long, " ball. The cat was happy.", prompt=LEO, length=2, seed=0)
    assert result.stats.prompt_tokens > count_of(engine, f"<bos><|turn>user\n{LEO}<turn|>\n<|turn>model\n") + 63
    assert engine.tokenizer.decode(result.tokens) == " a" + result.text
    assert len(result.tokens) == 2


def test_a_hole_longer_than_a_canvas_is_told(engine):
    with pytest.warns(UserWarning) as caught:
        result = engine.infill("Once there was a", " The end.", prompt=LEO, length=70, seed=0, **ONCE)
    assert [str(one.message) for one in caught] == [
        "The hole of 70 tokens takes 2 canvases of 64; only the last one sees what stands behind it."
    ]
    assert (len(result.tokens), result.stats.blocks, result.finish_reason) == (70, 2, "stop")
    before = count_of(engine, "Once there was")
    assert result.stats.canvas_positions == 64 + fitting_size(before + 70 + 4 - 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(engine.infill("x(", ") The end.", prompt=LEO, length=40, seed=0, **ONCE).tokens) == 40


def test_a_long_hole_can_be_written_token_by_token_up_to_its_last_canvas(engine, monkeypatch):
    """The tokens before it are the most probable ones, as a loop without a cache finds them."""
    prefix, suffix, of_canvases = "Once there was a", " The end.", infill._of_canvases
    monkeypatch.setattr(infill, "_of_canvases", lambda options: replace(of_canvases(options), **ONCE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = engine.infill(prefix, suffix, prompt=LEO, length=90, seed=0, mode="causal")
    ahead = int(re.fullmatch(r"The first (\d+) tokens of the hole were written token by token, .*", result.notes[0])[1])
    assert (len(result.tokens), result.stats.blocks, result.finish_reason) == (90, 1, "stop")
    assert 0 < ahead < 90 and result.stats.denoising_steps == 1
    request = infill.infill(engine.builder, prefix, suffix, prompt=LEO, length=90, seed=0, mode="causal")
    before = [*request.prompt.tokens, *request.control._before]
    model, tokens = engine.model, result.tokens
    hidden = model.encode(mx.array([[*before, *tokens[: ahead - 1]]]), model.new_prefix())
    logits = model.logits(hidden[:, len(before) - 1 :])[0]
    words = NextTokens(request.control._language, ())
    state, best = 0, []
    for i, row in enumerate(np.asarray(logits)):
        best.append(int(np.where(words.allowed(state, 91 - i), row, -np.inf).argmax()))
        state = words.after(state, tokens[i])
    assert best == tokens[:ahead]
    assert len(result.log_probs) == 90
    for options, words_of_error in (
        ({"length": 40}, "needs a canvas"),
        ({"length": 90, "top_p": 0.5}, "top_p is 0.5, but"),
    ):
        with pytest.raises(OptionError, match=words_of_error):
            engine.infill(prefix, suffix, prompt=LEO, seed=0, mode="causal", **options)


def test_the_last_canvas_of_a_hole_sees_what_stands_behind_it(engine):
    """Or it is told that none does: here the hole ends where a canvas does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = {
            engine.infill("", suffix, prompt=LEO, length=64, seed=0, max_denoising_steps=2).text
            for suffix in (" The end.", ' "city": "Oslo"}')
        }
    assert len(texts) == 2 or caught


def test_mistakes_of_infill(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))

    def told(*arguments, **options):
        return refusal(OptionError, engine.infill, *arguments, **options)

    assert told(1, "a") == "prefix is 1; it should be a text."
    assert told("a", None) == "suffix is None; it should be a text."
    assert refusal(PromptError, engine.infill, "", "") == (
        "There is no text before or behind the hole, and no prompt; give one of them."
    )
    assert refusal(PromptError, engine.infill, "a", "b", prompt=" ") == "The prompt is empty; say what you want."
    for length in (0, -1, 1.5, True, "3"):
        assert told("a", "b", length=length) == (
            f"length is {length!r}; it should be a whole number of tokens, at least 1."
        )
    assert told("The rab", "fox bit", length=1) == (
        "length is 1, but the pieces of words at the hole's ends take 2 tokens; give that many."
    )
    assert told("a", "b", exact=True) == "exact is True, but the reference's sampler knows no infill; leave it out."
    assert told("a", "b", stop="x") == "stop is ('x',), but infill has an end of its own; leave it out."
    assert told("a", "b", fats=True) == "fats is not an option; did you mean fast?"
    assert told("a", "b", seed=-1) == "seed is -1; it should be a whole number from 0 to 2**64 - 1."


def test_texts_that_the_context_has_no_room_for(engine):
    for prefix, suffix in (("cat " * 5000, "end"), ("a ", "cat " * 5000), ("cat " * 5000, "")):
        for prompt in (None, "Hi"):
            text = refusal(PromptError, engine.infill, prefix, suffix, prompt=prompt)
            assert re.fullmatch(
                "The texts before and behind the hole have [0-9]{4} tokens, but the context has 4096; shorten them.",
                text,
            )


def test_log_probabilities_are_the_holes_own(engine):
    """Not those of the text before it, which is fixed on the canvas."""
    *_, block, finished = engine.run(
        infill.infill(engine.builder, *around(CODE, "left, right"), prompt=ADDING, length=3, seed=0), drafts=False
    )
    result = finished.result
    start = block.tokens.index(result.tokens[0])
    assert list(block.tokens[start : start + 3]) == result.tokens
    assert result.log_probs == list(block.log_probs[start : start + 3])
    assert result.log_probs != list(block.log_probs[:3])


@pytest.mark.parametrize("few", [True, False])
def test_a_cut_run_without_blanks_finds_a_length(engine, monkeypatch, few):
    """Its pieces have to be spelt character by character where their own tokens are not likely."""
    if few:
        monkeypatch.setattr("mlx_dgemma.tasks.infill.LONGEST", 1)
    run = "qzxvthecatwasinthemeadowjwqk" * 3
    result = engine.infill("One day a " + run[:2], run[3:] + " came.", seed=0, max_denoising_steps=1)
    assert result.finish_reason == "stop"
    assert engine.builder.token_bytes.to_bytes(result.tokens).decode() == " " + run[:2] + result.text + run[3:]


@pytest.mark.parametrize("run", ["猫は草原で眠っていたそして雨が降った", "ネコ𝔸𝔹", "thecatwasinthemeadowandhappy"])
@pytest.mark.parametrize("pieces", [(1, 1), (40, 0), (0, 40), (100, 60)])
@pytest.mark.parametrize(("before", "longest"), [(0, 64), (100, 1)])
@pytest.mark.filterwarnings("ignore:The hole of")
def test_a_cut_run_finds_a_length_on_the_releases_canvas_whatever_is_likely(
    engine, monkeypatch, run, pieces, before, longest
):
    """No model runs: on a canvas of 256 none of the likely tokens fits, only those that are always scored."""
    monkeypatch.setattr("mlx_dgemma.tasks.infill.LONGEST", longest)
    random, builder = np.random.default_rng(0), copy.copy(engine.builder)
    builder.config = replace(builder.config, canvas_length=256)
    tail, head = ((run * 10)[:count] for count in pieces)
    hole = infill.infill(builder, "One day " * before + tail, head + " came.", prompt="Hi", seed=0).control

    def chosen(layout, guide, row):
        size = layout.tokens.shape[1]
        pad, zeros = np.zeros((size, 1), np.int32), np.zeros((size, 1))
        asked = random.normal(size=(size, len(guide.tokens))) - 9
        seen = {"likely": pad, "likely_log_p": zeros, "argmax": pad[:, 0], "argmax_log_p": zeros[:, 0], "asked": asked}
        return guide.choose(row, seen)

    def denoise(model, prefix, options, keys, noise, layout, guide):
        for row in range(len(layout.tokens)):
            yield chosen(layout, guide, row)

    monkeypatch.setattr("mlx_dgemma.tasks.hole.denoise_block", denoise)
    prefix = SimpleNamespace(batch_size=1, select_rows=lambda rows: None, fork=lambda: prefix)
    list(hole.prepare(None, prefix, engine.options, mx.array([0, 0], mx.uint32)))
    while not hole.full:
        layout = hole.layout()
        tokens = chosen(layout, hole.guide(0), 0)
        hole.take(tokens.tolist(), [0.0] * len(tokens))
    assert hole.spelt


@pytest.mark.parametrize(("count", "behind", "encoded"), [(128, 40, 128), (170, 40, 138), (170, 4, 128), (190, 4, 146)])
def test_as_much_is_encoded_as_leaves_room_for_the_hole_and_its_view(count, behind, encoded):
    """On a canvas of 64: a hole of 16, and up to 16 tokens behind it; else canvases begin at their multiples."""
    assert divide(range(count), behind, 16, 64) == encoded
