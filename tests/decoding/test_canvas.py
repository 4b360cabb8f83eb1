"""Controlled canvases: pins, drafts and guides against a plain loop over whole logits, and the engine with and without.

The plain loop takes a fresh prefix for every step and leaves pinned positions out by hand.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from loop import Reader, confident, request_of
from naive import two_levels
from support import engine_of, random_tokens, small_model

from mlx_dgemma.decoding import sampler
from mlx_dgemma.decoding.control import Control, Layout
from mlx_dgemma.decoding.events import Block
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.step import GUIDED_UNCERTAINTY
from mlx_dgemma.model import rng, tiling
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.tasks.constrained import LanguageGuide as Guide

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OPTIONS = GenerationOptions(
    max_denoising_steps=8, entropy_bound=2.5, confidence_threshold=1.0, certainty_threshold=1.0, end_tokens=(39,)
)
MODES = {"default": OPTIONS, "fast": replace(OPTIONS, fast=True, entropy_bound=0.1, certainty_threshold=1.0)}
ONCE = {"max_denoising_steps": 1}
STORY = "Tell a story about a cat named Leo."


@pytest.fixture(scope="module")
def model():
    """Canvas 8."""
    model = small_model(3, scale=0.2)
    model.config = replace(model.config, canvas_length=8)
    return model


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


def prefix_of(model, *prompts):
    """Of prompts of one length."""
    prefix = model.new_prefix(len(prompts))
    prefill(model, prefix, np.array(prompts, np.int32), 2048)
    return prefix


def keys_of(*seeds):
    return mx.stack([mx.random.key(seed) for seed in seeds])


def layout_of(tokens, pinned=(), drafted=()):
    """A layout of one row: pinned and drafted are positions."""
    at = np.arange(len(tokens))[None]
    return Layout(
        mx.array(np.array([tokens], np.int32)),
        mx.array(np.isin(at, list(pinned))),
        mx.array(np.isin(at, list(drafted))),
    )


def joined(layouts):
    return Layout(*(mx.concatenate([getattr(one, name) for one in layouts]) for name in ("tokens", "fixed", "initial")))


def plain_canvas(model, prompt, seed, options, layout=None, choose=None):
    """[(best, accepted, entropy)] of the steps of one canvas; `choose`: [C, V] logits to the guide's tokens."""
    total, vocab = options.max_denoising_steps, model.config.text.vocab_size
    length = model.config.canvas_length if layout is None else layout.tokens.shape[1]
    draws = rng.split(keys_of(seed), 2 * total + 1)[:, 0]
    canvas = np.array(mx.random.randint(0, vocab, (length,), key=draws[0]))
    pinned, given = np.zeros(length, bool), np.zeros(length, int)
    if layout is not None:
        pinned, given = np.array(layout.fixed[0]), np.array(layout.tokens[0])
        canvas = np.where(pinned | np.array(layout.initial[0]), given, canvas)
    table, conditioning, kept, bests, told = model.model.decoder.embed_tokens, None, pinned, [], []
    for step in range(total):
        logits = model.logits(model.denoise(mx.array(canvas)[None], prefix_of(model, prompt), conditioning))
        logits = logits / (options.t_min + (options.t_max - options.t_min) * (total - step) / total)
        p = np.array(mx.softmax(logits[0], axis=-1), np.float64)
        entropy = np.where(pinned, 0, -(p * np.log(np.maximum(p, 1e-300))).sum(-1))
        confidence = np.where(pinned, 1, p.max(-1))
        mine = np.where(pinned, given, p.argmax(-1))
        best = mine if choose is None else choose(mine)
        unlike = best != mine
        if options.fast:
            accepted = confident(confidence, kept)
            taken = np.where(kept & ~unlike, canvas, best)
            uncertainty = np.where(accepted, 0, entropy)
        else:
            accepted, bound = pinned.copy(), options.entropy_bound * (1 + options.entropy_rise * step)
            free = np.flatnonzero(~pinned)
            if len(free):
                accepted[free] = np.array(sampler.accept(mx.array(entropy[free][None]), bound)[0])
            drawn = two_levels(logits[0], draws[2 * step + 1], tiling.TILES, tiling.STRIDE)
            taken = np.where(unlike, best, np.where(pinned, given, drawn))
            uncertainty = entropy
        uncertainty = np.where(unlike, np.maximum(uncertainty, GUIDED_UNCERTAINTY), uncertainty)
        certain = pinned | (unlike & accepted)
        one_hot = table(mx.array(best)).astype(mx.float32) * model.config.text.hidden_size**0.5
        conditioning = mx.where(mx.array(certain)[None, :, None], one_hot[None], model.condition(logits))
        bests.append(best)
        told.append((best.tolist(), accepted.tolist(), entropy))
        noise = np.array(mx.random.randint(0, vocab, (length,), key=draws[2 * step + 2]))
        canvas, kept = np.where(accepted, taken, noise), accepted
        ends = [j + 1 for j in range(length) if best[j] in options.end_tokens]
        counts = (np.arange(length) < min([*ends, length])) & ~pinned

        def stood(steps, counts=counts):
            return len(bests) > steps and all((b == bests[-1])[counts].all() for b in bests[-1 - steps :])

        sure = uncertainty[counts].sum() / length < options.confidence_threshold
        if (
            (stood(options.stability_threshold) and sure)
            or (options.patience and stood(options.patience))
            or (uncertainty[counts] < options.certainty_threshold).all()
        ):
            break
    return told


