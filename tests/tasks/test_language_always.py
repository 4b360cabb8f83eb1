"""A constrained answer is in its language: odd characters, thoughts, templates, the context's end."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from prompts import LEO, ONCE

from mlx_dgemma.constraints.spelling import Spelling
from mlx_dgemma.decoding import step
from mlx_dgemma.errors import LanguageError, OptionError, PromptError
from mlx_dgemma.tasks import constrained


@pytest.mark.parametrize("pattern", ["▁▁a", "(?: ▁){2}", "[▁_]{3}", "é▁日"])
def test_the_sign_of_a_blank_in_pieces_is_itself(engine, pattern):
    result = engine.generate("Say", regex=pattern, seed=0, **ONCE)
    assert re.fullmatch(pattern, result.text)
    blocks = [event.text for event in engine.stream("Say", regex=pattern, seed=0, **ONCE) if hasattr(event, "steps")]
    assert "".join(blocks) == result.text


def test_the_sign_of_a_blank_in_schemas(engine):
    assert engine.generate("Say", schema={"enum": ["a▁b"]}, seed=0, **ONCE).text == '"a▁b"'
    schema = {"type": "object", "properties": {"▁k": {"type": "boolean"}}, "required": ["▁k"]}
    assert list(json.loads(engine.generate("Say", schema=schema, seed=0, **ONCE).text)) == ["▁k"]


def test_the_sign_of_a_blank_in_templates(engine):
    result = engine.fill("x▁y {n}", {"n": ["a▁", "b▁"]}, seed=0, **ONCE)
    assert result.text == f"x▁y {result.holes['n']}"
    assert result.holes["n"] in ("a▁", "b▁")


def test_the_sign_of_a_blank_where_a_text_goes_on(engine):
    result = engine.infill("Say ▁▁", "", length=6, seed=0, **ONCE)
    assert "▁▁" not in result.text  # the cut word is not said twice


@pytest.mark.parametrize("prompt", ["Hi", LEO, "Sort these numbers: 42, 7, 19"])
@pytest.mark.parametrize("mode", [{}, {"fast": True}])
def test_a_thought_is_made_of_text(engine, prompt, mode):
    """Special tokens such as <pad> are no thought, although they are likely behind its end."""
    asked = {"schema": {"type": "boolean"}, "thinking": True, "seed": 0, "max_tokens": 200}
    result = engine.generate(prompt, **asked, **mode)
    opened, closed = engine.tokenizer.think_start_tokens[0], engine.tokenizer.think_end_tokens[0]
    assert result.text in ("true", "false")
    if opened in result.tokens:
        inside = result.tokens[result.tokens.index(opened) + 1 : result.tokens.index(closed)]
        assert not set(inside) & set(engine.tokenizer.all_special_ids)
    assert "<pad>" not in result.thinking
    assert len(result.tokens) < 128


@pytest.fixture
def opened(engine, monkeypatch):
    """A template that opens the thought."""
    tokenizer = engine.tokenizer._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "<|channel>thought")
    return engine


@pytest.mark.parametrize("more", [0, 1, 2, 30])
def test_a_thought_that_the_template_opened_leaves_room_for_the_text(opened, more):
    """The token that closes it counts."""
    schema = {"enum": ["true"]}
    with pytest.raises(OptionError, match=r"^The schema needs room for") as caught:
        opened.generate("Hi", schema=schema, max_tokens=1, seed=0)
    least = int(re.search(r"room for (\d+) tokens", str(caught.value))[1])
    result = opened.generate("Hi", schema=schema, max_tokens=least + more, seed=0, **ONCE)
    assert (result.text, result.finish_reason) == ('"true"', "stop")
    with pytest.raises(OptionError, match=r"^The schema needs room for"):
        opened.generate("Hi", schema=schema, max_tokens=least - 1, seed=0)


def test_a_text_is_not_cut_by_the_contexts_end(engine):
    """Canvases take the context whole: what is left behind the last of them is no room."""
    config, pattern = engine.config, "(?:ab ){4}|(?:[a-z]{8} ){9}"
    limit, canvas = config.text.max_position_embeddings, config.canvas_length
    word = engine.tokenizer.encode(" the", add_special_tokens=False)
    for short in (1, canvas // 2, canvas - 1):  # tokens that are missing for a second canvas
        request = engine.prepare("Hi", seed=0, **ONCE)
        request.prompt.extend((word * limit)[: limit - 2 * canvas + short - len(request.prompt.tokens)])
        constrained.constrain(engine.builder, request, engine.builder.language(pattern, "It"), "It")
        assert request.reader.left == canvas
    over = engine.prepare("Hi", seed=0)
    over.prompt.extend((word * limit)[: limit - canvas + 1 - len(over.prompt.tokens)])
    with pytest.raises(PromptError, match="leaves room for 0 behind"):
        constrained.constrain(engine.builder, over, engine.builder.language(pattern, "It"), "It")


def test_what_leaves_the_language_is_never_handed_out(engine, monkeypatch):
    """A search that goes wrong ends the request."""
    honest = constrained.best_text

    def broken(language, seen, state, ends, room, marks=()):
        tokens = honest(language, seen, state, ends, room, marks)
        tokens[0] = wrong[-1]
        return tokens

    monkeypatch.setattr(constrained, "best_text", broken)
    wrong, texts = [], []
    for token in (0, engine.options.end_tokens[0], *engine.tokenizer.encode("x", add_special_tokens=False)[-1:]):
        wrong.append(token)
        with pytest.raises(LanguageError, match=r"^The regex 'abc' "):
            for event in engine.stream("Hi", regex="abc", seed=0, drafts=False, **ONCE):
                texts.append(event.text)
        assert not texts


def test_a_text_is_spelt_byte_by_byte(engine):
    language = engine.builder.language("é▁|日", "It")
    every = engine.builder.token_bytes
    of = {bytes([b]): every.starting_with(b)[every.length[every.starting_with(b)] == 1][-1] for b in range(128, 256)}
    spelling = Spelling(language, "It")
    parts = [spelling.add(of[bytes([byte])]) for byte in "é▁".encode()]
    assert parts == ["", "é", "", "", "▁"]
    spelling.finish()
    spelling = Spelling(language, "It")
    spelling.add(of["日".encode()[:1]])
    with pytest.raises(LanguageError, match=r"^It "):
        spelling.finish()


def test_a_canvas_without_any_text_is_an_error(engine):
    """Minus infinity is no answer."""
    language = engine.builder.language("a{40}", "It")
    control = constrained.Constrained(language, [1])
    guide = control.guide(3)
    size, asked = 4, len(guide.tokens.tolist())
    seen = {
        "argmax": np.zeros(size, np.int32),
        "argmax_log_p": np.full(size, -1.0),
        "likely": np.zeros((size, 2), np.int32),
        "likely_log_p": np.full((size, 2), -1.0),
        "asked": np.full((size, asked), -1.0),
    }
    with pytest.raises(LanguageError):
        guide.choose(0, seen)


def test_log_probabilities_are_those_of_the_tokens_that_were_chosen(engine, monkeypatch):
    """Not of the model's own best tokens, which the language does not admit."""
    seen, predict = [], step.predict

    def watched(*arguments):
        seen.append(predict(*arguments))
        return seen[-1]

    monkeypatch.setattr(step, "predict", watched)
    result = engine.generate("Write JSON for: Anna is 31 years old and lives in Oslo.", regex="[xyz]{6}", seed=0)
    last = seen[-1]
    logits = engine.model.logits(last.hidden)[0] / last.temperature.flatten()[0]
    expected = [float((logits[i] - mx.logsumexp(logits[i]))[token]) for i, token in enumerate(result.tokens)]
    assert np.allclose(result.log_probs, expected, atol=1e-3)
    assert max(expected) < -1
