"""The custom kernels, emulated on the CPU, against the plain way of computing the same."""

import shutil
from dataclasses import replace

import emulator
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import FULL, SLIDING, engine_of, random_tokens, small_model

from mlx_dgemma.checkpoint import build
from mlx_dgemma.distributed.group import Group
from mlx_dgemma.model import attention, experts, head, kv_cache, tiling
from mlx_dgemma.model.cache.quantized import Part
from mlx_dgemma.model.kernels import launch as kernels
from mlx_dgemma.model.masks import Mask, Narrow

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
EPS = 1e-6
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(kernels, "_launch", emulator.launch)


def draw(seed, *shape, dtype=mx.float32, scale=1.0):
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)


def norm(x, weight=None):
    """As the reference rounds it: once, at the end."""
    wide = x.astype(mx.float32)
    wide = wide * mx.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + EPS)
    return (wide if weight is None else wide * weight.astype(mx.float32)).astype(x.dtype)


def same(found, expected, dtype):
    """Equal up to a rounding of the dtype here and there."""
    assert found.dtype == expected.dtype == dtype
    assert found.shape == expected.shape
    a, b = (np.array(one.astype(mx.float32), np.float64) for one in (found, expected))
    step = {mx.float32: 2e-6, mx.bfloat16: 1 / 128, mx.float16: 1 / 1024}[dtype]
    assert np.abs(a - b).max() <= 2 * step * max(np.abs(b).max(), 1)
    assert (np.abs(a - b) > 4e-6 * np.abs(b)).mean() <= 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 300])
def test_add_and_norm(dtype, size):
    x, y = draw(0, 2, 5, size, dtype=dtype), draw(1, 2, 5, size, dtype=dtype, scale=30)
    weight, dense, sparse, scale = (draw(i, size, dtype=dtype) for i in (2, 3, 4, 5))
    total = x + norm(y, weight)
    expected = [
        total,
        norm(total, dense),
        norm(total, sparse),
        ((norm(total) * scale).astype(mx.float32) * size**-0.5).astype(dtype),
    ]
    for found, wanted in zip(kernels.add_and_norm(x, y, weight, dense, sparse, scale, EPS), expected):
        same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, top_k", [(64, 2), (300, 8), (40, 1)])
def test_combine(dtype, size, top_k):
    x, dense = draw(0, 1, 6, size, dtype=dtype), draw(1, 1, 6, size, dtype=dtype)
    rows = draw(2, 50, size, dtype=dtype)
    slots = mx.random.randint(0, 50, (6, top_k), key=mx.random.key(3))
    shares = mx.random.uniform(0.1, 1, (6, top_k), key=mx.random.key(4)).astype(dtype)
    norms, scalar = tuple(draw(i, size, dtype=dtype) for i in (5, 6, 7)), mx.array([0.7], dtype)
    mixed = (rows[slots].astype(mx.float32) * shares[..., None].astype(mx.float32)).sum(axis=1).astype(dtype)[None]
    both = norm(dense, norms[0]) + norm(mixed, norms[1])
    expected = (x + norm(both, norms[2])) * scalar
    same(kernels.combine(x, dense, rows, slots, shares, norms, scalar, EPS), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [SLIDING, FULL])
