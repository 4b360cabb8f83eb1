"""Narrow canvases: what stands behind an answer's end is not computed again, and its keys and values stay."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from loop import OPTIONS, Reader, confident, request_of
from naive import Naive, two_levels
from support import engine_of, random_tokens, refusal, small_model

from mlx_dgemma.decoding import lookahead, loop, sampler, step
from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.control import Layout
from mlx_dgemma.decoding.events import Draft
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.errors import OptionError
from mlx_dgemma.model import tiling
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.model.masks import Narrow
from mlx_dgemma.tasks.constrained import LanguageGuide

PROMPTS = [random_tokens(20 + n, n).tolist() for n in (7, 2, 11)]
BASE = GenerationOptions(
    max_denoising_steps=7, entropy_bound=2.5, entropy_rise=0, confidence_threshold=0, certainty_threshold=0, patience=3,
    end_tokens=(39, 7, 11, 22),
)  # fmt: skip
MODES = {"default": BASE, "fast": replace(BASE, fast=True)}
C, UNIT = 16, 4


@pytest.fixture(scope="module")
def model():
    """Canvas 16, calm enough for rounding not to grow from step to step."""
    model = small_model(3, scale=0.2)
    model.config = replace(model.config, canvas_length=C)
    return model


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    """A random model is never as sure as the default asks."""
    monkeypatch.setattr(step, "row_unit", lambda: UNIT)
    monkeypatch.setattr(step, "SURE", 0.5)


def prefixes_of(model, *prompts):
    made = []
    for prompt in prompts:
        made.append(model.new_prefix())
        model.encode(mx.array([prompt]), made[-1])
    return made


# The model.


def test_frozen_keys_are_those_of_the_last_pass_that_computed_them(model):
    """Two rows of other widths, which shrink and come back, against attention to keys that are kept by hand."""
    naive, prefixes = Naive(model), prefixes_of(model, *PROMPTS[:2])
    kept = [naive.encode(prompt)[1] for prompt in PROMPTS[:2]]
    own = [[] for _ in kept]
    for number, widths in enumerate([(C, C), (C, 8), (3, 8), (3, 5), (C, 5), (4, 4)]):
        canvas, given = random_tokens(number, 2, C), mx.random.normal((2, C, 16), key=mx.random.key(number))
        narrow = Narrow(widths, C)
        if widths == (C, C):
            hidden = model.denoise(canvas, prefixes, given)
        else:
            hidden = model.denoise(narrow.take(canvas), prefixes, narrow.take(given), narrow=narrow)
        parts = np.split(np.array(hidden).reshape(-1, 16), [widths[0]])
        for row, width in enumerate(widths):
            behind = [tuple(one[width:] for one in kv) for kv in own[row]]
            expected, new = naive.denoise_narrow(
                canvas[row, :width].tolist(), kept[row], np.array(given[row, :width]), behind
            )
            assert np.abs(parts[row] - expected).max() < 1e-5, (widths, row)
            own[row] = [tuple(map(np.concatenate, zip(*both))) for both in zip(new, behind)] if behind else new
    assert [one.offset for one in prefixes] == [len(prompt) for prompt in PROMPTS[:2]]


def test_the_kernels_turn_each_position_of_a_narrow_canvas_by_its_own_angle(model):
    turned = model.turns(mx.array([7, 2]), C, Narrow((3, 8), C))
    for kind, arrays in turned.items():
        for array, one, other in zip(arrays, model.turns(7, C)[kind], model.turns(2, C)[kind]):
            assert array.tolist() == mx.concatenate([one[:, :3], other[:, :8]], axis=1).tolist()


# A canvas.


def plain(model, prompt, seed, options, room=10**6):
    """[(argmax, accepted, width)] of the steps of a first block, one row, its keys kept by hand."""
    naive, total, vocab = Naive(model), options.max_denoising_steps, model.config.text.vocab_size
    _, kept = naive.encode(prompt)
    draws = mx.random.split(mx.random.split(mx.random.key(seed), 2)[1], 2 * total + 1)
    canvas = np.array(mx.random.randint(0, vocab, (C,), key=draws[0]))
    logits, own, width, given, told = np.zeros((C, vocab)), [], C, None, []
    accepted, before = np.zeros(C, bool), None
    for number in range(total):
        behind = [tuple(one[width:] for one in kv) for kv in own]
        hidden, new = naive.denoise_narrow(canvas[:width], kept, None if given is None else given[:width], behind)
        own = [tuple(map(np.concatenate, zip(*both))) for both in zip(new, behind)] if behind else new
        logits[:width] = naive.logits(hidden) / sampler.temperature(total - number, total, options.t_min, options.t_max)
        given = np.array(model.condition(mx.array(logits.astype(np.float32))[None])[0])
        p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        entropy, best, computed = -(p * np.log(p)).sum(-1), p.argmax(-1), np.arange(C) < width
        if options.fast:
            takes = accepted | confident(np.where(computed, p.max(-1), -1), accepted)
            taken = np.where(accepted, canvas, best)
        else:
            takes, total_entropy = np.zeros(C, bool), 0.0
            for j in np.argsort(entropy[:width], kind="stable"):
                takes[j] = total_entropy <= options.entropy_bound * (1 + options.entropy_rise * number)
                total_entropy += entropy[j]
            taken = two_levels(logits, draws[2 * number + 1], tiling.TILES, tiling.STRIDE)
        fresh = np.array(mx.random.randint(0, vocab, (C,), key=draws[2 * number + 2]))
        canvas = np.where(computed, np.where(takes, taken, fresh), canvas)
        accepted = np.where(computed, takes, accepted)
        told.append((best.tolist(), accepted.tolist(), width))
        end = min([j + 1 for j in range(C) if best[j] in options.end_tokens] + [room, C])
        stood = len(told) > options.patience and all(
            argmax[:end] == best[:end].tolist() for argmax, _, _ in told[-1 - options.patience :]
        )
        if stood and end <= width:
            break
        wanted = min(-(-end // UNIT) * UNIT, C)
        if wanted > width:
            width = C
        elif p.max(-1)[end - 1] >= step.SURE or end == before:
            width = wanted
        before = end
    return told


def drafts_of(events):
    """[(argmax, accepted)] of a row's steps."""
    return [(one.tokens.tolist(), one.accepted.tolist()) for one in events if isinstance(one, Draft)]


