"""`mode="auto"`: what it takes where, and costs that are measured and kept."""

import json
import threading

import pytest
from support import engine_of, refusal, small_model

from mlx_dgemma.decoding import costs as costs_
from mlx_dgemma.decoding.costs import Costs, KnownCosts, between, reckoned
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.errors import OptionError
from mlx_dgemma.tasks.mode import Kind, choose_mode

SPELL = "Spell the word frog."


def machine(token, step):
    """Costs in milliseconds where a step over 256 positions takes so long, shorter passes in proportion to 64."""
    by = {17: 0.3 * step, 65: 0.5 * step, 256: step}
    return Costs(token, {5: max(1.2 * token, 0.2 * step), 17: 0.3 * step, 65: 0.5 * step}, by, by, measured=True)


MAC = machine(14.5, 640.0)  # an M1 Ultra as others measured it: 69 tokens a second; 15 in 17 steps a canvas
GPU = machine(3.0, 16.0)  # where a step is hardly dearer than a few tokens


@pytest.mark.parametrize(
    ("costs", "kind", "mode"),
    [
        (MAC, Kind(200), "causal"),
        (MAC, Kind(9), "causal"),
        (MAC, Kind(400, "rigid"), "diffusion"),
        (MAC, Kind(400, "copy", tokens_only=True), "causal"),
        (GPU, Kind(200), "diffusion"),
        (GPU, Kind(1), "causal"),
        (GPU, Kind(400, "copy"), "diffusion"),
        (GPU, Kind(200, tokens_only=True), "speculative"),
        (GPU, Kind(64, "copy", tokens_only=True), "speculative"),
    ],
)
def test_the_mode_that_takes_the_least_time_is_chosen(costs, kind, mode):
    choice = choose_mode(costs, kind, 256)
    assert choice.mode == mode
    assert f"about {kind.tokens} tokens of {kind.text} text" in choice.reason and choice.reason.endswith(" ms")


def test_costs_between_measured_ones():
    known = {1: 2.0, 17: 4.0, 65: 8.0}
    assert [between(known, at) for at in (1, 9, 17, 41, 65, 130)] == [2, 3, 4, 6, 8, 16]
    assert between({64: 5.0}, 4) == 5


def test_what_was_measured_is_kept_for_models_of_the_same_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MLX_DGEMMA_MEASURE", "1")
    monkeypatch.setattr(costs_, "measure", lambda model: told.append(model) or MAC)
    told, model = [], small_model()
    path = costs_.file_of(model)
    assert path == costs_.file_of(small_model(1)) != costs_.file_of(small_model(num_experts=8))
    known = KnownCosts(model)
    found = []
    thread = threading.Thread(target=lambda: found.append(known()))  # it may not use the model
    thread.start()
    thread.join()
    assert found == [reckoned(model.config.text)] and not told and not path.exists()
    assert known() == known() == MAC and len(told) == 1
    assert KnownCosts(small_model(1))() == MAC and len(told) == 1
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    held = json.loads(path.read_text())
    for broken in ("", "[]", "{}", json.dumps({**held, "token": 0}), json.dumps({**held, "step": {}})):
        path.write_text(broken)
        assert costs_.read(path) is None
    monkeypatch.setenv("MLX_DGEMMA_MEASURE", "0")
    assert KnownCosts(model)() == reckoned(model.config.text)
    monkeypatch.setattr(costs_, "cache_folder", lambda: path / "below a file")
    costs_.write(costs_.file_of(model), MAC)  # where nothing can be written, nothing happens


def test_measured_costs_are_positive_and_leave_nothing_behind():
    model = small_model(3, scale=0.2)
    costs = costs_.measure(model)
    values = [costs.token, *costs.verify.values(), *costs.draft.values(), *costs.step.values()]
    assert costs.measured and min(values) > 0
    assert set(costs.verify) == {5, 17, 65} and set(costs.draft) == set(costs.step) == {4}


def test_auto_is_told_and_the_user_wins(demo, monkeypatch):
    engine = engine_of(demo)
    for costs, mode in ((MAC, "causal"), (GPU, "diffusion")):
        monkeypatch.setattr(engine.builder, "costs", lambda costs=costs: costs)
        found = engine.generate(SPELL, mode="auto", seed=0)
        assert (found.text, found.stats.mode) == ("f r o g", mode)
        assert "tokens of free text" in found.stats.mode_reason
        assert engine.prepare(SPELL, mode="auto", patience=3).options.mode == "diffusion"
        assert engine.prepare(SPELL, mode="auto", fast=True).options.mode == "diffusion"
        assert engine.prepare(SPELL, mode="auto", temperature=0).options.causal
        assert engine.prepare(SPELL, mode="auto", regex="[a-z]", max_tokens=9).mode_reason.startswith("for about 2 ")
        assert engine.prepare(SPELL, seed=0).mode_reason == ""
    monkeypatch.setattr(engine.builder, "costs", lambda: MAC)
    assert engine.infill("Once ", " end.", mode="auto", seed=0, length=2).stats.mode == "diffusion"
    assert engine.edit("The cat saw a cat.", "Replace cat with dog", mode="auto", seed=0).stats.mode == "causal"
    both = {"mode": "auto", "temperature": 0.5}
    message = refusal(OptionError, GenerationOptions, fast=True, **both)
    assert message == "fast is True, and temperature is of token by token: leave one out."
    assert "the mode is diffusion" in refusal(OptionError, GenerationOptions().override, **both, t_min=0.3)