@pytest.mark.parametrize("batch", [1, 3])
def test_split_heads(demo, dtype, kind, batch):
    """Against the layer's own norms and RoPE, for one offset and for offsets of rows."""
    model = engine_of(demo).model
    attention = next(one.self_attn for one in model.model.decoder.layers if one._layer_type == kind)
    dim, length = attention._dim, 4
    offset = 700 if batch == 1 else mx.array([0, 3, 900])
    q, k, v = (draw(i, batch, length, heads * dim, dtype=dtype) for i, heads in enumerate((6, 2, 2)))
    norms = attention.q_norm.weight.astype(dtype), attention.k_norm.weight.astype(dtype)
    queries, keys, values = kernels.split_heads(q, k, v, norms, model.turns(offset, length)[kind], EPS)

    def by_head(x):
        return x.reshape(batch, length, -1, dim)

    for found, x, weight in ((queries, q, norms[0]), (keys, k, norms[1])):
        normed = norm(by_head(x), weight).transpose(0, 2, 1, 3)
        expected = attention._rope(normed.astype(mx.float32), offset=offset).astype(dtype)
        if dtype == mx.float32:  # MLX rounds its frequencies, which shows at position 900
            assert mx.abs(found - expected).max() < 3e-4
        else:
            same(found, expected, dtype)
    same(values, norm(by_head(v)).transpose(0, 2, 1, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, top_k", [(8, 2), (128, 8), (40, 3), (5, 5), (300, 32)])
def test_route(dtype, count, top_k):
    scores, scales = draw(0, 9, count, dtype=dtype, scale=3), mx.random.uniform(0.5, 2, (count,)).astype(dtype)
    chosen, shares = kernels.route(scores, scales, top_k)
    numbers = np.array(scores.astype(mx.float32))
    expected = np.argsort(-numbers, axis=1, kind="stable")[:, :top_k]  # of equal ones the first
    assert np.array(chosen).tolist() == expected.tolist()
    weights = mx.softmax(mx.take_along_axis(scores, mx.array(expected), axis=-1), axis=-1, precise=True)
    same(shares, weights * scales[mx.array(expected)], dtype)


def test_route_stays_within_bounds_without_a_number():
    chosen, _ = kernels.route(mx.full((2, 8), mx.nan), mx.ones((8,)), 4)
    assert np.array(chosen).max() < 8


CASES = [(1, 1, 4, 1, 0), (7, 2, 4, 16, 0), (64, 8, 128, 16, 0), (40, 3, 1, 16, 0), (256, 8, 128, 1, 512)]
CASES += [(33, 8, 128, 1, 512), (9, 2, 300, 1, 0)]


@pytest.mark.parametrize("rows, top_k, count, length, least", CASES)
def test_lay_out_and_take_rows(rows, top_k, count, length, least):
    chosen = mx.random.randint(0, count, (rows, top_k), key=mx.random.key(rows))
    runs = kernels.lay_out(chosen, count, length, least)
    slots, source, owners = (np.array(one) for one in runs)
    assert sorted(set(slots.flatten())) == sorted(slots.flatten())  # no slot twice
    assert (owners[slots // length] == np.array(chosen)).all()
    assert (source[slots] == np.arange(rows)[:, None]).all()
    assert (np.diff(owners.astype(int)) >= 0).all()
    assert source.min() >= 0 and source.max() < rows
    assert owners.size * length >= least
    if length > 1:  # the plain way uses the same slots
        plain_slots, plain_owners = experts.lay_out_runs(chosen.flatten(), count, length)
        assert slots.flatten().tolist() == np.array(plain_slots).tolist()
        assert owners.tolist() == np.array(plain_owners).tolist()
    x = draw(1, rows, 24, dtype=mx.bfloat16)
    assert mx.array_equal(kernels.take_rows(x, runs.source, length).reshape(-1, 24), x[runs.source])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, width", [(1, 8), (25, 32), (300, 304), (8, 8), (2500, 2504), (3001, 3008)])
def test_softmax_of_the_first_scores(dtype, count, width):
    scores = draw(0, 2, 3, width, dtype=dtype, scale=3)
    found, level = kernels.softmax_with_sums(scores, count)
    assert mx.allclose(level, mx.logsumexp(scores[..., :count].astype(mx.float32), axis=-1, keepdims=True), atol=1e-5)
    same(found[..., :count], mx.softmax(scores[..., :count], axis=-1, precise=True), dtype)
    assert (found[..., count:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_unpack(dtype, bits, kind):
    """Of some slots of two heads and of rows with positions of their own, rounded where the layer's own way does."""
    model = small_model(4, layers=(SLIDING, FULL), head_dim=64, global_head_dim=64)
    attention = model.model.decoder.layers[kind == FULL].self_attn
    attention.k_norm.weight = weight = draw(1, 64, dtype=dtype)
    codes, scales, biases = mx.quantize(draw(0, 2, 2, 40, 64, dtype=dtype), 32, bits)
    wide = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), 32, bits)
    values = wide[:, :, 5:34].astype(dtype)
    for position in (9, mx.array([3, 30])):
        keys, found = attention.unpack((codes, scales, biases), 32, bits, (5, 34), position, by_kernel=True)
        same(found, values, dtype)
        weighted = (values * weight).astype(mx.float32)
        same(keys, attention._rope(weighted, offset=position).astype(dtype), dtype)
        plain = attention.unpack((codes, scales, biases), 32, bits, (5, 34), position)
        assert all(mx.allclose(a, b, rtol=0.02, atol=0.05) for a, b in zip(plain, (keys, found)))


def test_attention_to_parts_by_the_kernel():
    queries, keys, values = draw(0, 1, 4, 3, 16), draw(1, 1, 2, 21, 16), draw(2, 1, 2, 21, 16)
    mask = Mask(np.arange(21), np.arange(18, 21))
    parts = [Part(at, keys[:, :, at : at + 8], values[:, :, at : at + 8]) for at in (0, 8, 16)]
    expected = attention.attend(queries, keys, values, mask)
    for by_kernel in (True, False):
        same(attention.attend_to_parts(queries, parts, mask, None, by_kernel), expected, mx.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu(dtype):
    both = draw(0, 3, 5, 80, dtype=dtype, scale=2)
    gate, up = mx.split(both, 2, axis=-1)
    expected = nn.gelu_approx(gate.astype(mx.float32)).astype(dtype) * up
    same(kernels.geglu(both), expected, dtype)
    same(kernels.geglu(mx.contiguous(gate), mx.contiguous(up)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [64, 1000, 64 * 70])
def test_tiles_and_what_the_head_makes_of_them(monkeypatch, dtype, vocabulary):
    """In one chunk and in several, with a tile that is cut short, against the plain reduction."""
    monkeypatch.setattr(tiling, "TILES", 64)  # tiles of several tokens
    table = mx.zeros((vocabulary, 16))
    hidden = draw(0, 2, 3, 16, dtype=dtype)
    plain = head.Head(mlx_embedding(draw(1, *table.shape, dtype=dtype)), vocabulary, 5.0, 4.0, dtype)
    fast = head.Head(plain.table, vocabulary, 5.0, 4.0, dtype, uses_kernels=True)
    t, keys = mx.array([0.5, 0.9])[:, None, None], mx.random.split(mx.random.key(2), 2)
    for whole in (False, True):
        expected = plain.predict(hidden, t, keys, whole)
        for nbytes in (None, 1):
            found = fast.predict(hidden, t, keys, whole, nbytes)
            assert mx.array_equal(found.argmax, expected.argmax)
            assert mx.array_equal(found.sample, expected.sample)
            for name in ("confidence", "entropy", "top_probs", "logsumexp"):
                assert mx.abs(getattr(found, name) - getattr(expected, name)).max() < 1e-5, name
            made = found.condition(fast, 6, nbytes).astype(mx.float32)
            wanted = expected.condition(plain, 6).astype(mx.float32)
            assert mx.abs(made - wanted).max() < (1e-4 if dtype == mx.float32 else 0.1)


def mlx_embedding(weight):
    table = nn.Embedding(1, 1)
    table.weight = weight
    return table


@pytest.mark.parametrize("way", ["runs", "sorted", "gathered"])
def test_a_model_with_kernels_gives_the_same_states(monkeypatch, way):
    """Prompt, commit, canvases of one prefix and of several, in all ways of laying out rows."""
    monkeypatch.setattr(experts, "uses_padded_runs", lambda rows=0: way == "runs")
    monkeypatch.setattr(experts, "PAD_FROM", 0 if way == "sorted" else 10**6)
    model = small_model(4, layers=(SLIDING, FULL, SLIDING, FULL))
    tokens, canvas = random_tokens(0, 2, 21), random_tokens(2, 2, 4)
    conditioning = draw(3, 2, 4, 16)
    model.eval()

    def states():
        prefix, others = model.new_prefix(2), [model.new_prefix(), model.new_prefix()]
        found = [model.encode(tokens[:, :12], prefix), model.encode(tokens[:, 12:], prefix)]
        for one, length in zip(others, (5, 9)):
            found.append(model.encode(tokens[:1, :length], one))
        found += [model.denoise(canvas, prefix, conditioning), model.denoise(canvas, others)]
        narrow = Narrow((1, canvas.shape[1]), canvas.shape[1])  # the first one's other keys are those of the line above
        found.append(model.denoise(narrow.take(canvas), others, narrow.take(conditioning), narrow=narrow))
        return found

    expected = states()
    model.uses_kernels = True
    for a, b in zip(states(), expected):
        assert mx.abs(a - b).max() < 1e-4
    model.train()
    for a, b in zip(states(), expected):
        assert mx.array_equal(a, b)  # training takes the plain way


def test_with_kernels_experts_are_mixed_before_ranks_are_summed(monkeypatch):
    """A group of two whose other rank holds zeros: sums change nothing."""

    class BesideZeros(Group):
        def sum(self, x):
            summed.append(x.shape[-1])
            return x

    monkeypatch.setattr(experts, "uses_padded_runs", lambda rows=0: True)
    model, summed = small_model(4), []
    model.eval()
    model.uses_kernels = True
    canvas, prefix = random_tokens(2, 1, 4), model.new_prefix()
    expected = model.denoise(canvas, prefix)
    group = BesideZeros()
    group.size = 2
    for layer in model.model.decoder.layers:
        layer._group = group
    assert mx.abs(model.denoise(canvas, prefix) - expected).max() < 1e-5
    assert summed == [16, 32] * 3


@pytest.mark.parametrize("length", [11, 16])
def test_kernels_with_masks_of_their_own(monkeypatch, length):
    """Pictures' spans, left padding and passes that are only looked at, whether or not keys fill whole tiles."""
    model = small_model(4, layers=(SLIDING, FULL, SLIDING, FULL))
    model.config = replace(model.config, image_token_id=39)
    model.eval()
    tokens, features = np.array(random_tokens(0, 2, length)) % 39, draw(5, 4, 16)
    tokens[:, 3:5] = 39
    padding = np.arange(length) >= np.array([[0], [2]])

    def states():
        pictures, padded, looked = model.new_prefix(2), model.new_prefix(2), model.new_prefix()
        found = [model.encode(mx.array(tokens), pictures, features=features)]
        found.append(model.encode(mx.array(tokens), pictures, features=features))
        found.append(model.encode(mx.array(tokens % 38), padded, mask=padding)[:, 2:])
        found += [model.encode(mx.array(tokens % 38), padded), model.denoise(random_tokens(2, 2, 4), padded)]
        model.encode(mx.array(tokens[:1] % 38), looked)
        for size in (1, 3, 5):
            found.append(model.encode_ahead(random_tokens(3, 1, size), [looked]))
            looked.accept(size)
        return found

    expected = states()
    model.uses_kernels = True
    for a, b in zip(states(), expected):
        assert mx.abs(a - b).max() < 1e-4


def test_a_traced_pass_with_kernels(monkeypatch):
    """Its softmax is told the number of keys by an array."""
    monkeypatch.setattr(mx, "compile", lambda function: function)
    model = small_model(4, layers=(SLIDING, FULL))
    model.eval()

    def states():
        prefix, found = model.new_prefix(), []
        model.encode(random_tokens(0, 1, 2), prefix)
        for _ in range(6):  # the window is 5
            found.append(model.encode_ahead(random_tokens(3, 1, 1), [prefix]))
            prefix.accept(1)
        return mx.concatenate(found)

    expected, model.uses_kernels = states(), True
    model.trace_tokens()
    assert mx.abs(states() - expected).max() < 1e-4 and model.token_pass.trusted


def test_replayed_layers_with_kernels(monkeypatch):
    """Behind a full ring a trace serves every offset; tokens ahead are traced, alone and in rows."""
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    monkeypatch.setattr(kv_cache, "BUFFER_STEP", 16)
    model = small_model(4, layers=(SLIDING, SLIDING, FULL))
    model.eval()
    model.uses_kernels = True

    def states():
        prefix, found = model.new_prefix(), []
        model.encode(random_tokens(0, 1, 7), prefix)  # the window is 5
        for seed in range(2):
            found += [model.denoise(random_tokens(seed, 1, 4), prefix)]
            model.encode(random_tokens(0, 1, 4), prefix)
        other = prefix.fork()
        for size in (1, 3):
            found += [model.encode_ahead(random_tokens(size, 2, size), [prefix, other])]
            prefix.accept(1)
            other.accept(size)
        return [*found, *prefix.state, *other.state]

    expected = states()
    model.trace_layers()
    assert all(mx.array_equal(a, b) for a, b in zip(states(), expected, strict=True))
    kinds = [key[0] for key in model.layer_traces._traces]
    assert kinds.count(0) == 1 + 1  # sliding layers: of all canvases, and of one token ahead; three pass the window
    assert kinds.count(1) == 2 + 2  # full layers


def test_kernels_are_used_where_they_agree_and_else_refused_aloud(monkeypatch):
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    model = small_model(4, layers=(SLIDING, FULL))
    build.choose_kernels(model)
    assert not model.uses_kernels  # on the CPU
    monkeypatch.setattr(build, "on_cpu", lambda: False)
    build.choose_kernels(model)
    assert model.uses_kernels and model.layer_traces._traces
    monkeypatch.setattr(mx, "compile", lambda function, **_: lambda *given: (-(made := function(*given))[0], *made[1:]))
    with pytest.warns(UserWarning, match=r"^Traced layers are not used, .* \(they compute something else here\)"):
        build.choose_kernels(model)
    assert model.uses_kernels and model.layer_traces is None
    right = kernels.route
    monkeypatch.setattr(kernels, "route", lambda scores, scales, k: right(-scores, scales, k))
    with pytest.warns(UserWarning, match=r"^Custom kernels are not used, .* \(they compute something else here\)"):
        build.choose_kernels(model)
    assert not model.uses_kernels

    monkeypatch.setattr(kernels, "route", right)
    model = small_model(4, layers=(SLIDING, FULL), global_head_dim=64)
    unpacked, model.kv_bits = kernels.unpack, 8
    build.choose_kernels(model)
    assert model.uses_kernels
    monkeypatch.setattr(kernels, "unpack", lambda packed, size, *rest: unpacked((-packed[0], *packed[1:]), size, *rest))
    with pytest.warns(UserWarning, match="they compute something else here"):
        build.choose_kernels(model)
    assert not model.uses_kernels

    def broken(*_):
        raise RuntimeError("[metal::Device] Unable to load kernel route\nin a library")

    monkeypatch.setattr(kernels, "route", broken)
    with pytest.warns(UserWarning, match=r"\(\[metal::Device\] Unable to load kernel route\); please report it"):
        build.choose_kernels(model)
    assert not model.uses_kernels