def run_all(model, prompts, seeds, options, control=None, late=()):
    """Drafts and positions of requests of one block each, some of them later than others."""
    readers, loop, drafts = [Reader(1) for _ in prompts], Loop(model), [[] for _ in prompts]
    asked = [request_of(model, *one, options, control) for one in zip(prompts, readers, seeds)]
    requests, steps, waiting = [request for request, _ in asked], 0, dict(late)
    while loop.requests or waiting or not steps:
        for row, one in enumerate(asked):
            if waiting.get(row, 0) == steps and (row in waiting or not steps):
                loop.add(*one)
                waiting.pop(row, None)
        for request, event in loop.step():
            drafts[requests.index(request)].append(event)
        steps += 1
    return [drafts_of(row) for row in drafts], [request.positions for request in requests]


@pytest.mark.parametrize("mode", MODES)
def test_a_narrow_canvas_equals_a_plain_loop(model, mode):
    changes = set()
    for seed in (1, 4, 5):
        (told,), positions = run_all(model, PROMPTS[:1], [seed], MODES[mode])
        expected = plain(model, PROMPTS[0], seed, MODES[mode])
        assert told == [one[:2] for one in expected]
        widths = [width for _, _, width in expected]
        assert positions == [sum(widths)]
        changes |= {"cut" if after < before else "back" for before, after in pairwise(widths) if after != before}
    assert changes == {"cut", "back"}


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_other_widths_equal_rows_alone(model, mode, monkeypatch):
    """Rows that are there from the beginning, that join later, and whose next step was built in vain."""
    seen = set()
    take = Narrow.take
    monkeypatch.setattr(Narrow, "take", lambda self, whole: seen.add(self.widths) or take(self, whole))
    seeds, late = (0, 4, 4), {2: 4}
    told, positions = run_all(model, PROMPTS, seeds, MODES[mode], late=late)
    for row, seed in enumerate(seeds):
        alone, own = run_all(model, [PROMPTS[row]], [seed], MODES[mode])
        assert (told[row], positions[row]) == (alone[0], own[0])
    assert any(len(set(widths)) > 1 for widths in seen)
    assert any(len(widths) == 3 for widths in seen)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_built_in_vain_leaves_nothing_behind(model, mode, monkeypatch):
    """Nor do its first layers, which were computed: the tokens are those of a loop that builds nothing ahead."""
    restored, found, restore, advance = [], [], Prefix.restore, loop.advance
    monkeypatch.setattr(Prefix, "restore", lambda self, kept: restored.append(len(kept)) or restore(self, kept))
    for early, ahead in ((0, False), (0, True), (2, True)):
        monkeypatch.setattr(lookahead, "early_layers", lambda batch, early=early: early)
        monkeypatch.setattr(loop, "advance", lambda batch, ahead, wanted=ahead: advance(batch, ahead and wanted))
        restored.clear()
        found.append([run_all(model, PROMPTS[:1], [seed], MODES[mode]) for seed in (1, 5)])
        assert set(restored) == ({3} if ahead else set())  # all layers, whatever was started
    assert found[0] == found[1] == found[2]


