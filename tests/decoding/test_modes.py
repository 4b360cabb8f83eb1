"""The modes of the block loop: each against a plain loop, how their blocks end, and what is built ahead of need."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from loop import OPTIONS, Reader, plain_loop, request_of, run
from support import engine_of, random_tokens, refusal, small_model
from test_generate import PROMPTS

from mlx_dgemma.decoding import canvas as module
from mlx_dgemma.decoding import lookahead
from mlx_dgemma.decoding.events import Block, Draft
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.errors import OptionError
from mlx_dgemma.model import head, tiling
from mlx_dgemma.model.config import GenerationConfig, ProcessorConfig
from mlx_dgemma.model.kv_cache import Prefix

# As wide as the bounds of exact mode's tests; every rule alone, and together as the modes have them.
BASE = GenerationOptions(max_denoising_steps=10, entropy_bound=2.5, confidence_threshold=1.0, certainty_threshold=1.0)
NEVER = {"confidence_threshold": 0, "certainty_threshold": 0, "patience": 0}
MODES = {
    "exact": OPTIONS,
    "default": BASE,
    "fast": replace(BASE, fast=True, certainty_threshold=0.5),
    "patience": replace(BASE, **{**NEVER, "patience": 2}),
    "certainty": replace(BASE, **{**NEVER, "certainty_threshold": 1.5}),
    "settled": replace(BASE, **{**NEVER, "confidence_threshold": 1.0}),
    "fast, settled": replace(BASE, fast=True, **{**NEVER, "confidence_threshold": 1.0}),
    "steps": replace(BASE, **NEVER),
    "cold": replace(BASE, t_min=0.2, t_max=0.2, max_denoising_steps=6, **NEVER),
}
ENDS = {40: (39, 7, 11, 22), 1000: tuple(range(0, 1000, 9))}  # likely enough that texts end inside of a canvas
PROMPT = random_tokens(1, 9).tolist()


@pytest.fixture(scope="module")
def models():
    """By vocabulary, calm enough for rounding not to grow from step to step; in the larger one few tokens suffice."""
    return {40: small_model(3, scale=0.2), 1000: small_model(3, scale=0.08, vocab_size=1000, hidden_size=64)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILES", 300)  # three tokens of 1000


def options_of(mode, vocab, **changes):
    return replace(MODES[mode], end_tokens=ENDS[vocab], **changes)


def blocks_of(events, row=0):
    return [(event.tokens, event.steps) for event in events[row] if isinstance(event, Block)]


def drafts_of(events, block, row=0):
    return [event for event in events[row] if isinstance(event, Draft) and event.block == block]


def compare(model, options, blocks, seed, room=10**6):
    """Run the loop and the plain one; both must tell the same, step for step. Returns the plain one's blocks."""
    events, _ = run(model, [PROMPT], [blocks], [seed], options, room=room)
    plain = plain_loop(model, PROMPT, blocks, seed, options, room)
    assert blocks_of(events) == [told[:2] for told in plain]
    for number, told in enumerate(plain):
        for draft, accepted, entropy in zip(drafts_of(events, number), told.accepted, told.entropy):
            assert np.array(draft.accepted).tolist() == accepted.tolist()
            assert np.abs(np.array(draft.entropy) - entropy).max() < 0.05  # rounding, grown over ten steps
    return plain


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocab", [40, 1000])
def test_every_mode_equals_a_plain_loop(models, mode, vocab):
    compare(models[vocab], options_of(mode, vocab), 2, 1)


@pytest.mark.parametrize("stability", [0, 2, 3])
def test_more_stability_than_patience_and_less(models, stability):
    options = options_of("default", 40, stability_threshold=stability, certainty_threshold=0, patience=2)
    compare(models[40], options, 2, 2)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_batch_equal_rows_alone(models, mode):
    """Prompts of other lengths, rows that settle and end at other times: each is as if it were alone."""
    prompts = [random_tokens(20 + n, n).tolist() for n in (7, 2, 5)]
    blocks, seeds, options = [1, 1, 2], [5, 6, 7], options_of(mode, 40)
    events, readers = run(models[40], prompts, blocks, seeds, options)
    for row in range(3):
        alone, (reader,) = run(models[40], [prompts[row]], [blocks[row]], [seeds[row]], options)
        assert readers[row].taken == reader.taken
        assert blocks_of(events, row) == blocks_of(alone)
        for block in range(blocks[row]):
            mine, other = drafts_of(events, block, row), drafts_of(alone, block)
            assert [e.tokens.tolist() for e in mine] == [e.tokens.tolist() for e in other]
            assert [e.accepted.tolist() for e in mine] == [e.accepted.tolist() for e in other]


