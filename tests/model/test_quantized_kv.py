"""Quantized keys and values: what attention sees of them, and that a prefix of them is as good as any other."""

import mlx.core as mx
import numpy as np
import pytest
from support import FULL, gap, random_tokens, refusal, small_config, small_model

import mlx_dgemma
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.errors import OptionError
from mlx_dgemma.model import attention
from mlx_dgemma.model.cache.quantized import QuantizedKV, check
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.masks import Mask, Narrow

ROUNDING = 2e-5  # float32; codes are the same


@pytest.fixture(scope="module", params=[8, 4])
def model(request):
    made = small_model(1, global_head_dim=64)
    made.kv_bits = request.param
    return made.eval()


@pytest.fixture
def in_parts(monkeypatch):
    """Attention to quantized keys takes seven at once."""
    monkeypatch.setattr(attention, "keys_at_once", lambda queries, kv_heads: 7)


def seen(model, prefix):
    """Hidden states of a canvas, of a commit behind it, and of the next canvas; the prefix is not changed."""
    prefix = prefix.fork()
    canvas = model.denoise(random_tokens(1, prefix.batch_size, 4), prefix)
    commit = model.encode(random_tokens(2, prefix.batch_size, 3), prefix)
    return mx.concatenate([canvas, commit, model.denoise(random_tokens(3, prefix.batch_size, 4), prefix)], axis=1)


def encoded(model, tokens, chunk=100, mask=None):
    prefix = model.new_prefix(tokens.shape[0])
    for start in range(0, tokens.shape[1], chunk):
        part = slice(start, start + chunk)
        model.encode(tokens[:, part], prefix, mask=None if mask is None else mask[:, part])
    return prefix


