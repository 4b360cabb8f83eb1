"""Traced passes over one token against passes that are built anew: the same numbers, whatever the prefix holds."""

import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import random_tokens, small_model

from mlx_dgemma.adapters.deltas import add_adapter, target_paths
from mlx_dgemma.distributed.group import Group
from mlx_dgemma.model import attention, kv_cache
from mlx_dgemma.model.masks import Narrow
from mlx_dgemma.model.traced import layer, token
from mlx_dgemma.model.traced.prefix import TracedKV


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch):
    """Functions that compile nothing, since the CPU needs a compiler for that, and buffers that grow often."""
    monkeypatch.setattr(mx, "compile", lambda function: function)
    for module in (kv_cache, token):
        monkeypatch.setattr(module, "BUFFER_STEP", 8)


def model_of(traced, **changes):
    model = small_model(3, scale=0.2, **changes)
    model.eval()
    if traced:
        model.trace_tokens()
    return model


def states(model, length, count):
    """Hidden states of so many tokens behind a prompt, and what the prefix holds in the end."""
    prefix = model.new_prefix()
    mx.eval(model.encode(random_tokens(1, 1, length), prefix), prefix.state)
    found = []
    for one in np.array(random_tokens(2, count, 1)):
        found.append(model.encode_ahead(mx.array(one[None]), [prefix]))
        prefix.accept(1)
    return mx.concatenate(found, axis=1), [a for layer in prefix.layers for a in (layer.keys, layer.values)], prefix


@pytest.mark.parametrize("length, count", [(1, 30), (21, 12)])  # the window is 5
def test_a_trace_serves_many_lengths_and_changes_no_bit(length, count):
    model = model_of(True)
    found, arrays, prefix = states(model, length, count)
    expected, plain_arrays, other = states(model_of(False), length, count)
    assert mx.array_equal(found, expected)
    slots = [layer.used(prefix.offset) for layer in prefix.layers for _ in range(2)]
    for a, b, used in zip(arrays, plain_arrays, slots):
        assert a.shape == b.shape and mx.array_equal(a[:, :, :used], b[:, :, :used])
    assert prefix.offset == other.offset == length + count
    assert model.token_pass.trusted and 1 < len(model.token_pass._traces) <= token.KEPT


def test_a_trace_is_made_once_for_its_slots():
    model, made = model_of(True), []
    build = token.TokenPass._traced
    token.TokenPass._traced = lambda *given: made.append(1) or build(*given)
    try:
        states(model, 9, 6)  # 8 slots are full, so the first token makes room; the others have 16
    finally:
        token.TokenPass._traced = build
    assert len(made) == 2  # one of them was compared


def test_what_is_compared_is_no_request(monkeypatch):
    """A request's buffers would be copied while both ways need them."""
    model, seen = model_of(True), []
    replay = token.TokenPass._replay
    monkeypatch.setattr(
        token.TokenPass, "_replay", lambda self, *given: seen.append(given[1].nbytes) or replay(self, *given)
    )
    *_, prefix = states(model, 30, 2)
    assert seen[0] < seen[1] == seen[2] == prefix.nbytes


def test_other_passes_have_no_trace(monkeypatch):
    model = model_of(True)
    monkeypatch.setattr(model.token_pass, "_replay", lambda *_: pytest.fail("traced"))
    prefixes = [model.new_prefix(), model.new_prefix()]
    for prefix in prefixes:
        model.encode(random_tokens(1, 1, 6), prefix)
    padded = model.new_prefix()
    model.encode(random_tokens(1, 1, 6), padded, mask=np.arange(6)[None] > 1)
    model.encode_ahead(random_tokens(2, 2, 1), prefixes)  # of two rows
    model.encode_ahead(random_tokens(2, 1, 2), prefixes[:1])  # over two tokens
    model.encode_ahead(random_tokens(2, 1, 1), [padded])
    model.train()
    model.encode_ahead(random_tokens(2, 1, 1), prefixes[:1])


def test_a_wrong_trace_is_refused_aloud(monkeypatch):
    expected, *_ = states(model_of(False), 6, 4)
    right = TracedKV.with_canvas
    monkeypatch.setattr(TracedKV, "with_canvas", lambda self, k, v, *rest: right(self, -k, 3 * v, *rest))
    model = model_of(True)
    with pytest.warns(UserWarning, match=r"^Traced passes are not used, .* \(they compute something else here\)"):
        found, *_ = states(model, 6, 4)
    assert mx.array_equal(found, expected) and not model.token_pass.usable

    def broken(*_):
        raise RuntimeError("no such kernel\nin detail")

    monkeypatch.setattr(TracedKV, "with_canvas", broken)
    model = model_of(True)
    with pytest.warns(UserWarning, match=r"\(no such kernel\)"):
        found, *_ = states(model, 6, 4)
    assert mx.array_equal(found, expected)


def test_traces_keep_neither_the_model_nor_old_weights():
    model = model_of(True)
    states(model, 6, 4)
    assert model.token_pass._traces
    model.train()
    assert not model.token_pass._traces
    model.eval()
    states(model, 6, 4)
    held = weakref.ref(model)
    del model
    assert held() is None