def test_a_block_ends_although_what_follows_its_end_token_does_not_settle(models):
    for mode, seed in (("patience", 62), ("certainty", 6), ("settled", 22)):
        options = options_of(mode, 40, entropy_rise=0)
        (told,) = compare(models[40], options, 1, seed)
        counted = told.counted[-1]
        assert told.steps < 10
        assert told.tokens[counted.sum() - 1] in ENDS[40]
        assert not counted.all()
        whole, _ = run(models[40], [PROMPT], [1], [seed], replace(options, end_tokens=()))
        assert blocks_of(whole)[0][1] > told.steps  # without an end token it would have gone on


@pytest.mark.parametrize(
    ("mode", "why"), [("patience", "patience"), ("certainty", "certainty"), ("settled", "settled")]
)
def test_a_block_ends_by_one_rule_alone(models, mode, why):
    (told,) = compare(models[1000], replace(options_of(mode, 1000), end_tokens=()), 1, 2)
    assert told.why == {why}
    assert told.steps < 10


def test_only_what_the_text_has_room_for_must_settle(models):
    """Room for five tokens: all of the first canvas, and the first position of the second."""
    options = replace(options_of("certainty", 40, entropy_rise=0), end_tokens=())
    first, second = compare(models[40], options, 2, 0, room=5)
    assert first.counted[-1].all()
    assert second.counted[-1].tolist() == [True, False, False, False]
    assert second.why == {"certainty"}
    assert (second.entropy[-1] > options.certainty_threshold).any()
    roomy = compare(models[40], options, 2, 0)
    assert roomy[0][:2] == first[:2]
    assert roomy[1].steps > second.steps


def test_exact_mode_minds_neither_end_tokens_nor_room(models):
    tokens = blocks_of(run(models[40], [PROMPT], [3], [2], OPTIONS)[0])
    assert blocks_of(run(models[40], [PROMPT], [3], [2], replace(OPTIONS, end_tokens=ENDS[40]), room=1)[0]) == tokens


def test_fast_mode_never_gives_up_a_position(models):
    events, _ = run(models[1000], [PROMPT], [2], [1], options_of("fast, settled", 1000))
    for block in range(2):
        kept = [np.array(draft.accepted) for draft in drafts_of(events, block)]
        assert len(kept) > 2
        for earlier, later in pairwise(kept):
            assert later[earlier].all()
            assert later.sum() > earlier.sum() or earlier.all()


@pytest.mark.parametrize("mode", ["exact", "default", "fast"])
def test_watching_changes_nothing(models, mode):
    """Drafts that are read at once, later or never."""
    seen = {}
    for way in ("at once", "later", "never"):
        reader, events = Reader(3), []
        request, session = request_of(models[40], PROMPT, reader, 1, options_of(mode, 40))
        request.drafts = way != "never"
        loop = Loop(models[40])
        loop.add(request, session)
        while loop.requests:
            for _, event in loop.step():
                if way == "at once" and isinstance(event, Draft):
                    assert event.tokens.tolist() and event.accepted.tolist() and event.entropy.tolist()
                events.append(event)
        if way == "later":
            assert all(len(e.entropy.tolist()) == 4 for e in events if isinstance(e, Draft))
        assert any(isinstance(event, Draft) for event in events) == request.drafts
        seen[way] = reader.taken, blocks_of([events])
    assert seen["at once"] == seen["later"] == seen["never"]


# Building ahead.


