"""Rules of one's own: equal to the built-in ones, blind to other rows, used wherever canvases are denoised."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from listeners import ask
from loop import OPTIONS, Reader, request_of, run, tiny_engine
from support import random_tokens, refusal, small_model

from mlx_dgemma.decoding import rules, sampler
from mlx_dgemma.decoding.control import Layout
from mlx_dgemma.decoding.events import Block, Finished
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.step import CONFIDENT
from mlx_dgemma.errors import OptionError
from mlx_dgemma.serving.scheduler import Scheduler
from mlx_dgemma.tasks.constrained import LanguageGuide

BASE = GenerationOptions(
    max_denoising_steps=8, entropy_bound=2.5, confidence_threshold=0.3, certainty_threshold=0.6, end_tokens=(39, 7, 11)
)
MODES = {"default": BASE, "fast": GenerationOptions().override(fast=True, max_denoising_steps=8, end_tokens=(39, 7))}
PROMPTS = [random_tokens(n, n).tolist() for n in (7, 2, 5)]


@pytest.fixture(scope="module")
def model():
    return small_model(3, scale=0.2)


def stop_of(options):
    """The built-in stop rules, given as rules."""
    settled = rules.Settled(options.stability_threshold, options.confidence_threshold)
    return rules.AnyOf((settled, rules.Certain(options.certainty_threshold), rules.Unchanged(options.patience)))


def own(options):
    """The same options with every built-in rule given as a rule of one's own."""
    accept = (
        rules.Confident(CONFIDENT) if options.fast else rules.EntropyBound(options.entropy_bound, options.entropy_rise)
    )
    return replace(options, accept=accept, settle=stop_of(options), renoise=lambda seen, accepted, noise: noise)


@dataclass(frozen=True)
class After:
    """Settled after so many steps and one more."""

    steps: int

    def __call__(self, seen, accepted):
        return mx.array(seen.step == self.steps)


def told(events):
    return [[(one.tokens, one.steps) for one in row if isinstance(one, Block)] for row in events]


@pytest.mark.parametrize("mode", MODES)
def test_rules_equal_to_the_built_in_ones_give_the_same_in_a_batch_and_alone(model, mode):
    blocks, seeds = [2, 1, 2], [5, 6, 7]
    plain, _ = run(model, PROMPTS, blocks, seeds, MODES[mode], late={2: 2})
    batch, _ = run(model, PROMPTS, blocks, seeds, own(MODES[mode]), late={2: 2})
    assert told(batch) == told(plain)
    assert {steps for row in told(plain) for _, steps in row} != {8}  # some canvases settle
    for row in range(3):
        alone, _ = run(model, [PROMPTS[row]], [blocks[row]], [seeds[row]], own(MODES[mode]))
        assert told(alone) == told([batch[row]])


@pytest.mark.parametrize("mode", MODES)
def test_rules_equal_to_the_built_in_ones_give_the_same_where_a_guide_chooses_around_fixed_tokens(model, mode):
    def steps_of(options):
        def choose(row, seen):
            return np.where(np.arange(4) == row + 1, 9, seen.argmax).astype(np.int32)

        prefix = model.new_prefix(2)
        prefill(model, prefix, np.array([[3, 1, 4]] * 2, np.int32), 2048)
        fixed = mx.array([[True, False, False, False]] * 2)
        layout = Layout(mx.full((2, 4), 8, mx.int32), fixed, mx.zeros((2, 4), mx.bool_))
        guide, keys = LanguageGuide(np.array([9]), (39,), (), choose), mx.stack([mx.random.key(n) for n in (1, 2)])
        steps = denoise_block(model, prefix, options, keys, None, layout, guide)
        return [(step.argmax.tolist(), step.accepted.tolist(), step.done) for step in steps]

    assert steps_of(own(MODES[mode])) == steps_of(MODES[mode])


def test_every_rule_decides_and_sees_its_own_canvas_alone(model):
    """Each is asked of one canvas: shapes are [C], steps and earlier texts the row's own, whoever came before it."""
    looked = []

    def accept(seen):
        looked.append((seen.step, seen.argmax.shape, seen.likely.shape[:1], seen.earlier.shape, seen.canvas.dtype))
        return mx.arange(4) < seen.step

    def settle(seen, accepted):
        return (seen.earlier[-2] >= 0).all() & (accepted.sum() == 2)  # after two steps, in the third

    def renoise(seen, accepted, noise):
        return mx.full((4,), 5, mx.int32)

    given = replace(BASE, accept=accept, settle=settle, renoise=renoise)
    events, _ = run(model, PROMPTS, [2, 2, 2], [5, 6, 7], given, late={1: 1, 2: 2})
    for row in told(events):
        assert [steps for _, steps in row] == [3, 3]
    assert {step for step, *_ in looked} >= {0, 1, 2}  # a step may be built in vain
    assert {tuple(rest) for _, *rest in looked} == {((4,), (4,), (rules.EARLIER, 4), mx.int32)}
    seen = []

    def spy(one):
        seen.append((one.step, one.canvas))
        return mx.arange(4) < 2

    run(model, PROMPTS[:1], [1], [5], replace(given, accept=spy, settle=None, certainty_threshold=0, patience=0))
    later = [canvas.tolist() for step, canvas in seen if step]
    assert later and all(canvas[2:] == [5, 5] for canvas in later)


