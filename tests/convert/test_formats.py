"""Checkpoints in other programs' formats convert, reload and compute what their dequantized form computes."""

import json
import shutil
from pathlib import Path

import foreign_files as files
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors_files import INDEX, read_safetensors
from support import gap, random_tokens, refusal, small_config, small_model, write_checkpoint

import mlx_dgemma
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.sources import parts
from mlx_dgemma.errors import CheckpointError

WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16, "vocab_size": 2048}
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}


def packed(form: str, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*router.*"],
        }
    }


BLOCKS = packed("float-quantized", strategy="block", block_structure=list(files.BLOCK))
FORMATS = {
    "ModelOpt NVFP4": (files.modelopt_nvfp4, MODELOPT, {}),
    "ModelOpt FP8": (files.modelopt_fp8, {}, {"prefix": "moe.experts"}),
    "int4 by groups": (files.packed_int(4, 32), packed("pack-quantized"), {}),
    "int4 with zero points": (files.packed_int(4, 32, zeros=True), packed("pack-quantized"), {}),
    "int4 in activation order": (files.packed_int(4, 16, ordered=True), packed("pack-quantized"), {}),
    "int3 by groups": (files.packed_int(3, 32), packed("pack-quantized"), {}),
    "int8 by rows": (files.channel_int8, packed("int-quantized"), {}),
    "FP8 by rows": (files.channel_fp8, packed("float-quantized"), {}),
    "FP8 by rows, experts together": (files.channel_fp8, packed("float-quantized"), {"fused": True}),
    "FP8 by blocks": (files.block_fp8, BLOCKS, {}),
    "NVFP4 packed": (files.packed_nvfp4, packed("nvfp4-pack-quantized"), {}),
    "MXFP4 packed": (files.packed_mxfp4, packed("mxfp4-pack-quantized"), {}),
    "all matrices": (files.channel_fp8, packed("float-quantized"), {"kept": ("router.proj.weight",)}),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in tree_flatten(small_model(**WIDE).parameters())}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> Path:
    """config.json and the tokenizer."""
    folder = tmp_path_factory.mktemp("metadata")
    (folder / "config.json").write_text(json.dumps(small_config(**WIDE)))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def logits(path: Path) -> mx.array:
    model = build(Checkpoint.open(path), "float32", dequantize=True)
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 7), prefix)
    first = model.logits(model.denoise(random_tokens(1, 1, 4), prefix))
    again = model.denoise(random_tokens(1, 1, 4), prefix, model.condition(first / 0.8))
    return mx.concatenate([first, model.logits(again)])


def written(folder: Path, meaning: dict[str, np.ndarray]) -> Path:
    """The dequantized form."""
    return write_checkpoint(folder, {name: mx.array(a) for name, a in meaning.items()}, small_config(**WIDE))


@pytest.mark.parametrize("case", FORMATS)
def test_a_format_computes_what_its_dequantized_form_computes(weights, metadata, tmp_path, monkeypatch, case):
    encode, config, how = FORMATS[case]
    meaning = files.write_foreign(tmp_path / "source", metadata, weights, encode, config, **how)
    monkeypatch.setattr(parts, "SLICE_VALUES", 53 * 64)  # slices that end within blocks and experts
    report = convert(tmp_path / "source", tmp_path / "out", dtype="float32")
    assert not report.quantized and report.dtype == "float32"
    found = dict(mx.load(str(tmp_path / "out" / "model.safetensors")))
    assert found.keys() == meaning.keys()
    for name, expected in meaning.items():
        np.testing.assert_allclose(np.array(found[name]), expected, rtol=1e-6, atol=1e-30, err_msg=name)
    assert gap(logits(tmp_path / "out"), logits(written(tmp_path / "plain", meaning))) < 1e-3


def test_mxfp4_comes_back_as_it_was(weights, metadata, tmp_path):
    encode, config, how = FORMATS["MXFP4 packed"]
    meaning = files.write_foreign(tmp_path / "source", metadata, weights, encode, config, **how)
    convert(tmp_path / "source", tmp_path / "out", "mxfp4")
    found = dict(mx.load(str(tmp_path / "out" / "model.safetensors")))
    paths = [one.removesuffix(".scales") for one, scales in found.items() if scales.dtype == mx.uint8]
    assert paths and all(".experts." in path for path in paths)
    for path in paths:
        again = mx.dequantize(found[f"{path}.weight"], found[f"{path}.scales"], group_size=32, bits=4, mode="mxfp4")
        np.testing.assert_array_equal(np.array(again.astype(mx.float32)), meaning[f"{path}.weight"])