def computed(model, options, call, monkeypatch):
    """Whether a forward of a run over two blocks is computed: its canvas depends on 64 MiB. And the run's blocks."""
    denoise, calls = type(model).denoise, []

    def burdened(self, canvas, *rest):
        calls.append(1)
        if len(calls) == call + 1:
            canvas = canvas + (mx.arange(2**24, dtype=mx.int32).sum() * 0).astype(mx.int32)
        return denoise(self, canvas, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "denoise", burdened)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        events, _ = run(model, [PROMPT], [2], [2], options)
        mx.synchronize()
        return mx.get_peak_memory() - before > 2**25, len(calls), blocks_of(events)


@pytest.mark.parametrize(
    ("mode", "vocab"), [("exact", 40), ("default", 40), ("default", 1000), ("fast", 1000), ("cold", 1000)]
)
def test_a_step_that_was_built_and_is_not_needed_is_not_computed(models, mode, vocab, monkeypatch):
    monkeypatch.setattr(module, "DENSE", 1)  # other numbers of diffuse positions are other graphs
    monkeypatch.setattr(tiling, "TOP_TOKENS", 4)
    wide = {"stability_threshold": 0, "confidence_threshold": 1.5, "max_denoising_steps": 4}
    options, restored = options_of(mode, vocab, **({} if mode == "cold" else wide)), []
    restore = Prefix.restore
    monkeypatch.setattr(Prefix, "restore", lambda self, handles: restored.append(1) or restore(self, handles))
    _, built, blocks = computed(models[vocab], options, -1, monkeypatch)
    unused = len(restored)
    found = [computed(models[vocab], options, call, monkeypatch) for call in range(built)]
    assert all(one[1:] == (built, blocks) for one in found)
    steps = sum(steps for _, steps in blocks)
    assert sum(one[0] for one in found) == steps
    assert built == steps + unused > steps
    assert (mode == "cold") <= any(not one[0] for one in found[: built - 2])  # where foreseen wrongly, built again


@pytest.mark.parametrize("mode", ["exact", "default", "fast"])
def test_the_prefix_ends_with_the_canvas_that_was_shown_last(models, mode, monkeypatch):
    """Not with the one that would have followed: the slots behind the prefix hold the last step's keys."""
    model, calls = models[40], []
    denoise = type(model).denoise
    monkeypatch.setattr(
        type(model), "denoise", lambda self, *given: calls.append((given[0], *given[2:3])) or denoise(self, *given)
    )
    prefix, fresh = model.new_prefix(), model.new_prefix()
    for one in (prefix, fresh):
        model.encode(mx.array([PROMPT]), one)
    options = options_of(mode, 40, stability_threshold=0)
    steps = list(denoise_block(model, prefix, options, mx.random.key(3)[None]))
    assert len(calls) > len(steps)
    followed = calls[-1]
    canvas, conditioning = calls[-2]
    assert canvas.tolist() != followed[0].tolist()
    denoise(model, canvas, fresh, conditioning)
    for one, other in zip(prefix.state, fresh.state):
        assert mx.abs(one - other).max().item() < 1e-5
    assert prefix.offset == len(PROMPT)


@pytest.mark.parametrize("mode", ["exact", "default", "fast"])
def test_layers_that_are_started_early_change_nothing(models, mode, monkeypatch):
    """Whether the next step is taken, is of no use, or is built anew."""
    monkeypatch.setattr(module, "DENSE", 1)
    monkeypatch.setattr(tiling, "TOP_TOKENS", 4)
    options, found, restore, undone = options_of(mode, 1000, max_denoising_steps=6), [], Prefix.restore, []
    options = replace(options, canvas="auto" if mode == "exact" else "full")
    monkeypatch.setattr(Prefix, "restore", lambda self, kept: undone.append(len(kept)) or restore(self, kept))
    for early in (0, 2):
        monkeypatch.setattr(lookahead, "early_layers", lambda batch, early=early: early)
        events, _ = run(models[1000], [PROMPT, PROMPT[:3]], [2, 2], [2, 1], options)
        found.append([blocks_of(events, row) for row in range(2)])
    assert found[0] == found[1]
    assert set(undone) == {3, 1}