def test_the_first_step_and_a_whole_canvas_are_those_of_full(model):
    """Up to the first cut nothing differs; an answer without an end is the same to its own end."""
    full = {"default": replace(BASE, canvas="full"), "fast": replace(MODES["fast"], canvas="full")}
    for mode, options in MODES.items():
        (narrow,), positions = run_all(model, PROMPTS[:1], [1], options)
        (whole,), all_positions = run_all(model, PROMPTS[:1], [1], full[mode])
        assert narrow[0] == whole[0]
        assert all_positions == [len(whole) * C]
        assert positions[0] < len(narrow) * C
        endless = [replace(one, end_tokens=()) for one in (options, full[mode])]
        assert run_all(model, PROMPTS[:1], [1], endless[0]) == run_all(model, PROMPTS[:1], [1], endless[1])


def test_only_what_the_text_has_room_for_is_computed(model):
    batch = CanvasBatch(model, prefixes_of(model, PROMPTS[0]), replace(BASE, end_tokens=()), key_of(1), [6])
    widths = []
    for _ in range(3):
        lookahead.advance(batch)
        widths += batch.widths
    assert widths == [8, 8, 8]


def key_of(seed):
    return mx.random.key(seed)[None]


def test_laid_out_canvases_and_rows_of_one_prefix_stay_whole(model):
    none = mx.zeros((1, C), mx.bool_)
    laid = CanvasBatch(model, prefixes_of(model, PROMPTS[0]), BASE, key_of(5), layout=Layout(none * 1, none, none))
    shared = model.new_prefix(2)
    model.encode(mx.array([PROMPTS[0]] * 2), shared)
    together = CanvasBatch(model, shared, BASE, mx.concatenate([key_of(5)] * 2))
    exact = CanvasBatch(model, prefixes_of(model, PROMPTS[0]), replace(OPTIONS, end_tokens=BASE.end_tokens), key_of(5))
    alone = CanvasBatch(model, prefixes_of(model, PROMPTS[0]), BASE, key_of(5))
    for batch, narrows in ((laid, False), (together, False), (exact, False), (alone, True)):
        least = C
        for _ in range(5):
            lookahead.advance(batch)
            least = min(least, *batch.widths)
        assert (least < C) == batch.narrows == narrows