def test_requests_with_other_rules_do_not_meet_and_equal_rules_do(model):
    loop, ends = Loop(model), {}
    for number, settle in enumerate((After(5), After(5), After(7))):
        options = replace(BASE, settle=settle)
        loop.add(*request_of(model, PROMPTS[0], Reader(1), number, options))
    widest = []
    while loop.requests:
        for request, event in loop.step():
            widest += [len(group.requests) for group in loop._groups.values()]
            if isinstance(event, Finished):
                ends[request.seed] = event.result.stats.denoising_steps
    assert ends == {0: 6, 1: 6, 2: 8}
    assert max(widest) == 2


def test_a_scheduler_uses_rules():
    scheduler = Scheduler(tiny_engine())
    asked = [ask(scheduler, n, exact=False, max_denoising_steps=8, settle=After(4)) for n in (1, 2)]
    assert [one.last.result.stats.denoising_steps for one in asked] == [10, 10]  # two canvases each
    scheduler.close()


WRONG = [
    ("accept", lambda seen: seen.entropy, "mlx.core.float32 of shape (4,)", "mlx.core.bool of shape (4,)"),
    ("accept", lambda seen: seen.text[None], "mlx.core.bool of shape (1, 4)", "mlx.core.bool of shape (4,)"),
    ("settle", lambda seen, accepted: True, "True", "mlx.core.bool of shape ()"),
    ("settle", lambda seen, accepted: accepted, "mlx.core.bool of shape (4,)", "mlx.core.bool of shape ()"),
    ("renoise", lambda seen, accepted, noise: accepted, "mlx.core.bool of shape (4,)", "mlx.core.int32 of shape (4,)"),
]


@pytest.mark.parametrize(("name", "rule", "got", "wanted"), WRONG)
def test_what_a_rule_returns_must_fit(model, name, rule, got, wanted):
    message = refusal(OptionError, run, model, PROMPTS[:1], [1], [0], replace(BASE, **{name: rule}))
    assert message == f"{name} returned {got}; it should return an array, {wanted}."


def test_rules_that_cannot_be_are_refused():
    def rule(seen):
        return seen.text

    unhashable = type("Rule", (), {"__call__": rule, "__hash__": None, "__repr__": lambda self: "Rule()"})()
    refused = {
        "accept is 3; it should be a function of what a step has found.": {"accept": 3},
        "settle is Rule(), which cannot be hashed; it should be a function or a frozen dataclass.": {
            "settle": unhashable
        },
        "exact is True and renoise is given, which changes how canvases settle: leave one out.": {
            "renoise": rule,
            "exact": True,
        },
        "mode is 'speculative' and accept is given, which changes how canvases settle: leave one out.": {
            "accept": rule,
            "mode": "speculative",
        },
    }
    for message, given in refused.items():
        assert refusal(OptionError, GenerationOptions, **given) == message
    assert refusal(OptionError, GenerationOptions().override, mode="causal", accept=rules.EntropyBound()) == (
        "mode is 'causal' and accept is EntropyBound(bound=0.1, rise=0.0), which is of canvases alone: leave one out."
    )
    assert GenerationOptions().override(mode="auto", accept=rule).mode == "diffusion"
    assert not OPTIONS.own_rules


def test_an_effort_stands_for_options_and_what_is_given_by_itself_wins():
    asked = GenerationOptions().override
    assert asked(effort="low").fast
    assert asked(effort="low").certainty_threshold == 0.3
    assert (asked(effort="medium").entropy_rise, asked(effort="high").entropy_rise) == (2, 0)
    assert asked(effort="high", entropy_rise=5).entropy_rise == 5
    for given in ({"entropy_bound": 0.5}, {"entropy_rise": 1}, {"fast": False}):
        assert not asked(effort="low", **given).fast
    assert asked(effort="high", fast=True).fast
    assert refusal(OptionError, asked, effort="max") == "effort is 'max'; it should be one of low, medium, high."
    assert refusal(OptionError, asked, effort="low", exact=True) == (
        "exact is True and effort is 'low'; exact mode has the reference's: leave one out."
    )
    assert refusal(OptionError, asked, effort="low", mode="causal") == (
        "mode is 'causal' and effort is 'low', which is of canvases alone: leave one out."
    )
    assert refusal(OptionError, GenerationOptions, exact=True, entropy_rise=1) == (
        "exact is True and entropy_rise is 1; the reference knows no such thing: leave one out."
    )


def test_the_bound_of_each_row_rises_with_its_own_steps():
    entropy = mx.array([[0.1, 0.15, 0.4]] * 2)
    bounds = mx.array([[0.1 * (1 + 2 * step)] for step in (0, 1)])
    assert sampler.accept(entropy, bounds).tolist() == [[True, True, False], [True, True, True]]
