"""Estimates of memory against the bytes that are allocated, and the refusal of what does not fit."""

import json
import re

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support import engine_of, random_tokens, small_config, small_model

import mlx_dgemma
from mlx_dgemma.adapters.loading import load_model
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.memory import Need
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.errors import MemoryLimitError
from mlx_dgemma.model import device
from mlx_dgemma.model.attention import SCORE_BYTES
from mlx_dgemma.model.config import GenerationConfig, ModelConfig, ProcessorConfig
from mlx_dgemma.model.kv_cache import BUFFER_STEP

RELEASE = {
    "model_type": "diffusion_gemma",
    "text_config": {"num_global_key_value_heads": 2, "sliding_window": 1024, "top_k_experts": 8},
}


@pytest.fixture(scope="module")
def held(demo):
    return Checkpoint.open(demo)


@pytest.mark.parametrize("context", [1, 5, BUFFER_STEP - 4, BUFFER_STEP - 3, 2 * BUFFER_STEP + 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_prefix_takes_the_estimated_bytes(context, batch):
    """The bytes of a prefix with a canvas equal the estimate, whether its buffers grew or were allocated at once."""
    model = small_model()
    estimate = memory.prefix_bytes(model.config, context, 4, batch)
    tokens = random_tokens(0, batch, context)
    for capacity in (0, context + model.config.canvas_length):
        prefix = model.new_prefix(batch, capacity)
        model.encode(tokens[:, : context // 2 + 1], prefix)
        if context > 1:
            model.encode(tokens[:, context // 2 + 1 :], prefix)
        mx.eval(model.denoise(random_tokens(1, batch, 4), prefix))
        assert prefix.nbytes == estimate


def test_the_demos_prefix_takes_the_estimated_bytes(demo):
    engine = engine_of(demo)
    prefix = engine.model.new_prefix()
    engine.model.encode(random_tokens(0, 1, 200, vocab=2048), prefix)
    mx.eval(engine.model.denoise(random_tokens(1, 1, 64, vocab=2048), prefix))
    assert prefix.nbytes == memory.prefix_bytes(engine.config, 200, 4)


def test_the_release_takes_20480_bytes_a_token_in_its_full_layers():
    release = ModelConfig.from_dict(RELEASE)
    near, far = (
        memory.prefix_bytes(release, slots - release.canvas_length, 2) for slots in (5 * BUFFER_STEP, 800 * BUFFER_STEP)
    )
    assert far - near == 20_480 * 795 * BUFFER_STEP
    assert (
        near - 20_480 * 5 * BUFFER_STEP == 25 * 2 * 8 * 256 * 2 * 5 * BUFFER_STEP
    )  # 1,023 positions and a canvas, rounded up


def test_weights_take_their_stored_bytes_or_those_of_the_new_dtype(held):
    assert memory.need(held, 64).weights == held.nbytes
    assert memory.need(held, 64, "bfloat16").weights == 2 * held.parameters
    assert memory.need(held, 64, "float32").weights == 4 * held.parameters
    assert memory.need(held, 64, None, dequantize=True).weights == 2 * held.parameters


def test_the_workspace_is_the_larger_of_a_step_and_a_chunk(held):
    step = 8 * 4 * 64 * 2048
    assert memory.need(held, 64, "float32").workspace == step
    assert memory.need(held, 4096, "float32").workspace == 8 * 4 * 6 * 1024 * 4096
    assert memory.need(held, 262_144, "float32").workspace == 8 * SCORE_BYTES


def test_a_need_adds_up(held):
    one, small = (memory.need(held, 512, "float32", kv_bits=bits) for bits in (None, 4))
    assert (small.weights, small.workspace) == (one.weights, one.workspace)
    assert small.prefix == memory.prefix_bytes(held.config, 512, 4, kv_bits=4) < one.prefix
    assert one.prefix == memory.prefix_bytes(held.config, 512, 4)
    assert one.total == one.weights + one.prefix + one.workspace


def sizes_of(checkpoint):
    return {name: recipe.nbytes(checkpoint.shapes) for name, recipe in RECIPES.items()}


def refusal(monkeypatch, held, need, have):
    monkeypatch.setattr(device, "available", lambda: have)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(MemoryLimitError) as caught:
        memory.check(held, need, lambda: sizes_of(held))
    return str(caught.value)


def test_what_fits_is_not_refused(monkeypatch, held):
    monkeypatch.setattr(device, "available", lambda: 60)
    memory.check(held, Need(10, 20, 30), lambda: sizes_of(held))
    monkeypatch.setattr(device, "available", lambda: 59)
    with pytest.raises(MemoryLimitError):
        memory.check(held, Need(10, 20, 30), lambda: sizes_of(held))


def test_the_refusal_names_the_largest_recipe_that_fits(monkeypatch, tmp_path):
    """At the size of the release: 51.6 GB do not fit into 32 GB."""
    config = ModelConfig.from_dict(RELEASE)
    release = Checkpoint(tmp_path, config, GenerationConfig(), ProcessorConfig(), RELEASE, {})
    text = refusal(monkeypatch, release, Need(51_600_000_000, 300_000_000, 2_100_000_000), 32_000_000_000)
    sizes = sizes_of(release)
    best = max((name for name in sizes if sizes[name] + 2_400_000_000 <= 32_000_000_000), key=sizes.__getitem__)
    assert text == (
        f"{tmp_path.name} needs 54.0 GB (weights 51.6, prefix 0.3, workspace 2.1) and this machine gives 32.0 GB: "
        f"22.0 GB are missing; the recipe {best} would fit ({sizes[best] / 1e9:.1f} GB of weights); "
        "--ignore-memory (ignore_memory=True) tries anyway."
    )


def test_the_refusal_says_when_no_recipe_fits(monkeypatch, held):
    sizes = sizes_of(held)
    small = min(sizes, key=sizes.__getitem__)
    text = refusal(monkeypatch, held, Need(2_000_000_000, 0, 0), 1_000_000)
    assert text == (
        "demo needs 2.0 GB (weights 2.0, prefix 0.0, workspace 0.0) and this machine gives 0.0 GB: "
        f"2.0 GB are missing; no recipe fits (the smallest, {small}, has {sizes[small] / 1e9:.1f} GB of weights); "
        "--ignore-memory (ignore_memory=True) tries anyway."
    )


def test_on_metal_the_refusal_mentions_the_wired_limit(monkeypatch, held):
    monkeypatch.setattr(device, "available", lambda: 1)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with pytest.raises(
        MemoryLimitError, match=re.escape("`sudo sysctl iogpu.wired_limit_mb=N` raises what macOS gives;")
    ):
        memory.check(held, Need(2, 0, 0), lambda: sizes_of(held))


def test_load_refuses_what_does_not_fit_unless_told_to_try(monkeypatch, demo):
    monkeypatch.setattr(device, "available", lambda: 1000)
    with pytest.raises(MemoryLimitError, match=r"^demo needs \d+\.\d GB "):
        mlx_dgemma.load(demo)
    assert mlx_dgemma.load(demo, ignore_memory=True).model.dtype in (mx.float32, mx.bfloat16)


def test_load_asks_for_no_more_context_than_the_model_has(monkeypatch, demo, held):
    dtype = "float32" if mx.default_device() == mx.cpu else None
    monkeypatch.setattr(device, "available", lambda: memory.need(held, 4096, dtype).total)
    mlx_dgemma.load(demo)
    monkeypatch.setattr(device, "available", lambda: memory.need(held, 4096, dtype).total - 1)
    with pytest.raises(MemoryLimitError):
        mlx_dgemma.load(demo)


def test_small_checkpoints_ask_for_their_own_context(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(small_model().parameters())))
    asked = []
    need = memory.need
    monkeypatch.setattr(
        memory, "need", lambda held, context, *rest: asked.append(context) or need(held, context, *rest)
    )
    load_model(Checkpoint.open(tmp_path))
    assert asked == [64]