def told_by(steps, row=0):
    """As `plain_canvas` tells it, up to where the row was done."""
    told = []
    for step in steps:
        if step.steps[row] > len(told):
            told.append((step.argmax[row].tolist(), step.accepted[row].tolist(), np.array(step.entropy[row])))
    return told


def same(told, expected):
    assert [one[:2] for one in told] == [one[:2] for one in expected]
    for one, other in zip(told, expected):
        assert np.abs(one[2] - other[2]).max() < 0.05  # rounding, grown over the steps


def denoised(model, seed, options, layout=None, guide=None, prompt=PROMPT):
    return list(denoise_block(model, prefix_of(model, prompt), options, keys_of(seed), None, layout, guide))


LAYOUTS = {
    "one pin": layout_of([7] * 8, [3]),
    "pins": layout_of([7, 8, 9, 10, 11, 12, 13, 14], [0, 1, 4, 7]),
    "all but one": layout_of([7, 8, 9, 10, 11, 12, 13, 14], [0, 1, 2, 3, 4, 6, 7]),
    "an end token pinned": layout_of([7, 8, 39, 10, 11, 12, 13, 14], [2, 5]),
    "a draft": layout_of([7, 8, 9, 10, 11, 12, 13, 14], [], [0, 1, 2, 5, 6]),
    "a whole draft": layout_of([7, 8, 9, 10, 11, 12, 13, 14], [], range(8)),
    "both": layout_of([7, 8, 9, 10, 11, 12, 13, 14], [0, 6], [1, 2, 6]),
    "shorter": layout_of([7, 8, 9, 10, 11], [1, 3], [0]),
    "a single position": layout_of([7]),
    "nothing": layout_of([0] * 8),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_canvas_with_a_layout_equals_a_plain_loop(model, mode, name):
    layout = LAYOUTS[name]
    steps = denoised(model, 1, MODES[mode], layout)
    same(told_by(steps), plain_canvas(model, PROMPT, 1, MODES[mode], layout))
    assert steps[-1].argmax.shape == layout.tokens.shape


def test_some_canvases_with_pins_settle_and_some_do_not(model):
    """Otherwise the test before would not reach the stop rule."""
    taken = [len(denoised(model, 1, OPTIONS, LAYOUTS[name])) for name in ("one pin", "pins", "all but one", "both")]
    assert min(taken) < 4
    assert max(taken) == 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["pins", "all but one", "both"])
def test_pinned_positions_keep_their_token_in_every_step_and_canvas(model, mode, name, monkeypatch):
    layout, seen = LAYOUTS[name], []
    plain = DiffusionGemma.denoise

    def denoise(self, canvas, prefix, conditioning=None, queue=None, narrow=None):
        seen.append((canvas, conditioning))
        return plain(self, canvas, prefix, conditioning)

    monkeypatch.setattr(DiffusionGemma, "denoise", denoise)
    steps = denoised(model, 1, MODES[mode], layout)
    at, expected = np.array(layout.fixed), np.array(layout.tokens)
    assert len(seen) >= len(steps)
    for step in steps:
        assert (np.array(step.argmax)[at] == expected[at]).all()
        assert np.array(step.accepted)[at].all()
        assert (np.array(step.entropy)[at] == 0).all()
    one_hot = np.array(model.model.decoder.embed_tokens(layout.tokens)) * 4  # the root of 16
    for canvas, conditioning in seen:
        assert (np.array(canvas)[at] == expected[at]).all()
        if conditioning is not None:
            assert np.abs(np.array(conditioning)[at] - one_hot[at]).max() < 1e-5
    assert seen[0][1] is None