def test_a_decoded_source_is_quantized_like_its_dequantized_form(weights, metadata, tmp_path):
    """The floats of the result are bfloat16, and so are those that are quantized."""
    (metadata / "hf_quant_config.json").write_text("{}")
    meaning = files.write_foreign(tmp_path / "source", metadata, weights, files.modelopt_nvfp4, MODELOPT)
    plain = written(tmp_path / "plain", meaning)
    for file in metadata.iterdir():
        if file.name != "config.json":
            shutil.copy(file, plain)
    assert convert(tmp_path / "source", tmp_path / "floats", verify=True).verification.equal
    report = convert(tmp_path / "source", tmp_path / "out", "8bit")
    scales = sum(name.endswith("input_scale") for name in read_safetensors(tmp_path / "source" / "model.safetensors"))
    assert report.notes[0].startswith(f"Scales of activations and of the KV cache are not used: {scales} tensors such")
    convert(plain, tmp_path / "expected", "8bit", dtype="bfloat16")
    ours, theirs = (dict(mx.load(str(tmp_path / name / "model.safetensors"))) for name in ("out", "expected"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert "quant_method" not in (tmp_path / "out" / "config.json").read_text()


def test_loading_asks_for_a_conversion(weights, metadata, tmp_path):
    files.write_foreign(tmp_path / "source", metadata, weights, files.modelopt_nvfp4, MODELOPT)
    path = tmp_path / "source"
    assert refusal(CheckpointError, mlx_dgemma.load, path) == (
        f"{path} is quantized in the format of ModelOpt; convert it first: "
        f"mlx-dgemma convert {path} --mlx-path NAME -q."
    )


def broken(change):
    def encode(weight: np.ndarray) -> files.Encoded:
        stored, values = files.modelopt_nvfp4(weight)
        change(stored)
        return stored, values

    return encode


REFUSED = {
    "awq": (files.modelopt_fp8, {"quantization_config": {"quant_method": "awq"}}, "has quant_method = 'awq', which is"),
    "no scales": (broken(lambda s: s.pop("weight_scale")), {}, "lacks the scales of model.decoder."),
    "wrong scales": (
        broken(lambda s: s.update(weight_scale=files.f32(np.ones((3, 5))))), {}, "[3, 5], which does not fit "
    ),
    "a smoothed input": (broken(lambda s: s.update(pre_quant_scale=files.f32([1]))), {}, "pre_quant_scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named(weights, metadata, tmp_path, case):
    encode, config, words = REFUSED[case]
    files.write_foreign(tmp_path / "source", metadata, weights, encode, config)
    assert words in refusal(CheckpointError, convert, tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# OptiQ: MLX's own quantization with bits by layer, and the tower in a file of its own.

TOWER = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


@pytest.fixture(scope="module")
def optiq(tmp_path_factory) -> tuple[Path, Path]:
    """(a checkpoint as OptiQ writes it, its dequantized form)."""
    folder = tmp_path_factory.mktemp("optiq")
    tensors, plain = dict(mx.load(str(DEMO / "model.safetensors"))), {}
    config = json.loads((DEMO / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    stored, tower = {}, {}
    for i, (name, array) in enumerate(sorted(tensors.items())):
        path = name.removesuffix(".weight")
        plain[name] = array
        if name.startswith(TOWER):
            tower[name.removeprefix("model.encoder.")] = array
        elif array.ndim < 2:
            stored[name] = array
        else:
            bits = (4, 8, 6, 3)[i % 4]
            packed = mx.quantize(array, 64, bits)
            stored |= {f"{path}.{part}": one for part, one in zip(("weight", "scales", "biases"), packed)}
            codes, *scales = packed
            plain[name] = mx.dequantize(codes, *(one.astype(mx.float32) for one in scales), 64, bits)
            if bits != 4:
                config["quantization"][path] = {"group_size": 64, "bits": bits}
    for path, kept in ((folder / "packed", stored), (folder / "plain", plain)):
        shutil.copytree(DEMO, path)
        mx.save_safetensors(str(path / "model.safetensors"), kept)
        (path / INDEX).unlink()
    config["quantization_config"] = config["quantization"]
    config["optiq_vision"] = {"sidecar": "optiq_vision.safetensors", "dtype": "bfloat16"}
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "packed" / "optiq_vision.safetensors"), tower)
    return folder / "packed", folder / "plain"


@pytest.mark.parametrize("place", ["index", "optiq", "beside"])
def test_optiqs_bits_and_tower(optiq, tmp_path, place):
    packed, plain = optiq
    source = shutil.copytree(packed, tmp_path / "source")
    if place == "index":
        names = {file: list(mx.load(str(source / file))) for file in ("model.safetensors", "optiq_vision.safetensors")}
        where = {name: file for file, held in names.items() for name in held}
        (source / INDEX).write_text(json.dumps({"weight_map": where}))
    elif place == "optiq":
        (source / "optiq").mkdir()
        (source / "optiq_vision.safetensors").rename(source / "optiq" / "optiq_vision.safetensors")
    checkpoint = Checkpoint.open(source)
    assert checkpoint.notes == ("config.json: 'optiq_vision' change nothing here.",)
    assert any(name.startswith("vision_tower.") for name in checkpoint.tensors)
    if place != "index":
        return
    report = convert(source, tmp_path / "out")
    assert [f"{bits}-bit" in report.quantized["experts"] for bits in (3, 4, 6, 8)] == [True] * 4
    expected = dict(tree_flatten(build(Checkpoint.open(plain), "float32").parameters()))
    for path in (source, tmp_path / "out"):
        found = dict(tree_flatten(build(Checkpoint.open(path), "float32", dequantize=True).parameters()))
        assert found.keys() == expected.keys()
        assert all(mx.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in found)