@pytest.mark.parametrize("early", [0, 2, 3])
def test_no_step_copies_the_prefix(models, early, monkeypatch):
    model, taken = models[40], []
    monkeypatch.setattr(lookahead, "early_layers", lambda batch: taken.append(early) or early)
    prefix = model.new_prefix(capacity=200_000)
    model.encode(mx.array([PROMPT]), prefix)
    mx.eval(model.denoise(mx.array([PROMPT]), prefix), prefix.state)
    options = options_of("steps", 40, canvas="full" if early == 3 else "auto")  # full layers are not undone
    steps = denoise_block(model, prefix, options, mx.random.key(3)[None])
    next(steps)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in steps:
        assert mx.get_peak_memory() - before < prefix.layers[2].keys.nbytes / 2
    assert len(taken) > 4


def test_every_way_of_conditioning_is_taken_and_none_changes_the_result(models, monkeypatch):
    """Few tokens that count as likely; positions are diffuse by turns, more and fewer than was foreseen."""
    condition = head.Prediction.condition

    def spied(self, model, dense, *rest):
        taken.add("whole" if self.expected_embedding is not None else "second pass" if dense else "likely tokens")
        return condition(self, model, dense, *rest)

    monkeypatch.setattr(head.Prediction, "condition", spied)
    for likely, ways in ((16, {"whole", "second pass", "likely tokens"}), (3, {"whole", "second pass"})):
        monkeypatch.setattr(tiling, "TOP_TOKENS", likely)
        found, taken = [], set()
        for tail, dense in ((1e-4, 1), (1e-4, 64), (1e-4, 3), (-1, 64)):
            monkeypatch.setattr(head, "TAIL", tail)
            monkeypatch.setattr(module, "DENSE", dense)
            prompts, told = [PROMPT, random_tokens(4, 6).tolist()], []
            for mode in ("default", "steps", "cold"):
                events, _ = run(models[1000], prompts, [1, 1], [1, 2], options_of(mode, 1000))
                told.append([blocks_of(events, row) for row in range(2)])
            found.append(told)
        assert taken >= ways
        assert all(told == found[0] for told in found)


# Through the engine.


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


def counting(first, last):
    """Tokens of "3, 4, 5, ..." as the demo writes them."""
    digits = {str(n): 294 + n for n in range(10)}
    numbers = [[digits[digit] for digit in str(n)] for n in range(first, last)]
    return [token for number in numbers for token in (*number, 290, 368)][:100]


# Of exact mode, ever since there was a first version: tokens, which are those of all four seeds, and steps by seed.
ANNA = (
    "366 282 541 282 304 368 282 1091 282 290 368 282 523 282 304 368 297 295 290 368 "
    "282 542 282 304 368 282 1001 282 367"
)
GOLDEN = [
    ([int(token) for token in ANNA.split()], [2, 2, 2, 2]),
    (counting(3, 31), [9, 8, 9, 9]),
    ([342, 371, 369], [2, 2, 2, 2]),
    ([486, 449, 446, 1026, 379, 858, 292], [2, 2, 2, 2]),
]


@pytest.mark.parametrize(("prompt", "golden"), list(zip(PROMPTS, GOLDEN)), ids=PROMPTS)
def test_exact_modes_tokens_never_change(engine, prompt, golden):
    results = engine.generate_batch([prompt] * 4, seeds=range(4), max_tokens=100, exact=True)
    assert [result.tokens for result in results] == [golden[0]] * 4
    assert [result.stats.denoising_steps for result in results] == golden[1]


@pytest.mark.parametrize("mode", [{"exact": True}, {}, {"fast": True}], ids=["exact", "default", "fast"])
def test_streams_batches_and_chunks_give_what_generate_gives(engine, mode):
    prompts, seeds = PROMPTS[1:3], [3, 0]
    alone = [engine.generate(prompt, seed=seed, max_tokens=80, **mode) for prompt, seed in zip(prompts, seeds)]
    together = engine.generate_batch(prompts, seeds=seeds, max_tokens=80, prefill_chunk=16, **mode)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.stats.denoising_steps for r in together] == [r.stats.denoising_steps for r in alone]
    *events, last = engine.stream(prompts[0], seed=seeds[0], max_tokens=80, **mode)
    assert last.result.tokens == alone[0].tokens
    assert sum(isinstance(event, Draft) for event in events) == alone[0].stats.denoising_steps