def test_pins_do_not_use_up_the_entropy_bound(model):
    """As many of the free ones are accepted as if they were alone."""
    layout = LAYOUTS["pins"]
    free = mx.array([2, 3, 5, 6])
    for seed in range(2):
        for step in denoised(model, seed, replace(OPTIONS, entropy_rise=0), layout):
            alone = sampler.accept(step.entropy[:, free], OPTIONS.entropy_bound)
            assert step.accepted[:, free].tolist() == alone.tolist()
            assert alone.any().item()


def test_a_canvas_of_pins_alone_is_done_at_once(model):
    layout = layout_of([7, 8, 9, 10, 11, 12, 13, 14], range(8))
    for options in MODES.values():
        (step,) = denoised(model, 0, options, layout)
        assert step.argmax.tolist() == layout.tokens.tolist()
        assert step.done == [True]


@pytest.mark.parametrize("mode", MODES)
def test_rows_with_other_pins_equal_rows_alone(model, mode):
    names = ["pins", "one pin", "both", "a draft", "nothing", "all but one"]
    prompts, seeds = [random_tokens(seed, 8).tolist() for seed in range(6)], range(6)
    layout = joined([LAYOUTS[name] for name in names])
    prefix = prefix_of(model, *prompts)
    together = list(denoise_block(model, prefix, MODES[mode], keys_of(*seeds), None, layout))
    for row, name in enumerate(names):
        alone = denoised(model, row, MODES[mode], LAYOUTS[name], prompt=prompts[row])
        same(told_by(together, row), told_by(alone))
        assert together[-1].argmax[row].tolist() == alone[-1].argmax[0].tolist()
    assert len({together[-1].steps[row] for row in range(6)}) > 1


class Pinning(Control):
    """The first blocks have layouts."""

    def __init__(self, *layouts):
        self.layouts, self.committed = list(layouts), []

    def layout(self):
        return self.layouts.pop(0) if self.layouts else None

    def commit(self, tokens):
        self.committed.append(tokens)


def test_pinned_canvases_over_two_blocks(model):
    """The second goes on behind the first, also behind a short one."""
    for first in ("one pin", "shorter"):
        control = Pinning(LAYOUTS[first], LAYOUTS["both"])
        reader, loop, events = Reader(3), Loop(model), []
        loop.add(*request_of(model, list(PROMPT), reader, 4, OPTIONS, control))
        while loop.requests:
            events += [event for _, event in loop.step()]
        blocks = [(event.tokens, event.steps) for event in events if isinstance(event, Block)]
        key, expected, said = mx.random.key(4), [], list(PROMPT)
        for layout in (LAYOUTS[first], LAYOUTS["both"], None):
            key, block_key = mx.random.split(key, 2)
            prompt = prefix_of(model, said)
            *_, last = denoise_block(model, prompt, OPTIONS, block_key[None], None, layout)
            expected.append((tuple(last.argmax[0].tolist()), last.steps[0]))
            said += last.argmax[0].tolist()
        assert blocks == expected
        assert [tuple(tokens) for tokens in reader.taken] == [tokens for tokens, _ in blocks]
        assert [len(tokens) for tokens, _ in blocks] == [LAYOUTS[first].tokens.shape[1], 8, 8]
        assert [tuple(tokens) for tokens in control.committed] == [
            tokens for tokens, _ in blocks[:2]
        ]  # the last one has ended
        assert np.array(blocks[0][0])[np.array(LAYOUTS[first].fixed[0])].tolist() == [
            token for token, pin in zip(LAYOUTS[first].tokens[0].tolist(), LAYOUTS[first].fixed[0].tolist()) if pin
        ]


def test_a_layout_of_nothing_changes_nothing(model):
    for options in MODES.values():
        same(told_by(denoised(model, 0, options, LAYOUTS["nothing"])), told_by(denoised(model, 0, options)))


# Guides.


def marks_even(best):
    """A guide that wants even tokens."""
    return np.where(best % 2 == 0, best, best ^ 1)


def guide_of(choose, tokens=(5, 6)):
    """Chooses by a function of the model's own best."""
    return Guide(np.array(tokens), (39,), (), lambda row, seen: choose(seen.argmax))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["nothing", "pins", "a draft", "shorter"])
