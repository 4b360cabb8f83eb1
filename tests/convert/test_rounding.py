"""Rounding on the states of the source: replayed layers, experts with few rows, a whole conversion."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import changed, left_in
from click.testing import CliRunner
from safetensors_files import read_folder, read_safetensors
from support import refusal, small_model

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import Quantization, convert
from mlx_dgemma.convert import cli as cli_module
from mlx_dgemma.convert.rounding import groups, layers
from mlx_dgemma.convert.rounding import run as run_module
from mlx_dgemma.convert.rounding.replay import Replay
from mlx_dgemma.convert.search import replay, trajectories
from mlx_dgemma.errors import CheckpointError, MemoryLimitError, OptionError

ASKED = ("Spell the word frog.", "What is 3 + 4?")


def some_states(model, lengths=(3, 9), states=2) -> list[trajectories.Trajectory]:
    """Random prompts and canvases; only later steps are conditioned."""
    source, text, size = np.random.default_rng(0), model.config.text, model.config.canvas_length
    found = []
    for length in lengths:
        conditioning = source.normal(size=(states, size, text.hidden_size)).astype(np.float16)
        conditioning[0] = 0
        tokens = source.integers(0, text.vocab_size, (states, size)).astype(np.int32)
        prefix = source.integers(0, text.vocab_size, length).astype(np.int32)
        warm = np.full(states, 0.7, np.float32)
        found.append(
            trajectories.Trajectory(prefix, tokens, conditioning, np.arange(states), warm, np.ones(size, bool))
        )
    return found


def test_states_pass_layers_as_the_model_runs_them():
    model = small_model()
    seen, decoder = some_states(model), model.model.decoder
    scale = model.head.embed_scale
    found = Replay(model.config.text, seen, lambda tokens: decoder.embed_tokens(tokens) * scale)
    found.condition(decoder.self_conditioning)
    work = layers.LayerRounding(lambda path: None, mx.float32)
    for i, (layer, own) in enumerate(zip(decoder.layers, model.model.encoder.language_model.layers)):
        layers.round_layer(found, layer, i, (own.layer_scalar, layer.layer_scalar), work)
    outputs = replay.outputs(model, lambda i: decoder.layers[i], seen)
    wanted = [part.reshape(-1, part.shape[-1]) for pair in outputs for part in pair]
    assert mx.allclose(found.h, mx.concatenate(wanted), atol=1e-4)
    assert not work.rounded


def test_experts_with_few_rows_lean_on_all_positions_and_are_told():
    """One expert has rows enough, one has two, one has none; none is left as the nearest codes have it."""
    model = small_model(hidden_size=32, moe_intermediate_size=32, num_experts=3, top_k_experts=1)
    experts, random = model.model.decoder.layers[0].experts, np.random.default_rng(1)
    before, how = mx.array(experts.gate_up_proj.weight), Quantization(3, 32)
    x = mx.array((random.normal(size=(200, 32)) @ random.normal(size=(32, 32))).astype(np.float32))
    chosen = mx.array([[1]] * 2 + [[0]] * 198)
    work = layers.LayerRounding(lambda path: how, mx.float32)
    layers.round_experts("e", experts, (x, chosen, mx.full((200, 1), 0.5)), work)
    assert [(one.path, one.few) for one in work.modules] == [("e.gate_up_proj", 2), ("e.down_proj", 2)]
    near, rounded = layers.nearest(before, how, mx.float32), layers.values(work.rounded["e.gate_up_proj"], how)
    assert mx.array_equal(experts.gate_up_proj.weight, rounded)
    for expert in range(3):
        far = [float((((one - before)[expert] @ x.T) ** 2).sum()) for one in (near, rounded)]
        assert far[1] < 0.8 * far[0]


@pytest.fixture(scope="module")
def small(demo, tmp_path_factory):
    """The demo's first and last layer, with three denoising steps."""
    stored, tensors = read_safetensors(demo / "model.safetensors"), {}
    for name in stored:
        if found := re.match(r"(.+\.(?:decoder|language_model)\.layers)\.(\d+)\.(.+)", name):
            place = {"0": "0", "5": "1"}.get(found[2])
            tensors.setdefault(name, None)
            if place:
                tensors[f"{found[1]}.{place}.{found[3]}"] = stored[name]
    folder = changed(demo, tmp_path_factory.mktemp("small") / "small", **tensors)
    config, generation = (json.loads((folder / one).read_text()) for one in ("config.json", "generation_config.json"))
    kinds = ["sliding_attention", "full_attention"]
    config["text_config"] |= {"num_hidden_layers": len(kinds), "layer_types": kinds}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({**generation, "max_denoising_steps": 3}))
    return folder