# Options.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exact": 1}, "exact is 1; it should be true or false."),
        ({"exact": None}, "exact is None; it should be true or false."),
        ({"fast": "yes"}, "fast is 'yes'; it should be true or false."),
        (
            {"exact": True, "fast": True},
            "exact is True and fast is True; the reference knows no such thing: leave one out.",
        ),
        (
            {"exact": True, "patience": 3},
            "exact is True and patience is 3; the reference knows no such thing: leave one out.",
        ),
        (
            {"exact": True, "certainty_threshold": 0.2},
            "exact is True and certainty_threshold is 0.2; the reference knows no such thing: leave one out.",
        ),
        ({"patience": -1}, "patience is -1; it should be a whole number, at least 0."),
        ({"patience": 1.5}, "patience is 1.5; it should be a whole number, at least 0."),
        ({"patience": True}, "patience is True; it should be a whole number, at least 0."),
        ({"certainty_threshold": -0.1}, "certainty_threshold is -0.1; it should be a number, at least 0."),
        ({"certainty_threshold": "x"}, "certainty_threshold is 'x'; it should be a number, at least 0."),
        ({"certainty_threshold": float("inf")}, "certainty_threshold is inf; it should be a number, at least 0."),
    ],
)
def test_what_does_not_go_together_or_is_out_of_bounds_is_named(given, message):
    assert refusal(OptionError, GenerationOptions, **given) == message
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        assert refusal(OptionError, GenerationOptions().override, **given) == message


def test_fast_mode_has_no_entropy_bound_that_could_be_given():
    """The checkpoint's own is no conflict: it is the other modes'."""
    bound = "fast is True and entropy_bound is 0.2; fast mode accepts by confidence: leave one out."
    assert refusal(OptionError, GenerationOptions().override, fast=True, entropy_bound=0.2) == bound
    assert refusal(OptionError, GenerationOptions(fast=True).override, entropy_bound=0.2) == bound
    own = GenerationOptions.of(GenerationConfig(entropy_bound=0.7), ProcessorConfig())
    assert own.override(fast=True).fast
    assert GenerationOptions(fast=True).override(fast=False, entropy_bound=0.2).entropy_bound == 0.2


def rules(options):
    return options.certainty_threshold, options.patience


def test_the_rules_follow_the_mode_where_they_are_not_given():
    assert rules(GenerationOptions()) == (0.3, 2)
    assert rules(GenerationOptions(fast=True)) == (0.3, 2)
    assert rules(GenerationOptions(exact=True)) == (0, 0)
    assert rules(GenerationOptions(fast=True, patience=5)) == (0.3, 5)
    assert rules(GenerationOptions(certainty_threshold=0, patience=0)) == (0, 0)
    assert rules(GenerationOptions(exact=True, certainty_threshold=0, patience=0)) == (0, 0)  # off is no conflict


def test_the_rules_follow_the_mode_when_override_switches_it():
    default = GenerationOptions()
    assert rules(default.override(exact=True)) == (0, 0)
    assert rules(default.override(exact=True).override(exact=False)) == (0.3, 2)
    assert rules(default.override(exact=True).override(exact=False, fast=True)) == (0.3, 2)
    assert rules(default.override(fast=True).override(fast=False)) == (0.3, 2)
    assert rules(default.override(fast=True, patience=3)) == (0.3, 3)
    assert rules(default.override(patience=3).override(max_tokens=9)) == (0.3, 3)
    assert rules(default.override(patience=None, certainty_threshold=0.7)) == (0.7, 2)
    exact = "exact is True and patience is 3; the reference knows no such thing: leave one out."
    assert refusal(OptionError, default.override(exact=True).override, patience=3) == exact
    both = "exact is True and fast is True; the reference knows no such thing: leave one out."
    assert refusal(OptionError, default.override(exact=True).override, fast=True) == both
