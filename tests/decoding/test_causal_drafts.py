"""Drafts: whatever they are, the text is causal mode's; and when they are made."""

from dataclasses import replace

import numpy as np
import pytest
from support import engine_of, small_model
from test_causal import DRAWN, GREEDY, PROMPTS, generate

from mlx_dgemma.decoding import causal, speculative
from mlx_dgemma.decoding.costs import pass_cost, reckoned
from mlx_dgemma.decoding.speculative import Drafter, Pace, paying


@pytest.fixture(scope="module")
def model():
    return small_model(3, scale=0.2)


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("length", [1, 9])
def test_any_draft_comes_to_the_same_text(model, monkeypatch, options, length):
    """Together with a row in causal mode; drafts of 9 are longer than the window (5), those of 1 wrap its ring.

    Drafts are found as ever, or right but for their last token.
    """
    monkeypatch.setattr(Pace, "length", length)
    monkeypatch.setattr(causal, "AT_ONCE", 4)
    asked = [(prompt, count, 7 + i, options) for i, (prompt, count) in enumerate(zip(PROMPTS, (24, 13, 9)))]
    alone = [generate(model, [one])[0] for one in asked]
    drafted = [(*one[:3], replace(options, mode="speculative")) for one in asked]
    found = generate(model, [*drafted[:2], asked[2]], late={1: 3})

    def nearly_right(drafter, most, most_by_model):
        for prompt, (tokens, _) in zip(PROMPTS, alone):
            if drafter._text[: len(prompt)] == prompt:
                draft = tokens[len(drafter._text) - len(prompt) :][: min(most, length)]
                return [*draft[:-1], draft[-1] ^ 1] if len(draft) > 1 else draft
        raise AssertionError

    monkeypatch.setattr(speculative.Drafter, "propose", nearly_right)
    found += generate(model, drafted[:2])
    for (tokens, log_probs), (right, right_log_probs) in zip(found, [*alone, *alone[:2]], strict=True):
        assert tokens == right
        assert np.abs(np.array(log_probs) - right_log_probs).max() < 1e-4


def test_right_drafts_save_passes(demo):
    engine, told = engine_of(demo), {}
    for mode in ("causal", "speculative"):
        told[mode] = engine.generate("Write JSON for: Anna is 31 years old and lives in Oslo.", mode=mode, seed=4)
    single, drafted = told["causal"].stats, told["speculative"].stats
    assert told["causal"].tokens == told["speculative"].tokens
    assert drafted.causal_passes < single.causal_passes / 3 and drafted.denoising_steps <= drafted.causal_passes
    assert drafted.accepted_tokens >= 3 * drafted.verify_passes > 0 == single.verify_passes


def test_text_that_repeats_itself_is_its_own_draft(model):
    config = model.config.text
    drafter = Drafter([1, 2, 3, 4, "picture", 5, 6, 1, 2, 3], reckoned(config), 63)
    assert drafter.propose(8, 0) == [4]  # what stands for a picture is no token
    drafter.take(9)
    assert isinstance(drafter.propose(8, 4), int)
    for token in (7, 8, 7, 8, 7):
        drafter.take(token)
    assert drafter.propose(4, 4) == [8, 7, 8, 7]  # on and on


def test_drafts_rest_while_they_do_not_pay(model):
    config = model.config.text
    costs = [pass_cost(config, length + 1, 64) for length in speculative.LENGTHS]
    assert costs == sorted(costs) and pass_cost(config, 1, 64) == 1 < costs[0]
    assert pass_cost(config, 65, 1) == pytest.approx(65)  # where arithmetic is all that counts
    pace = Pace({4: 3.0, 64: 8.0})
    pace.learn(64, 64)
    lengths = [pace.length]
    while pace.length:
        pace.learn(pace.length, 1)
        lengths.append(pace.length)
    assert lengths[0] == 64 and lengths[-1] == 0 and 3 < len(lengths) < 9
    assert sorted(lengths, reverse=True) == lengths and 4 in lengths  # shorter, then none
    for rest in (speculative.REST, 2 * speculative.REST):
        for _ in range(rest - 1):
            pace.pass_by()
        assert pace.length == 0
        pace.pass_by()
        assert pace.length > 0
        for _ in range(9):
            if pace.length:
                pace.learn(pace.length, 0)


def test_what_a_wrong_draft_has_behind_the_mended_place_is_the_next_one(model):
    """Tokens that it was sure of stay, the others are those that were drawn behind the wrong one."""
    drafter = Drafter([1], reckoned(model.config.text), 15, end_tokens=(39,))
    assert drafter.propose(30, 15) == 15
    made, sure = [11, 12, 13, 14, 15, 39, 17, 18], [0.99, 0.99, 0.99, 0.8, 0.99, 0.99, 0.99, 0.99]
    draft = drafter.keep(made, sure, 15)
    assert draft == made[:6]  # the text ends there
    drawn = [11, 22, 23, 24, 25, 26, 27]
    drafter.learn(draft, drawn, 1)
    for token in drawn[:2]:
        drafter.take(token)
    assert drafter.propose(30, 15) == [13, 24, 15, 39]
    drafter.take(13)
    assert drafter.propose(30, 15) == [24, 15, 39]  # a token that came alone
    drafter.learn([24, 15, 39], [23, 15, 39, 8], 0)
    drafter.take(23)
    assert isinstance(drafter.propose(30, 15), int)  # wrong again


def test_a_draft_is_as_long_as_pays():
    verify = [1.0, 1.2, 1.4, 1.6, 1.8]
    assert paying([0.99, 0.99, 0.1, 0.99], verify)[0] == 2
    assert paying([0.99, 0.99, 0.1, 0.99], [1.0] * 5, spent=2.0)[0] == 4  # where length costs nothing
    assert paying([0.1, 0.9], verify) == (0, 1.0)  # no draft is better
    assert paying([float("nan")], verify) == paying([], verify) == (0, 1.0)
    count, gain = paying([1.0] * 9, verify)
    assert (count, gain) == (4, pytest.approx(5 / 1.8))
