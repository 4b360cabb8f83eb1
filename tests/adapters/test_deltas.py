"""Adapters in a model: both modes compute with the changed weights; the modules that cannot be changed."""

from dataclasses import replace

import mlx.core as mx
import pytest
from adapter_models import (
    ALL,
    BOUND,
    DENSE,
    EXPERTS,
    KINDS,
    LAYERS,
    Q,
    changed,
    deltas,
    equal,
    gaps,
    logits,
    modes_of,
    quantized_pair,
    shapes_of,
    small,
)
from mlx.utils import tree_flatten
from support import refusal

from mlx_dgemma.adapters import deltas as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta, add_adapter, apply, extract_adapter, target_paths
from mlx_dgemma.errors import CheckpointError, OptionError

# Adapters in a model.


@pytest.mark.parametrize("modes", ["equal", "different", "encode", "denoise"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_compute_with_the_changed_weights(kind, modes):
    model, plain = small(), small()
    adapter = modes_of(model, *KINDS[kind], modes)
    apply(model, adapter)
    oracle = logits(changed(small(), adapter.encode), changed(small(), adapter.denoise))
    assert max(gaps(logits(model), oracle)) < BOUND
    far = [one > 0.1 for one in gaps(logits(model), logits(plain))]
    assert far == [modes != "denoise", True, True]
    assert adapter.shared == (model._encoder_layers is None) == (modes == "equal")


def test_different_modes_share_every_weight():
    model = small()
    base = model.model.decoder.layers[0].self_attn.q_proj
    before = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    adapter = modes_of(model, ALL, False, "different")
    apply(model, adapter)
    layers = model._encoder_layers[0], model.model.decoder.layers[0]
    assert [layer.self_attn.q_proj.linear is base for layer in layers] == [True, True]
    assert layers[0].self_attn.q_norm is layers[1].self_attn.q_norm
    after = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    assert after - before == sum(delta.nbytes for delta in adapter.denoise.values())
    assert adapter.nbytes == sum(one.nbytes for mode in (adapter.encode, adapter.denoise) for one in mode.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_a_trained_one_survives_saving(kind, tmp_path):
    groups, dora = KINDS[kind]
    model, key = small(), mx.random.key(7)
    before, shapes = logits(model), shapes_of(model)
    paths = target_paths(model, groups)
    add_adapter(model, paths, 2, 1.5, 0.0, dora, key)
    assert equal(logits(model), before)
    for path in paths:
        module = adapters._module(model, path)
        key, own = mx.random.split(key)
        module.lora_b = mx.random.normal(module.lora_b.shape, scale=0.3, key=own)
        if dora:
            module.m = module.m * 1.25
    adapter = extract_adapter(model)
    assert adapter.shared
    assert list(adapter.changes) == [path for path in adapter.denoise if path in paths]
    assert len(adapter.denoise) == len(paths)
    peft.write(adapter, tmp_path / "a", "base")
    again = peft.read(tmp_path / "a", shapes)
    for mode in ("encode", "denoise"):
        ours, theirs = getattr(adapter, mode), getattr(again, mode)
        assert ours.keys() == theirs.keys()
        assert all(delta.equals(theirs[path]) for path, delta in ours.items())
    other = small()
    apply(other, again)
    assert equal(logits(other), logits(model))
    assert min(gaps(logits(model), before)) > 0.1


def test_targets_are_the_last_layers_modules():
    model = small()
    assert target_paths(model, ("attention",), 2) == [
        *(f"{LAYERS}1.self_attn.{name}_proj" for name in "qkvo"),
        *(f"{LAYERS}2.self_attn.{name}_proj" for name in "qko"),  # a full layer takes V from K
    ]
    assert target_paths(model, ("router", "self-conditioning"), 1) == [
        f"{LAYERS}2.router.proj",
        *(f"model.decoder.self_conditioning.{name}_proj" for name in ("gate", "up", "down")),
    ]


@pytest.mark.parametrize(("mode", "kind"), [("affine", "lora"), ("affine", "dora"), ("mxfp4", "lora")])
def test_an_adapter_works_the_same_on_quantized_weights(mode, kind):
    model, twin = quantized_pair(mode)
    adapter = modes_of(twin, *KINDS[kind], "equal")
    before = logits(model)
    apply(model, adapter)
    apply(twin, adapter)
    together = logits(model)
    assert max(gaps(together, logits(twin))) < 1e-3
    assert min(gaps(together, before)) > 0.1


# Errors.


@pytest.mark.parametrize("path", ["model.decoder.layers.3.self_attn.q_proj", "model.decoder.layers.2.self_attn.v_proj"])
def test_a_module_that_does_not_exist_is_refused(path):
    one = Delta(mx.zeros((1, 16)), mx.zeros((32, 1)), 1.0)
    for adapter in (Adapter({path: one}, {}), Adapter({}, {path: one})):
        assert refusal(CheckpointError, apply, small(), adapter) == (
            f"The adapter changes {path}, which this model does not have; it belongs to another model."
        )


@pytest.mark.parametrize(
    "path",
    ["model.decoder.layers.0.input_layernorm", "model.decoder.layers.0.layer_scalar", "model.decoder.embed_tokens"],
)
def test_a_module_that_is_not_linear_is_refused(path):
    adapter = Adapter({}, {path: Delta(mx.zeros((1, 16)), mx.zeros((40, 1)), 1.0)})
    assert refusal(CheckpointError, apply, small(), adapter) == (
        f"The adapter changes {path}, which does not support this kind of change."
    )


def test_unknown_targets_are_refused():
    model = small()
    assert refusal(OptionError, target_paths, model, ("mlp", "heads")) == (
        "There is no target 'heads'; choose from attention, mlp, experts, router, self-conditioning."
    )
    for count in (0, 4, -1):
        assert refusal(OptionError, target_paths, model, ("mlp",), count) == f"layers is {count}; the model has 3."


def test_unsupported_dora_is_refused():
    model, _ = quantized_pair("mxfp4")
    message = f"The adapter is a DoRA, which {Q} does not support in mxfp4; use affine weights."
    assert refusal(CheckpointError, apply, model, Adapter({}, {Q: deltas(model, DENSE, True)[Q]})) == message
    assert refusal(CheckpointError, add_adapter, model, [Q], 2, 1.0, 0.0, True, mx.random.key(0)) == message
    one = deltas(model)[EXPERTS]
    adapter = Adapter({}, {EXPERTS: replace(one, magnitude=mx.ones(64))})
    assert refusal(CheckpointError, apply, model, adapter) == (
        f"The adapter changes {EXPERTS}, which does not support this kind of change."
    )
    assert refusal(OptionError, add_adapter, model, [EXPERTS], 2, 1.0, 0.0, True, mx.random.key(0)) == (
        "DoRA does not support experts; leave experts out of --targets, or use lora."
    )
