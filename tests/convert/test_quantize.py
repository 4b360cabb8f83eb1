"""Quantization: recipes, and sources that are quantized already."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import changed, contents, floats, left_in, same
from mlx.utils import tree_flatten, tree_unflatten
from safetensors_files import read_folder, read_safetensors, write_safetensors
from support import gap

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import read_header
from mlx_dgemma.convert import DEFAULT, RECIPES, Quantization, Recipe, convert
from mlx_dgemma.convert import conversion as module
from mlx_dgemma.convert import jobs as jobs_module
from mlx_dgemma.errors import CheckpointError, OptionError

COMBINATIONS = [(bits, size, "affine") for bits, size in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))]
COMBINATIONS += [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]


@pytest.fixture(scope="session")
def quantized(demo, tmp_path_factory) -> Path:
    """The demo, quantized with the default recipe."""
    folder = tmp_path_factory.mktemp("quantized") / "demo-4bit"
    convert(demo, folder, DEFAULT)
    return folder


# --- quantization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group_size, mode", COMBINATIONS)
@pytest.mark.parametrize("halves", [False, True])
def test_quantizing_slices_equals_quantizing_the_tensor(tmp_path, monkeypatch, bits, group_size, mode, halves):
    """With and without separate gate and up; slices end in the middle of an expert."""
    monkeypatch.setattr(jobs_module, "SLICE_BYTES", 3000)
    whole = mx.random.normal((3, 10, 256), key=mx.random.key(bits)).astype(mx.bfloat16)
    parts = mx.split(whole, 2, axis=1) if halves else [whole]
    names = [f"part{i}" for i in range(len(parts))]
    raw = {n: ("BF16", p.shape, np.array(p.view(mx.uint16)).tobytes()) for n, p in zip(names, parts)}
    write_safetensors(tmp_path / "source.safetensors", raw)
    header = read_header(tmp_path / "source.safetensors")
    quantization = Quantization(bits, group_size, mode)
    sources = tuple(header[name] for name in names)
    job = jobs_module.Job("m.weight", whole.shape, tuple(names), sources, "BF16", quantization)
    (tmp_path / "out").mkdir()
    module._write([job], tmp_path / "out", False, None)
    assert len(list(job.slices())) == 6
    written = read_folder(tmp_path / "out")
    wanted = mx.quantize(whole, group_size=group_size, bits=bits, mode=mode)
    kinds = ["weight", "scales", "biases"][: len(wanted)]
    assert set(written) == {f"m.{kind}" for kind in kinds}
    assert all(same(floats(written[f"m.{kind}"]), array) for kind, array in zip(kinds, wanted))


def test_the_default_recipe(demo, quantized):
    before, after = read_folder(demo), read_folder(quantized)
    recipe = RECIPES[DEFAULT]
    for name, one in before.items():
        path = name.removesuffix(".weight")
        how = recipe.quantization(path, one[1][-1])
        if how is None:
            assert after.pop(name) == one
            continue
        kinds = ("weight", "scales", "biases")
        for kind, array in zip(kinds, mx.quantize(floats(one), **how)):
            assert same(floats(after.pop(f"{path}.{kind}")), array), path
        assert how == {"group_size": 64, "bits": 4 if ".experts." in path else 8, "mode": "affine"}
    assert not after
    stay = {name for name in before if recipe.quantization(name.removesuffix(".weight"), before[name][1][-1]) is None}
    assert {name for name in before if "vision" in name or "norm" in name or "scalar" in name} <= stay
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    base = {key: config["quantization"][key] for key in ("group_size", "bits", "mode")}
    assert base == {"group_size": 64, "bits": 4, "mode": "affine"}
    overrides = {path: how for path, how in config["quantization"].items() if path not in base}
    assert overrides["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert not any(".experts." in path for path in overrides)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("mac-")])
def test_every_recipe_loads_and_stays_close(demo, tmp_path, name):
    report = convert(demo, tmp_path / "out", name, verify=True)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.nbytes == report.nbytes == RECIPES[name].nbytes(Checkpoint.open(demo).shapes)
    assert report.bits_per_weight == pytest.approx(checkpoint.bits_per_weight)
    assert list(report.quantized) == ["experts", "attention", "mlp", "router", "embedding", "self_conditioning"]
    assert report.quantized["experts"] == str(RECIPES[name].experts)
    assert not report.unquantized
    assert not report.nonfinite
    found = report.verification
    assert not found.equal
    assert found.positions == 64
    bits = RECIPES[name].experts.bits
    assert found.mean_kl > 0
    assert found.mean_kl < {3: 0.15, 4: 0.05}.get(bits, 0.01)  # 3 bits are compared exactly in the next test
    assert found.argmax_agreement > 0.8
    model = build(checkpoint, "float32")
    tokens = mx.array([[2, 5, 7]])
    assert mx.isfinite(model.logits(model.encode(tokens, model.new_prefix()))).all().item()


def test_three_bits_compute_what_weights_rounded_by_mlx_compute(demo, tmp_path):
    """The distance of so few bits says more about the demo than about the converter, so the logits are compared."""
    convert(demo, tmp_path / "out", "3bit")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    base = {key: settings[key] for key in ("group_size", "bits", "mode")}
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    model, weights = build(Checkpoint.open(demo), "float32"), []
    for name, weight in tree_flatten(model.parameters()):
        path = name.removesuffix(".weight")
        if f"{path}.scales" in packed:
            how = {**base, **(settings.get(path) or {})}
            words, scales, biases = mx.quantize(weight.astype(mx.bfloat16), **how)
            rounded = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), **how)
            weights.append((name, rounded))
    assert len(weights) == 63
    model.update(tree_unflatten(weights))
    tokens = mx.array([[2, 5, 7, 9, 300]])
    models = model, build(Checkpoint.open(tmp_path / "out"), "float32")
    expected, found = (one.logits(one.encode(tokens, one.new_prefix())) for one in models)
    assert gap(expected, found) < 1e-5


def test_group_sizes_that_do_not_divide_are_replaced(demo, tmp_path):
    report = convert(demo, tmp_path / "out", Recipe("wide", Quantization(4, 128), router=None))
    layers = [f"model.decoder.layers.{i}.experts.gate_up_proj" for i in range(6)]
    assert report.regrouped == dict.fromkeys(layers, "4-bit affine, groups of 64")  # its input is 192 wide
    assert report.quantized["experts"] == "4-bit affine, groups of 128; 4-bit affine, groups of 64"
    assert "router" not in report.quantized
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    build(Checkpoint.open(tmp_path / "out"))
    assert config["model.decoder.layers.0.experts.gate_up_proj"]["group_size"] in (64, 128)
    assert Quantization(4, 64).fit(96) == Quantization(4, 32)
    assert Quantization(4, 64).fit(100) is None
    assert Quantization(4, 16, "nvfp4").fit(24) is None


def test_sizes_are_computed_without_weights():
    shapes = {
        "model.decoder.layers.0.experts.down_proj.weight": (4, 10, 704),
        "model.decoder.embed_tokens.weight": (100, 64),
        "model.decoder.norm.weight": (64,),
    }
    packed = 4 * 10 * (704 // 2 + 704 // 64 * 4)
    assert RECIPES["4bit"].nbytes(shapes) == packed + 100 * (64 + 4) + 128
    assert RECIPES["4bit"].nbytes(shapes, 4) == packed + 4 * 10 * 11 * 4 + 100 * (64 + 8) + 256
    assert RECIPES["mxfp4"].nbytes(shapes) == 4 * 10 * (352 + 22) + 100 * 68 + 128


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((7,), "q-bits is 7; with affine it should be 2, 3, 4, 5, 6 or 8."),
        ((4, 16), "q-group-size is 16; with affine it should be 32, 64 or 128."),
        ((4, 64, "mxfp4"), "q-group-size is 64; with mxfp4 it should be 32."),
        ((8, 32, "mxfp4"), "q-bits is 8; with mxfp4 it should be 4."),
        ((4, 32, "nf4"), "q-mode is 'nf4'; it should be one of affine, mxfp4, mxfp8, nvfp4."),
    ],
)
def test_quantizations_that_mlx_does_not_support_are_refused(arguments, message):
    with pytest.raises(OptionError) as error:
        Quantization(*arguments)
    assert str(error.value) == message


# --- sources in MLX's layout --------------------------------------------------------------------------------------


def test_converting_our_own_output_copies_every_byte(demo, tmp_path):
    report = convert(demo, tmp_path / "out", verify=True)
    assert report.unchanged
    assert report.verification.equal
    assert contents(tmp_path / "out") == contents(demo)


@pytest.mark.parametrize("recipe", [None, DEFAULT])
def test_a_quantized_source_is_copied(quantized, tmp_path, recipe):
    report = convert(quantized, tmp_path / "out", recipe, verify=True)
    assert report.unchanged
    assert report.bits_per_weight == pytest.approx(Checkpoint.open(quantized).bits_per_weight)
    assert report.quantized["experts"] == "4-bit affine, groups of 64"
    assert contents(tmp_path / "out") == contents(quantized)


def test_a_quantized_source_cannot_be_quantized_again(quantized, tmp_path):
    with pytest.raises(CheckpointError) as error:
        convert(quantized, tmp_path / "out", "8bit")
    assert str(error.value) == (
        f"{quantized} is already quantized at 7.04 bits per weight; start from the original weights to get 8bit."
    )
    assert left_in(tmp_path) == []


def test_a_quantized_source_can_be_cast(quantized, tmp_path):
    report = convert(quantized, tmp_path / "out", dtype="float32")
    before, after = read_folder(quantized), read_folder(tmp_path / "out")
    assert not report.unchanged
    for name, one in before.items():
        assert same(floats(after[name]), floats(one) if one[0] == "U32" else floats(one).astype(mx.float32))
    build(Checkpoint.open(tmp_path / "out"))


def apart(source: Path, folder: Path) -> Path:
    """The older form of mlx-vlm's layout: gate and up are separate tensors with separate overrides."""
    tensors = {}
    for name, (dtype, shape, data) in read_safetensors(source / "model.safetensors").items():
        if ".experts.gate_up_proj." not in name:
            continue
        experts, rows, width = shape
        halves = np.frombuffer(data, np.uint8).reshape(experts, 2, -1)
        tensors[name] = None
        for i, part in enumerate(("gate_proj", "up_proj")):
            one = (dtype, [experts, rows // 2, width], halves[:, i].tobytes())
            tensors[name.replace("gate_up_proj", part)] = one
    return changed(source, folder, **tensors)


@pytest.mark.parametrize("which", ["demo", "quantized"])
def test_separate_gate_and_up_are_fused(request, tmp_path, which):
    source = request.getfixturevalue(which)
    convert(apart(source, tmp_path / "older"), tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_overrides_of_gate_and_up_become_one(demo, tmp_path):
    convert(demo, tmp_path / "mixed", Recipe("mixed", Quantization(4), mlp=Quantization(4)))
    older = apart(tmp_path / "mixed", tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    how = {"group_size": 64, "bits": 4}
    for part in ("gate_proj", "up_proj"):
        for i in range(6):
            config["quantization"][f"model.decoder.layers.{i}.experts.{part}"] = how
    config["quantization"] |= {"bits": 8}
    for i in range(6):
        config["quantization"][f"model.decoder.layers.{i}.experts.down_proj"] = how
        for part in ("gate_proj", "up_proj", "down_proj"):
            config["quantization"][f"model.decoder.layers.{i}.mlp.{part}"] = how
    config["quantization_config"] = config["quantization"]
    (older / "config.json").write_text(json.dumps(config))
    report = convert(older, tmp_path / "out")
    assert report.quantized["experts"] == report.quantized["mlp"] == "4-bit affine, groups of 64"
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "mixed")
    build(Checkpoint.open(tmp_path / "out"))
    config["quantization"]["model.decoder.layers.3.experts.up_proj"] = {"group_size": 64, "bits": 3}
    (older / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantizes the two halves of model\.decoder\.layers\.3\.experts"):
        convert(older, tmp_path / "again")
