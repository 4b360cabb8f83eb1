"""Products in float16: what computes in it, what does not, and which weights are refused."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import random_tokens, refusal, small_config, small_model, write_checkpoint

import mlx_dgemma
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.float16 import KINDS
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.model import head

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}
WIDE["top_k_experts"] = 4  # all of them, or roundings would choose others
UP = "model.decoder.layers.0.mlp.up_proj"
TABLE = "model.decoder.embed_tokens"


def checkpoint_of(path, mode=None, change=lambda tensors: None):
    """A small checkpoint in bfloat16, its matrices quantized if a mode is given."""
    arrays = tree_flatten(small_model(scale=0.1, **WIDE).parameters())
    tensors, config = {name: array.astype(mx.bfloat16) for name, array in arrays}, small_config(**WIDE)
    if mode:
        bits, group = 8 if mode in ("affine", "mxfp8") else 4, 16 if mode == "nvfp4" else 32
        config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
        for name in [name for name, array in tensors.items() if array.ndim > 1]:
            packed = mx.quantize(tensors.pop(name), **config["quantization"])
            tensors.update(zip((name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases")), packed))
    change(tensors)
    return Checkpoint.open(write_checkpoint(path, tensors, config))


def outputs(model):
    """Logits and conditioning of a step."""
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 7), prefix)
    logits = model.logits(model.denoise(random_tokens(1, 1, 4), prefix))
    condition = model.condition(logits / 0.8)
    again = model.logits(model.denoise(random_tokens(1, 1, 4), prefix, condition))
    keys = mx.random.key(0)[None]
    fast = model.head.predict(model.denoise(random_tokens(1, 1, 4), prefix, condition), 0.8, keys, True)
    return logits, condition, again, fast.expected_embedding, fast.entropy


def distance(a, b):
    a, b = (np.asarray(one.astype(mx.float32)) for one in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("mode", [None, "affine", "mxfp4", "mxfp8", "nvfp4"])
def test_float16_is_closer_to_float32_than_bfloat16(tmp_path, mode):
    checkpoint = checkpoint_of(tmp_path / "m", mode)
    half = build(checkpoint, "float32", compute_dtype="float16")
    assert (half.dtype, half.compute_dtype) == (mx.float32, mx.float16)
    exact, found, coarse = (outputs(one) for one in (build(checkpoint, "float32"), half, build(checkpoint, "bfloat16")))
    assert [one.dtype for one in found] == [one.dtype for one in exact]
    errors, others = ([distance(a, b) for a, b in zip(some, exact)] for some in (found, coarse))
    assert min(errors) > 0 and sum(errors) < sum(others) / 2


def test_what_computes_in_float16(tmp_path):
    model = build(checkpoint_of(tmp_path / "m", "affine"), compute_dtype="float16")
    arrays = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        assert type(module) not in KINDS, path
        if type(module) in KINDS.values():
            assert module.scales.dtype == module.biases.dtype == mx.float16
    assert arrays["model.decoder.norm.weight"].dtype == mx.bfloat16
    layer = model.model.decoder.layers[0]
    x = mx.ones((2, 64), mx.bfloat16)
    assert layer.mlp.up_proj(x).dtype == mx.bfloat16
    assert layer.experts(x, mx.zeros((2, 2), mx.uint32), mx.ones((2, 2), mx.bfloat16)).dtype == mx.bfloat16
    assert model.encode(random_tokens(0, 1, 7), model.new_prefix()).dtype == mx.bfloat16


def test_the_vision_tower_keeps_its_dtype(demo):
    model = mlx_dgemma.load(demo, "bfloat16", compute_dtype="float16").model
    tower = [one for path, one in model.named_modules() if "vision" in path and isinstance(one, nn.Linear)]
    assert tower and {one.weight.dtype for one in tower} == {mx.bfloat16}
    assert {type(one) for one in tower} == {nn.Linear}


def test_an_unknown_compute_dtype(tmp_path):
    assert refusal(OptionError, build, checkpoint_of(tmp_path / "m"), compute_dtype="int8") == (
        "compute_dtype is 'int8'; it should be float16 or None."
    )


@pytest.mark.parametrize(
    ("mode", "name", "change", "reason"),
    [
        (None, f"{UP}.weight", lambda a: a * 2**20, "but float16 ends at 65504"),
        (None, f"{UP}.weight", lambda a: a * 2**-20, "where float16 is coarser than bfloat16"),
        ("affine", f"{UP}.scales", lambda a: a * 2**30, "but float16 ends at 65504"),
        ("affine", f"{TABLE}.scales", lambda a: a * 2**-20, "where float16 is coarser than bfloat16"),
        ("affine", f"{TABLE}.biases", lambda a: a * 2**20, "but float16 ends at 65504"),
        ("mxfp4", f"{UP}.scales", lambda a: a + 30, "but float16 ends at 65504"),
        ("mxfp8", f"{UP}.scales", lambda a: a - 30, "where float16 is coarser than bfloat16"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, mode, name, change, reason):
    checkpoint = checkpoint_of(tmp_path / "m", mode, lambda tensors: tensors.update({name: change(tensors[name])}))
    build(checkpoint)
    message = refusal(CheckpointError, build, checkpoint, compute_dtype="float16")
    assert message.startswith(f"{name} ") and reason in message
    assert message.endswith("; load it without --compute-dtype float16 (compute_dtype).")


# Shares of a probability are small and many.


@pytest.mark.parametrize("shares", ["tiny", "equal", "peaked"])
def test_shares_neither_vanish_nor_overflow(shares, monkeypatch):
    """All alike and tiny, alike and as large as the largest, or many tiny ones beside a large one."""
    p = {"tiny": 3e-9, "equal": 1.0, "peaked": 2e-8}[shares] * np.random.default_rng(0).uniform(0.5, 1.5, (1, 3, 2**18))
    p[..., 5] = 1.0 if shares == "peaked" else p[..., 5]
    taken = []

    def product(table, x, start, end, transpose):
        taken.append(x)
        return mx.ones((*x.shape[:-1], 1), mx.float16)  # what is multiplied back is then all that remains

    monkeypatch.setattr(head, "_matmul_slice", product)
    table = SimpleNamespace(compute_dtype=mx.float16)
    found = head.matmul_slice(table, mx.array(p.astype(np.float32)), 0, 2**18, transpose=False)
    assert taken[0].dtype == mx.float16 and found.dtype == mx.float32
    kept = np.asarray(taken[0]).astype(np.float64) * np.asarray(found)
    assert np.abs(kept.sum(axis=-1) / p.sum(axis=-1) - 1).max() < head.TAIL
    assert (np.abs(kept - p).sum(axis=-1) / p.sum(axis=-1)).max() < 2**-9  # bfloat16's rounding
    assert np.asarray(taken[0]).astype(np.float64).sum(axis=-1).max() < 2 * head.SHARES
    head.matmul_slice(table, mx.zeros((1, 1, 2**18)), 0, 2**18, transpose=False)
    assert not np.asarray(taken[1]).any()