def rope(x, positions, rotated):
    """Rotate-half over x [heads, N, D] by theta 1e6; pairs from `rotated` on stand still."""
    half = x.shape[-1] // 2
    turn = positions[:, None] * np.where(np.arange(half) < rotated, 1e6 ** (-np.arange(half) / half), 0)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(turn) - b * np.sin(turn), b * np.cos(turn) + a * np.sin(turn)], -1)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_attention_is_that_to_the_dequantized_values_and_their_keys(model, monkeypatch, parts, padding):
    """A full layer's attention, of a prompt and of a canvas, against one in float64."""
    layer = model.model.decoder.layers[2].self_attn
    if parts:
        monkeypatch.setattr(attention, "keys_at_once", lambda queries, kv_heads: 7)
    x, canvas = (mx.random.normal((1, n, 16), key=mx.random.key(n)) for n in (23, 4))
    cache = QuantizedKV(0, model.kv_bits, layer.unpack)
    pads = np.array([padding], np.int32)
    cache.padding = mx.array(pads) if padding else None
    at = np.arange(27)

    def computed(x, offset, mask, is_canvas):
        rope_offset = offset - mx.array(pads) if padding else offset
        return layer(x, attention.LayerContext([cache], [offset], [mask], rope_offset, is_canvas))

    outs = [
        computed(x, 0, Mask(at[:23], at[:23], padding=pads), False),
        computed(canvas, 23, Mask(at, padding=pads), True),
    ]
    _, pairs = model.config.text.rope(FULL)
    both, weight = np.array(mx.concatenate([x, canvas], axis=1)[0], np.float64), np.array(layer.k_norm.weight)
    values = both @ np.array(layer.k_proj.weight, np.float64).T
    values /= np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6)
    own = rope(values[None] * weight, at - padding, pairs)[0]
    group, top = cache.group_size, 2**model.kv_bits - 1
    rows = mx.array(values[:23].astype(np.float32))
    held = np.array(mx.dequantize(*mx.quantize(rows, group, model.kv_bits), group, model.kv_bits), np.float64)
    spread = np.ptp(values[:23].reshape(23, -1, group), axis=-1).max()
    assert 0 < np.abs(held - values[:23]).max() < spread / top  # quantized at all, and not worse
    keys = np.concatenate([rope(held[None] * weight, at[:23] - padding, pairs)[0], own[23:]])
    seen_values = np.concatenate([held, values[23:]])
    queries = (both @ np.array(layer.q_proj.weight, np.float64).T).reshape(27, 4, 64).transpose(1, 0, 2)
    queries = queries / np.sqrt((queries**2).mean(-1, keepdims=True) + 1e-6) * np.array(layer.q_norm.weight)
    scores = rope(queries, at - padding, pairs) @ keys.T
    visible = (at[None] <= at[:, None]) | (at[:, None] >= 23)
    visible &= (at[None] >= padding) | (at[None] == at[:, None])
    scores = np.where(visible, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    expected = (shares @ seen_values).transpose(1, 0, 2).reshape(27, -1) @ np.array(layer.o_proj.weight, np.float64).T
    found = np.array(mx.concatenate(outs, axis=1)[0])
    assert np.abs(found - expected)[padding:].max() < 1e-4
    assert len(cache.stages) == (4 if parts else 0)


def test_a_prompt_is_the_same_at_once_in_chunks_and_token_by_token(model, in_parts):
    tokens = random_tokens(0, 1, 30)
    expected = seen(model, encoded(model, tokens))
    assert gap(seen(model, encoded(model, tokens, 7)), expected) < ROUNDING
    ahead = model.new_prefix()
    for start in range(0, 30, 3):  # as drafts are verified: five tokens, of which three are right
        model.encode_ahead(mx.concatenate([tokens[:, start : start + 3], random_tokens(9, 1, 2)], axis=1), [ahead])
        ahead.accept(3)
    assert gap(seen(model, ahead), expected) < ROUNDING


def test_rows_of_a_padded_batch_are_as_they_are_alone(model, in_parts):
    tokens, mask = random_tokens(0, 2, 19), np.ones((2, 19), bool)
    mask[1, :6] = False
    both = encoded(model, tokens, 8, mask)
    assert (
        gap(seen(model, both)[1:, :4], model.denoise(random_tokens(1, 2, 4)[1:], encoded(model, tokens[1:, 6:]))) < 1e-4
    )
    both.select_rows([1])
    more = random_tokens(5, 1, 3)
    model.encode(more, both)
    alone = encoded(model, mx.concatenate([tokens[1:, 6:], more], axis=1))
    assert gap(seen(model, both), seen(model, alone)) < 1e-4


def test_forks_rewinds_files_and_trims_are_as_good_as_fresh(model):
    tokens = random_tokens(0, 1, 12)
    prefix, fresh = encoded(model, tokens[:, :3]), seen(model, encoded(model, tokens[:, :3]))
    prefix.set_rewind_point()
    other = prefix.fork()
    model.encode(tokens[:, 3:], prefix)
    mx.eval(model.denoise(random_tokens(7, 1, 4), prefix))
    assert gap(seen(model, other), fresh) == 0  # what one writes the other does not see
    whole = seen(model, prefix)
    saved = prefix.to_arrays()
    assert {name for name in saved[0] if name.startswith("2.")} == {"2.codes", "2.scales", "2.biases"}
    again = model.new_prefix()
    again.load_arrays(*saved)
    again.trim()
    assert again.layers[2].codes.shape[2] == 12 and again.layers[2].keys is None
    assert gap(seen(model, again), whole) == 0
    for one in (prefix, again):
        assert one.rewind(3) == 3
        assert gap(seen(model, one), fresh) == 0


def test_writes_are_undone_and_narrow_canvases_keep_what_was_computed(model):
    prefix = encoded(model, random_tokens(0, 1, 9))
    canvas, other = random_tokens(1, 1, 4), random_tokens(2, 1, 4)
    mx.eval(model.denoise(canvas, prefix))
    before, handles = [np.array(array) for array in prefix.state], prefix.handles()
    part = model.denoise(other[:, :2], [prefix], narrow=Narrow((2,), 4))
    mx.eval(part, prefix.state)
    assert any((np.array(now) != old).any() for now, old in zip(prefix.state, before))
    prefix.restore(handles)
    assert all((np.array(now) == old).all() for now, old in zip(prefix.state, before))
    # Whose ends are as the first canvas left them, as plain keys are.
    plain = small_model(1, global_head_dim=64)
    exact = encoded(plain, random_tokens(0, 1, 9))
    plain.denoise(canvas, exact)
    coarse = {8: 0.05, 4: 1.0}[model.kv_bits]
    assert gap(part, plain.denoise(other[:, :2], [exact], narrow=Narrow((2,), 4))) < coarse


def test_training_mode_does_not_quantize():
    model = small_model(1, global_head_dim=64)
    model.kv_bits = 8
    assert not any(isinstance(layer, QuantizedKV) for layer in model.new_prefix().layers)


def release(context, bits):
    raw = small_config(("sliding_attention",) * 5 + (FULL,))
    text = raw["text_config"]
    text.update(num_hidden_layers=30, layer_types=text["layer_types"] * 5, num_attention_heads=16, sliding_window=1024)
    text.update(num_key_value_heads=8, head_dim=256, num_global_key_value_heads=2, global_head_dim=512)
    text["max_position_embeddings"] = 262_144
    return memory.prefix_bytes(ModelConfig.from_dict({**raw, "canvas_length": 256}), context, 2, kv_bits=bits)


def test_the_estimate_is_what_a_prefix_takes(model):
    prefix = encoded(model, random_tokens(0, 3, 300), 200)
    mx.eval(model.denoise(random_tokens(1, 3, 4), prefix))
    assert prefix.nbytes == memory.prefix_bytes(model.config, 300, 4, 3, model.kv_bits)


def test_131072_tokens_of_the_release_take_a_third_and_less():
    sizes = [release(131_072, bits) / 2**30 for bits in (None, 8, 4)]
    assert sizes == pytest.approx([2.749, 0.913, 0.640], abs=0.001)


def test_what_cannot_be_quantized_is_refused(demo):
    config = ModelConfig.from_dict(small_config()).text
    assert refusal(OptionError, check, config, 8) == (
        "kv_bits is 8, which takes heads of a multiple of 64, but this model's have 16; leave it out."
    )
    assert refusal(OptionError, mlx_dgemma.load, demo, kv_bits=5) == "kv_bits is 5; it should be 8, 4 or None."