@pytest.fixture(scope="module")
def rounded(small, tmp_path_factory):
    """At 3 bits: its folder, its report, and what was told meanwhile."""
    folder = tmp_path_factory.mktemp("rounded")
    (folder / "prompts.txt").write_text("\n".join(ASKED))
    stages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "STATES", 2)
        patch.setattr(layers, "DAMPINGS", (0.01, 1.0))
        patch.setattr(groups, "SHRINKS", (1.0, 0.8))
        report = convert(
            small,
            folder / "out",
            "3bit",
            rounding="gptq",
            prompts=folder / "prompts.txt",
            stage=lambda *told: stages.append(told),
        )
    assert left_in(folder) == ["out", "prompts.txt"]
    return folder / "out", report, stages


def test_a_conversion_tells_what_was_done(rounded):
    folder, report, stages = rounded
    done = report.rounding
    assert (done.method, done.prompts) == ("gptq", 2)
    plain = {path for path, how in Checkpoint.open(folder).quantization.items() if isinstance(how, dict)}
    assert {one.path for one in done.modules} >= plain
    assert not done.others
    experts = [one for one in done.modules if ".experts." in one.path]
    assert len(experts) == 4 and all(one.error < one.nearest for one in experts)
    assert "rounding" not in left_in(folder)
    names = [what.partition(" (")[0] for what, _, _ in stages]
    assert list(dict.fromkeys(names)) == ["Recording states", "Rounding layers"]
    card = (folder / "README.md").read_text()
    assert "--rounding gptq" in card and experts[0].path in card


def test_only_codes_scales_and_biases_differ_from_the_plain_recipe(rounded, small, tmp_path):
    folder, _, _ = rounded
    convert(small, tmp_path / "plain", "3bit")
    ours, plain = read_folder(folder), read_folder(tmp_path / "plain")
    assert {name: one[:2] for name, one in ours.items()} == {name: one[:2] for name, one in plain.items()}
    same = {name for name in ours if ours[name] == plain[name]}
    assert {name for name in ours if "scales" not in name and "biases" not in name and ".weight" not in name} <= same
    assert "model.decoder.embed_tokens.weight" not in same
    assert "model.decoder.layers.0.experts.down_proj.weight" not in same
    configs = [json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "plain")]
    assert configs[0] == configs[1]
    build(Checkpoint.open(folder), "float32")


def test_what_cannot_be_rounded_is_refused(demo, tmp_path, monkeypatch):
    said = refusal(OptionError, convert, demo, tmp_path / "a", rounding="gptq")
    assert said == "rounding is gptq, which needs affine quantization; give a recipe such as 4bit."
    said = refusal(OptionError, convert, demo, tmp_path / "a", "4bit", rounding="best")
    assert said == "rounding is 'best'; take one of nearest, gptq."
    convert(demo, tmp_path / "quantized", "8bit")
    said = refusal(CheckpointError, convert, tmp_path / "quantized", tmp_path / "a", "8bit", rounding="gptq")
    assert said == f"{tmp_path / 'quantized'} is quantized already; round the original weights."
    monkeypatch.setattr(run_module.device, "available", lambda: 10**6)
    said = refusal(MemoryLimitError, convert, demo, tmp_path / "a", "4bit", rounding="gptq")
    assert "and this machine gives 1.0 MB; give fewer prompts." in said
    done = CliRunner().invoke(cli_module.convert, [str(demo), "-q", "--prompts", "x"])
    assert "--prompts needs --target-size, --target-bits or --rounding." in done.output
    assert left_in(tmp_path) == ["quantized"]
