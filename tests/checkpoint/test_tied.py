"""Copies of tied weights are compared by content: equal ones are not needed, others are refused by name."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support import refusal, small_config, small_model, write_checkpoint

from mlx_dgemma.adapters import fuse
from mlx_dgemma.checkpoint import tied
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.tied import check_tied
from mlx_dgemma.errors import CheckpointError

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
EMBEDDING = "model.decoder.embed_tokens.weight"
COPIES = {
    "lm_head.weight": EMBEDDING,
    "model.encoder.language_model.embed_tokens.weight": EMBEDDING,
    "model.encoder.language_model.norm.weight": "model.decoder.norm.weight",
    "model.encoder.language_model.layers.1.router.scale": "model.decoder.layers.1.router.scale",
    "model.encoder.language_model.layers.0.experts.down_proj": "model.decoder.layers.0.experts.down_proj.weight",
}


@pytest.fixture(scope="module")
def weights():
    return dict(tree_flatten(small_model(**WIDE).parameters()))


def checked(folder, tensors, quantization=None) -> None:
    config = small_config(**WIDE)
    if quantization:
        config["quantization"] = quantization
    check_tied(Checkpoint.open(write_checkpoint(folder, tensors, config)))


def packed(tensors, module, weight, bits=4):
    parts = zip(("weight", "scales", "biases"), mx.quantize(weight, 32, bits))
    return {**tensors, **{f"{module}.{part}": array for part, array in parts}}


def with_last_changed(array):
    flat = array.flatten()
    return mx.concatenate([flat[:-1], flat[-1:] + 1]).reshape(array.shape)


@pytest.mark.parametrize(("copy", "original"), COPIES.items())
@pytest.mark.parametrize("compared", [64, 2**20])
def test_an_equal_copy_is_ignored_and_another_is_refused_by_name(
    tmp_path, monkeypatch, weights, copy, original, compared
):
    """The difference lies at the very end, and no more than the bound is read at once."""
    read, sizes = tied._read, []
    monkeypatch.setattr(tied, "COMPARED_BYTES", compared)
    monkeypatch.setattr(tied, "_read", lambda info, a, b: sizes.append(b - a) or read(info, a, b))
    checked(tmp_path / "equal", {**weights, copy: weights[original]})
    other = {**weights, copy: with_last_changed(weights[original])}
    said = refusal(CheckpointError, checked, tmp_path / "other", other)
    assert said.startswith(f"{copy} differs from model.decoder.")
    assert said.endswith("but the two are one weight here; use a checkpoint that was trained with tied weights, or "
                         "remove the tensor to go on without it.")  # fmt: skip
    assert max(sizes) <= max(compared, 4 * 64)  # a row


def test_building_and_fusing_refuse_it_too(tmp_path, weights, demo):
    other = {**weights, "lm_head.weight": 1.5 * weights[EMBEDDING]}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "a", other, small_config(**WIDE)))
    assert refusal(CheckpointError, build, checkpoint).startswith("lm_head.weight differs from ")
    assert refusal(CheckpointError, fuse._Fusion, checkpoint, {}, False).startswith("lm_head.weight differs from ")


def test_another_dtype_with_the_same_values_is_equal(tmp_path, weights):
    narrow = {**weights, EMBEDDING: weights[EMBEDDING].astype(mx.bfloat16)}
    checked(tmp_path / "a", {**narrow, "lm_head.weight": narrow[EMBEDDING].astype(mx.float32)})
    checked(tmp_path / "b", {**narrow, "lm_head.weight": weights[EMBEDDING]})  # equal in the original's dtype
    rounded = {**weights, "lm_head.weight": narrow[EMBEDDING]}
    assert "differs" in refusal(CheckpointError, checked, tmp_path / "c", rounded)


def test_packed_copies(tmp_path, monkeypatch, weights):
    """Packed beside packed, packed otherwise, and packed beside floats."""
    monkeypatch.setattr(tied, "COMPARED_BYTES", 300)
    how = {"group_size": 32, "bits": 8, "mode": "affine"}
    module, weight = EMBEDDING.removesuffix(".weight"), weights[EMBEDDING]
    quantization = {"group_size": 32, "bits": 4, "mode": "affine", module: how, "lm_head": how}
    base = packed(weights, module, weight, 8)
    values = mx.dequantize(*(base[f"{module}.{part}"] for part in ("weight", "scales", "biases")), **how)
    checked(tmp_path / "same", packed(base, "lm_head", weight, 8), quantization)
    checked(tmp_path / "floats", {**base, "lm_head.weight": values}, quantization)
    other = packed(base, "lm_head", with_last_changed(weight), 8)
    said = refusal(CheckpointError, checked, tmp_path / "other", other, quantization)
    assert said.startswith("lm_head.weight differs from model.decoder.embed_tokens.weight")
    for name, one in (("changed", with_last_changed(values)), ("unrounded", weight)):
        said = refusal(CheckpointError, checked, tmp_path / name, {**base, "lm_head.weight": one}, quantization)
        assert said.startswith("lm_head.weight differs from model.decoder.embed_tokens.weight")


def test_a_copy_that_cannot_be_compared(tmp_path, weights):
    integers = {**weights, "lm_head.weight": mx.zeros(weights[EMBEDDING].shape, mx.int32)}
    assert "lm_head.weight differs" in refusal(CheckpointError, checked, tmp_path / "a", integers)
    short = {**weights, "lm_head.weight": weights[EMBEDDING][:-1]}
    assert "lm_head.weight differs" in refusal(CheckpointError, checked, tmp_path / "b", short)
    stray = {**weights, "model.encoder.language_model.gate.weight": mx.zeros((3,))}
    assert refusal(CheckpointError, checked, tmp_path / "c", stray) == (
        "The checkpoint holds model.encoder.language_model.gate.weight, but lacks model.decoder.gate.weight, "
        "which it is a copy of."
    )
