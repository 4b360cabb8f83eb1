"""Building the model of a checkpoint, in every layout; a tensor that does not fit is refused in one sentence."""

import json
import shutil
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support import gap, random_tokens, refusal, small_config, small_model, write_checkpoint

import mlx_dgemma
from mlx_dgemma.checkpoint import build as build_module
from mlx_dgemma.checkpoint import memory, weights
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.model import device
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

message = partial(refusal, CheckpointError)


@pytest.fixture
def tensors():
    return dict(tree_flatten(small_model().parameters()))


def opened(path):
    return build(Checkpoint.open(path), "float32")


def same(model, tensors):
    got = dict(tree_flatten(model.parameters()))
    assert got.keys() == tensors.keys()
    return all((got[name] == tensors[name]).all().item() for name in got)


# Layouts.


@pytest.mark.parametrize("shards", [1, 3])
def test_our_layout_loads(tmp_path, tensors, shards):
    assert same(opened(write_checkpoint(tmp_path / "a", tensors, shards=shards)), tensors)


def test_the_releases_layout_loads(tmp_path, tensors):
    """Experts are bare tensors; copies of tied and shared weights and RoPE tables are ignored."""
    release = {name.replace("experts.gate_up_proj.weight", "experts.gate_up_proj"): a for name, a in tensors.items()}
    release = {name.replace("experts.down_proj.weight", "experts.down_proj"): a for name, a in release.items()}
    assert release.keys() != tensors.keys()
    release["lm_head.weight"] = release["model.decoder.embed_tokens.weight"]
    release["model.decoder.rotary_emb.inv_freq"] = mx.zeros((3,))
    for name in ("norm.weight", "layers.0.self_attn.q_proj.weight", "layers.1.experts.down_proj"):
        release[f"model.encoder.language_model.{name}"] = release[f"model.decoder.{name}"]
    assert same(opened(write_checkpoint(tmp_path / "a", release, shards=2)), tensors)


def test_gate_and_up_may_be_stored_apart(tmp_path, tensors):
    apart = dict(tensors)
    for i in range(3):
        fused = apart.pop(f"model.decoder.layers.{i}.experts.gate_up_proj.weight")
        gate, up = mx.split(fused, 2, axis=1)
        apart[f"model.decoder.layers.{i}.experts.up_proj.weight"] = up
        apart[f"model.decoder.layers.{i}.experts.gate_proj.weight"] = gate
    assert same(opened(write_checkpoint(tmp_path / "a", apart)), tensors)


def test_the_release_and_the_demo_hold_the_same_weights(hf_checkpoint, demo):
    release, ours = (dict(tree_flatten(opened(path).parameters())) for path in (hf_checkpoint, demo))
    assert release.keys() == ours.keys()
    assert all((release[name] == ours[name]).all().item() for name in ours)
    assert Checkpoint.open(demo).config == Checkpoint.open(hf_checkpoint).config
    assert Checkpoint.open(demo).generation == Checkpoint.open(hf_checkpoint).generation