def guide_of(choose):
    return LanguageGuide(np.array([5, 6]), (39,), (), lambda row, seen: choose(seen.argmax.copy()))


@pytest.mark.parametrize("mode", MODES)
def test_a_guide_narrows_and_widens_as_the_text_that_it_chooses(model, mode):
    """Without wishes nothing changes; a canvas ends where its guide ends it, and comes back with its text."""

    def steps_of(choose):
        guide = None if choose is None else guide_of(choose)
        batch = CanvasBatch(model, prefixes_of(model, PROMPTS[0]), MODES[mode], key_of(1), guide=guide)
        return [(lookahead.advance(batch).argmax.tolist(), list(batch.widths)) for _ in range(7)]

    def ends(best):
        asked.append(best)
        best[np.isin(best, BASE.end_tokens)] = 5
        if len(asked) not in (4, 5):
            best[6] = 39
        return best

    asked = []
    assert steps_of(np.copy) == steps_of(None)
    widths = [widths for _, widths in steps_of(ends)]
    assert widths[1:5] + widths[6:] == [[8], [8], [C], [C], [8]]


# Options, and the demo.


def test_a_canvas_is_auto_full_or_a_size():
    for value in ("wide", 0, -1, 1.5, True, None, 2**31):
        said = refusal(OptionError, GenerationOptions, canvas=value)
        assert said == f"canvas is {value!r}; it should be auto, full or a whole number, at least 1."
    assert "exact is True and canvas is 8" in refusal(OptionError, GenerationOptions, canvas=8, exact=True)
    assert GenerationOptions(canvas=np.int32(8)).canvas == 8
    sizes = [[one.canvas_at(block, 64) for block in range(4)] for one in map(sized, ("auto", "full", 8, 24, 100))]
    assert sizes == [[64] * 4, [64] * 4, [8, 16, 32, 64], [24, 48, 64, 64], [64] * 4]
    assert sized(1).canvas_at(10**6, 64) == 64


def sized(canvas):
    return GenerationOptions(canvas=canvas)


PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


def test_answers_of_the_demo_with_and_without(engine):
    """Alone and together, free and in a language; a short canvas has room for a short reply."""
    asked = [PERSON, "Spell the word frog."]
    slow = {"certainty_threshold": 0, "confidence_threshold": 0}  # more steps than the demo needs
    alone = [engine.generate(one, seed=i, **slow) for i, one in enumerate(asked)]
    together = engine.generate_batch(asked, seeds=[0, 1], **slow)
    whole = [engine.generate(one, seed=i, canvas="full", **slow) for i, one in enumerate(asked)]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.text for one in alone] == [one.text for one in whole]
    for narrow, batched, full in zip(alone, together, whole):
        assert narrow.stats.canvas_positions == batched.stats.canvas_positions < full.stats.canvas_positions
        assert full.stats.canvas_positions == 64 * full.stats.denoising_steps
    formed = [engine.generate(PERSON, schema=SCHEMA, seed=0, canvas=one, **slow) for one in ("auto", "full")]
    assert formed[0].text == formed[1].text
    assert formed[0].stats.canvas_positions < formed[1].stats.canvas_positions
    short = engine.generate("Spell the word frog.", seed=1, canvas=16, **slow)
    assert short.text == "f r o g"
    assert short.stats.canvas_positions <= 16 * short.stats.denoising_steps


@pytest.mark.parametrize("ask", [
    lambda engine, canvas: engine.infill("def add(a, b):\n    return a ", " b", length=2, seed=0, canvas=canvas),
    lambda engine, canvas: engine.edit("The cat sat on the mat.", "Make it a dog.", seed=0, canvas=canvas),
])  # fmt: skip
def test_canvases_that_are_laid_out_are_what_they_were(engine, ask):
    auto, full = (ask(engine, canvas) for canvas in ("auto", "full"))
    assert (auto.text, auto.stats.canvas_positions) == (full.text, full.stats.canvas_positions)