def test_a_guided_canvas_equals_a_plain_loop(model, mode, name):
    def choose(best):
        return np.where(np.array(LAYOUTS[name].fixed[0]), best, marks_even(best))

    steps = denoised(model, 3, MODES[mode], LAYOUTS[name], guide_of(choose))
    same(told_by(steps), plain_canvas(model, PROMPT, 3, MODES[mode], LAYOUTS[name], choose))


@pytest.mark.parametrize("mode", MODES)
def test_a_guide_without_wishes_changes_nothing(model, mode):
    for seed, layout in enumerate((None, LAYOUTS["both"], LAYOUTS["shorter"])):
        plain = denoised(model, seed, MODES[mode], layout)
        same(told_by(denoised(model, seed, MODES[mode], layout, guide_of(np.copy))), told_by(plain))


class Wishless(Control):
    def guide(self, left):
        return guide_of(np.copy)


@pytest.mark.parametrize("mode", [{}, {"fast": True}])
def test_a_guide_without_wishes_changes_no_answer(engine, mode):
    options = engine.options.override(max_denoising_steps=3, **mode)
    plain = engine.generate(STORY, seed=3, max_denoising_steps=3, **mode)
    request = engine.builder.request([{"role": "user", "content": STORY}], 3, options)
    request.control = Wishless()
    *_, finished = engine.run(request)
    guided = finished.result
    assert guided.tokens == plain.tokens
    assert guided.stats.denoising_steps == plain.stats.denoising_steps
    assert guided.stats.canvas_positions == plain.stats.canvas_positions


def test_a_guide_is_told_what_whole_logits_tell(model):
    """Of the first step."""
    seen = []

    def choose(row, marginals):
        seen.append(marginals)
        return marginals.argmax

    layout = LAYOUTS["both"]
    guide = Guide(np.array([5, 6, 30]), (39, 1), (2, 3), choose)
    assert guide.tokens.tolist() == [5, 6, 30, 39, 1, 2, 3]
    denoised(model, 0, replace(OPTIONS, max_denoising_steps=1), layout, guide)
    (told,) = seen
    noise = rng.noise(8, 40, rng.split(keys_of(0), 3)[0])
    canvas = mx.where(layout.fixed | layout.initial, layout.tokens, noise)
    logits = model.logits(model.denoise(canvas, prefix_of(model, PROMPT))) / OPTIONS.t_max
    log_p = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
    free = ~np.array(layout.fixed[0])
    assert (told.argmax[free] == log_p.argmax(-1)[free]).all()
    assert np.abs(told.argmax_log_p - log_p.max(-1))[free].max() < 1e-5
    likely = np.take_along_axis(log_p, told.likely, axis=1)
    assert np.abs(told.likely_log_p - likely)[free].max() < 1e-5
    for part, tokens in (
        (told.always_scored_log_p, [5, 6, 30]),
        (told.end_log_p, [39, 1]),
        (told.thought_log_p, [2, 3]),
    ):
        assert np.abs(part - log_p[:, tokens]).max() < 1e-5
    assert told.argmax_log_p[~free].tolist() == [0, 0]
    assert told.argmax[~free].tolist() == [7, 13]


def test_a_guide_is_asked_for_rows_that_have_not_settled(model):
    asked = []

    def choose(row, seen):
        asked.append(row)
        return seen.argmax

    guide = Guide(np.array([5]), (39,), (), choose)
    layout = joined([layout_of([7] * 8, range(8)), LAYOUTS["nothing"]])
    steps = list(denoise_block(model, prefix_of(model, PROMPT, PROMPT), OPTIONS, keys_of(0, 1), None, layout, guide))
    assert asked.count(0) == 1
    assert asked.count(1) == steps[-1].steps[1] > 1


# Through the engine.


@pytest.mark.parametrize("mode", [{}, {"fast": True}])
def test_a_seed_repeats_the_tokens_with_drafts_and_without(engine, mode):
    def ask(seed, drafts):
        arguments = {"seed": seed, "regex": "[0-9]{70}", **ONCE, **mode}
        *events, finished = engine.stream(STORY, drafts=drafts, **arguments)
        blocks = [event for event in events if isinstance(event, Block)]
        assert (len(events) > len(blocks)) == drafts
        return [finished.result.tokens, finished.result.text, [block.tokens for block in blocks]]

    first = ask(1, True)
    assert ask(1, False) == first
    assert ask(2, False) != first
    assert len(first[2]) > 1
