"""Edits through the engine, on the demo."""

from dataclasses import replace

import pytest
from prompts import ONCE, SAW, count_of
from support import refusal

from mlx_dgemma import OptionError, PromptError


@pytest.mark.parametrize("strength", [0, 0.25, 0.5, 1])
def test_an_edit_changes_what_it_should(engine, strength):
    result = engine.edit(SAW, "Replace cat with dog", strength=strength, seed=0)
    assert (result.text, result.finish_reason) == ("The dog saw a dog in the meadow.", "stop")
    assert result.stats.canvas_positions == 16 * result.stats.denoising_steps


def test_drafts_of_an_edit_are_its_text(engine):
    result = engine.edit(SAW, "Replace cat with dog", mode="speculative", temperature=0)
    stats = result.stats
    assert (result.text, stats.denoising_steps) == ("The dog saw a dog in the meadow.", 0)
    assert stats.causal_passes == stats.verify_passes == 3  # two words are new


def test_edits_of_other_texts(engine):
    text = "In the forest the dog took the ball from a dog."
    for instruction in ("Replace dog with fox", "Replace dog with fox:  "):
        assert engine.edit(text, instruction, seed=0).text == "In the forest the fox took the ball from a fox."
    asked = count_of(engine, f"<bos><|turn>user\nReplace dog with fox: {text}<turn|>\n<|turn>model\n")
    assert engine.edit(text, "Replace dog with fox", seed=0).stats.prompt_tokens == asked


def test_an_edit_of_a_long_text_has_room_for_it(engine):
    text = "1 2 3 4 5 6 7 8 " * 8
    draft = count_of(engine, text.rstrip())
    assert 64 < draft < 128
    brief = replace(engine, options=engine.options.override(max_tokens=40))
    result = brief.edit(text, "Replace 1 with 9", seed=0, strength=0, **ONCE)
    assert 40 < len(result.tokens) <= 2 * draft
    assert result.stats.blocks > 1
    for one, limit in ((engine, 20), (brief, 64)):
        cut = one.edit(text, "Replace 1 with 9", seed=0, strength=0, max_tokens=limit, **ONCE)
        assert (len(cut.tokens), cut.finish_reason, cut.stats.blocks) == (limit, "length", 1)


def test_a_seed_repeats_an_edit(engine):
    def ask(seed):
        return engine.edit(SAW, "Say nothing about it", seed=seed, max_tokens=16, **ONCE).tokens

    assert ask(1) == ask(1)
    assert len({tuple(ask(seed)) for seed in range(4)}) > 1


def test_mistakes_of_edits(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model), "encode", lambda *_, **__: pytest.fail("the model ran"))

    def told(*arguments, **options):
        return refusal(OptionError, engine.edit, *arguments, **options)

    assert told("", "b") == "text is ''; it should be a text that is not empty."
    assert told(3, "b") == "text is 3; it should be a text that is not empty."
    assert told("a", " \n") == "instruction is ' \\n'; it should be a text that is not empty."
    for strength in (-0.1, 1.1, "1", True, None, float("nan")):
        assert told("a", "b", strength=strength) == (
            f"strength is {strength!r}; it should be a number from 0 (the draft) to 1 (all noise)."
        )
    assert told("a", "b", exact=True) == "exact is True, but the reference's sampler knows no edit; leave it out."
    assert told("a", "b", stop="x") == "stop is ('x',), but edit has an end of its own; leave it out."
    text = refusal(PromptError, engine.edit, "cat " * 5000, "Replace cat with dog")
    assert text.endswith(" tokens, but the context leaves room for 4032 beside a canvas of 64; shorten it.")