def test_slots_are_at_most_an_eighth_more(monkeypatch):
    for count in (1, 8, 9, 100, 1000, 65_000):
        assert count <= token.rounded(count) <= max(count * 9 // 8 + 8, 8)
    monkeypatch.setattr(token, "BUFFER_STEP", 256)
    assert len({token.rounded(count) for count in range(1, 2**18, 16)}) < 110


def with_layer_traces(**changes):
    model = small_model(3, scale=0.2, **changes)
    model.eval()
    model.trace_layers()
    return model


def canvases(model, length):
    """States of passes over whole and narrow canvases behind one and two prompts, and what the prefixes hold."""
    prefixes, found = [model.new_prefix(), model.new_prefix()], []
    for prefix, more in zip(prefixes, (0, 3)):
        model.encode(random_tokens(1, 1, length + more), prefix)
    state = mx.random.normal((2, 4, model.config.text.hidden_size), key=mx.random.key(0))
    for seed in range(2):
        canvas = random_tokens(seed, 2, 4)
        found.append(model.denoise(canvas[:1], prefixes[0]))
        found.append(model.denoise(canvas[1:, :3], prefixes[0], state[1:, :3], narrow=Narrow((3,), 4)))
        found.append(model.denoise(canvas, prefixes, state))
        for widths in ((2, 3), (3, 2)):
            found.append(model.denoise(random_tokens(4, 1, 5), prefixes, narrow=Narrow(widths, 4)))
        model.encode(canvas[:1], prefixes[0])
    return [*found, *(a for prefix in prefixes for a in prefix.state)]


@pytest.fixture
def made(monkeypatch):
    """A list that grows by every trace of a layer that is made."""
    found, build = [], layer.LayerTraces._traced
    monkeypatch.setattr(layer.LayerTraces, "_traced", lambda *given: found.append(1) or build(*given))
    return found


@pytest.mark.parametrize("length", [2, 21])  # the window is 5
def test_replayed_layers_change_no_bit(length, made):
    expected = canvases(model_of(False), length)
    assert not made
    found = canvases(with_layer_traces(), length)
    assert all(a.shape == b.shape and mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(made) == 10 * 2  # of each pass one for each type of layer


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_layers_with_quantized_keys_change_no_bit(bits, parts, made, monkeypatch):
    """In two full layers, which must not read each other's weights."""
    if parts:
        monkeypatch.setattr(attention, "keys_at_once", lambda queries, kv_heads: 7)
    shape = {"global_head_dim": 64, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    models = model_of(False, **shape), with_layer_traces(**shape)
    for model in models:
        model.kv_bits = bits
        norms = [layer.self_attn.k_norm for layer in model.model.decoder.layers]
        norms[0].weight = 2 * norms[0].weight
    expected, found = (canvases(model, 21) for model in models)
    assert all(a.shape == b.shape and mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(made) == 10 * 2
    weights = [weakref.ref(layer.self_attn) for layer in models[1].model.decoder.layers]
    del models, model, norms
    assert not any(one() for one in weights)


def test_other_layers_have_no_trace(made):
    model, canvas = with_layer_traces(), random_tokens(2, 1, 4)
    prefix, padded, model.kv_bits = model.new_prefix(), model.new_prefix(), 8
    model.denoise(canvas, prefix)  # behind nothing
    model.encode(random_tokens(1, 1, 6), prefix)
    model.encode_ahead(canvas, [prefix])  # whose masks are arrays
    model.encode(random_tokens(1, 1, 6), padded, mask=np.arange(6)[None] > 1)
    model.denoise(canvas, padded)
    model.train()
    model.denoise(canvas, prefix)
    model.eval()
    apply, model._apply = model._apply, lambda layer, *given: layer(*given)
    model.denoise(canvas, prefix)  # another way of computing layers
    model._apply = apply
    assert not made
    paths = target_paths(model, ("attention",), 1)
    add_adapter(model, paths, 2, 1.0, 0.0, False, mx.random.key(0))
    model.denoise(canvas, prefix)
    assert len(made) == 1  # of the sliding layers: the last one has the adapter
    model.denoise(canvas, prefix)
    assert len(made) == 1


def test_traces_follow_what_a_model_becomes():
    """New numbers, other modules and another group in layers that have been traced already."""
    model, canvas = with_layer_traces(), random_tokens(2, 1, 4)
    prefix = model.new_prefix()
    model.encode(random_tokens(1, 1, 6), prefix)
    layers, asked = model.model.decoder.layers, []

    class Doubling(Group):
        def sum(self, x):
            asked.append(1)
            return 2 * x

    def agree(model):
        found, traces = model.denoise(canvas, prefix), model.layer_traces
        model.layer_traces = None
        expected, model.layer_traces = model.denoise(canvas, prefix), traces
        return mx.array_equal(found, expected)

    assert agree(model)
    layers[1].mlp.gate_proj.weight = -layers[1].mlp.gate_proj.weight
    assert agree(model)
    norm = layers[0].input_layernorm = nn.RMSNorm(16, eps=1.0)
    norm.weight = 3 * norm.weight
    assert agree(model)
    model.join(Doubling())
    assert agree(model) and asked
    held = weakref.ref(model)
    del model
    assert held() is None