@pytest.mark.parametrize(("dtype", "expected"), [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_dtype_is_kept_or_changed(tmp_path, tensors, dtype, expected):
    stored = {name: a.astype(mx.bfloat16) for name, a in tensors.items()}
    model = build(Checkpoint.open(write_checkpoint(tmp_path / "a", stored)), dtype)
    assert model.dtype == getattr(mx, expected)
    experts = model.model.decoder.layers[0].experts.gate_up_proj.weight
    assert experts.dtype == (mx.float32 if build_module.on_cpu() else model.dtype)
    hidden = model.encode(mx.array([[1, 2, 3]]), model.new_prefix())
    assert hidden.dtype == model.dtype


def test_an_unknown_dtype(tmp_path, tensors):
    with pytest.raises(OptionError) as caught:
        build(Checkpoint.open(write_checkpoint(tmp_path / "a", tensors)), "int8")
    assert str(caught.value) == "dtype is 'int8'; it should be one of float32, bfloat16, float16."


def test_clipping_bounds_count_only_where_the_tower_clips(demo):
    name = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.input_min"
    plain = Checkpoint.open(demo).config
    clipped = replace(plain, vision=replace(plain.vision, use_clipped_linears=True))
    assert weights.match(name, plain) is None
    assert weights.match(name, clipped) == (name, None)
    assert name in dict(tree_flatten(DiffusionGemma(clipped).parameters()))


# Quantized weights.

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}


def pack(tensors, name, bits, mode="affine", group=32):
    packed = mx.quantize(tensors.pop(name), group, bits, mode=mode)
    tensors.update(dict(zip((name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases")), packed)))


@pytest.fixture
def quantized(tmp_path):
    """A checkpoint with experts at 4 bit, and one dense matrix and the embedding at 8 bit by an override."""
    tensors = dict(tree_flatten(small_model(**WIDE).parameters()))
    dense = "model.decoder.layers.0.mlp.up_proj"
    wide, narrow = [f"{dense}.weight", "model.decoder.embed_tokens.weight"], [n for n in tensors if ".experts." in n]
    for name in wide + narrow:
        pack(tensors, name, 8 if name in wide else 4)
    config = small_config(**WIDE)
    override = {"group_size": 32, "bits": 8, "mode": "affine"}
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine", dense: override}
    config["quantization"]["model.decoder.embed_tokens"] = override
    return write_checkpoint(tmp_path / "q", tensors, config)


def test_a_quantized_model_computes_like_the_dequantized_one(quantized):
    checkpoint = Checkpoint.open(quantized)
    assert 4 < checkpoint.bits_per_weight < 32
    packed, plain = build(checkpoint), build(checkpoint, "float32", dequantize=True)
    layer = packed.model.decoder.layers[0]
    assert (layer.mlp.up_proj.bits, layer.experts.down_proj.bits, packed.model.decoder.embed_tokens.bits) == (8, 4, 8)
    assert not hasattr(layer.mlp.down_proj, "bits")
    names = {name for name, _ in tree_flatten(plain.parameters())}
    assert names == set(checkpoint.shapes)
    tokens, canvas = random_tokens(0, 1, 7), random_tokens(1, 1, 4)
    out = []
    for model in (packed, plain):
        prefix = model.new_prefix()
        model.encode(tokens, prefix)
        logits = model.logits(model.denoise(canvas, prefix))
        again = model.denoise(canvas, prefix, model.condition(logits / 0.8))
        out.append(mx.concatenate([logits, model.logits(again)]))
    assert gap(*out) < 1e-2


def test_a_quantized_checkpoint_is_dequantized_on_the_cpu_unless_told_otherwise(quantized, demo, monkeypatch):
    if not build_module.on_cpu():
        pytest.skip("says what the CPU backend does")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, quantized)
    engine = mlx_dgemma.load(quantized)
    bits = f"{engine.checkpoint.bits_per_weight:.1f}"
    assert not hasattr(engine.model.model.decoder.embed_tokens, "bits")
    assert f"CPU device: weights of {bits} bits are dequantized to float32, the fastest there." in engine.notes
    packed = mlx_dgemma.load(quantized, dequantize=False)
    assert packed.model.model.decoder.embed_tokens.bits == 8
    assert f"CPU device: weights of {bits} bits are kept packed, which is slow there." in packed.notes
    fits = memory.need(engine.checkpoint, 64, None, False).total
    monkeypatch.setattr(device, "available", lambda: fits)  # too little for the dequantized weights
    assert mlx_dgemma.load(quantized, ignore_memory=True).model.model.decoder.embed_tokens.bits == 8


def test_scales_without_a_quantization_entry(tmp_path):
    tensors = dict(tree_flatten(small_model(**WIDE).parameters()))
    pack(tensors, "model.decoder.embed_tokens.weight", 8)
    path = write_checkpoint(tmp_path / "a", tensors, small_config(**WIDE))
    assert message(opened, path) == (
        "The checkpoint holds model.decoder.embed_tokens.scales, but config.json has no quantization entry."
    )


def test_a_quantization_that_mlx_cannot_compute(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization"]["model.decoder.embed_tokens"]["mode"] = "ternary"
    (quantized / "config.json").write_text(json.dumps(config))
    text = message(opened, quantized)
    assert text.startswith("config.json has a quantization that MLX cannot compute (")
    assert text.endswith(").")


# Tensors that do not fit.


def test_a_missing_tensor_is_named(tmp_path, tensors):
    del tensors["model.decoder.norm.weight"]
    path = write_checkpoint(tmp_path / "a", tensors)
    assert message(opened, path) == "The checkpoint lacks model.decoder.norm.weight; download it again."
    del tensors["model.decoder.layers.0.layer_scalar"]
    path = write_checkpoint(tmp_path / "b", tensors)
    assert (
        message(opened, path)
        == "The checkpoint lacks model.decoder.layers.0.layer_scalar and 1 more; download it again."
    )


def test_an_encoder_scalar_is_not_filled_with_the_decoders(tmp_path, tensors):
    del tensors["model.encoder.language_model.layers.1.layer_scalar"]
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        "The checkpoint lacks model.encoder.language_model.layers.1.layer_scalar; download it again."
    )


def test_an_unknown_tensor_is_named(tmp_path, tensors):
    tensors["model.visual.weight"] = mx.zeros((1,))
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        "The checkpoint holds the unknown tensor model.visual.weight; this is not a DiffusionGemma release."
    )


def test_a_tensor_without_a_place_is_named(tmp_path, tensors):
    tensors["model.decoder.layers.3.layer_scalar"] = mx.zeros((1,))
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        "The checkpoint holds model.decoder.layers.3.layer_scalar, which config.json has no place for."
    )


def test_a_parameter_filled_twice(tmp_path, tensors):
    name = "model.decoder.layers.0.experts.down_proj"
    tensors[name] = tensors[f"{name}.weight"]
    text = message(opened, write_checkpoint(tmp_path / "a", tensors))
    assert text.startswith(f"The checkpoint fills {name}.weight with ")
    assert text.endswith(": not one way.")


def test_half_of_gate_and_up(tmp_path, tensors):
    fused = tensors.pop("model.decoder.layers.0.experts.gate_up_proj.weight")
    tensors["model.decoder.layers.0.experts.gate_proj.weight"] = mx.split(fused, 2, axis=1)[0]
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        "The checkpoint fills model.decoder.layers.0.experts.gate_up_proj.weight with "
        "model.decoder.layers.0.experts.gate_proj.weight: not one way."
    )


def test_a_tensor_of_a_wrong_shape(tmp_path, tensors):
    tensors["model.decoder.norm.weight"] = mx.zeros((17,))
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        "model.decoder.norm.weight has the shape [17], but config.json asks for [16]."
    )


@pytest.mark.parametrize("name", ["model.decoder.norm.weight", "model.decoder.layers.0.layer_scalar"])
def test_a_tensor_of_a_wrong_dtype(tmp_path, tensors, name):
    tensors[name] = tensors[name].astype(mx.int32)
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        f"{name} has the dtype I32; it should be one of F32, BF16, F16."
    )


def test_packed_weights_in_a_plain_checkpoint(tmp_path, tensors):
    tensors["model.decoder.norm.weight"] = tensors["model.decoder.norm.weight"].astype(mx.uint32)
    assert message(opened, write_checkpoint(tmp_path / "a", tensors)) == (
        "model.decoder.norm.weight has the dtype U32; it should be one of F32, BF16, F16."
    )
