"""Attention by groups of queries against attention in one piece; masks of ranges of keys against masks of all keys."""

import traceback

import mlx.core as mx
import numpy as np
import pytest
from support import FULL, SLIDING, gap, random_tokens, small_config, small_model

from mlx_dgemma.model import attention, device
from mlx_dgemma.model.attention import Attention, attend
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.masks import Mask


@pytest.fixture
def grouped(monkeypatch):
    """A function that makes attention take at most so many queries at once."""

    def force(queries):
        monkeypatch.setattr(attention, "SCORE_BYTES", 1)
        monkeypatch.setattr(attention, "queries_at_once", lambda _: queries)

    return force


def masks(batch, length, count, seed):
    """Masks of all kinds for `length` queries after `count - length` earlier positions, in full and sliding layers."""
    random, earlier = np.random.default_rng(seed), count - length
    at, queries = np.arange(count), np.arange(earlier, count)
    spans = np.repeat(random.integers(0, 3, (batch, length)), 2, axis=1)[:, :length].astype(np.int32)
    padding = random.integers(0, count, batch).astype(np.int32)
    padding[0] = 0
    ring = np.concatenate([np.roll(at[:earlier], 2), queries])
    window = max(2, count // 3)
    near = at[at > earlier - window]
    return {
        "canvas": Mask(at),
        "padded canvas": Mask(ring, padding=np.minimum(padding, earlier)),
        "causal": Mask(at, queries),
        "causal, padded": Mask(at, queries, padding=padding),
        "causal, spans": Mask(at, queries, spans=spans),
        "causal, spans, padded": Mask(at, queries, padding=padding, spans=spans),
        "sliding": Mask(near, queries, window),
        "sliding, unordered": Mask(ring, queries, window),
        "sliding, spans, padded": Mask(ring, queries, window, padding, spans),
        "sliding, all in the window": Mask(at, queries, 2 * count),
    }


def visible(mask, batch, length, row, i, j):
    """Whether query i may attend to key j, by the definition of the mask."""
    key = mask.keys[j]
    padding = mask.padding[row % len(mask.padding)]
    if mask.queries is None:
        return key >= padding
    query = mask.queries[i]
    seen = key <= query and (mask.window is None or key > query - mask.window)
    new = j - (len(mask.keys) - length)
    if mask.spans is not None and new >= 0:
        seen |= mask.spans[row, i] == mask.spans[row, new] > 0
    return seen and (key >= padding or key == query)


def table(mask, batch, length):
    return np.array(
        [
            [[visible(mask, batch, length, row, i, j) for j in range(len(mask.keys))] for i in range(length)]
            for row in range(batch)
        ]
    )


def plain(queries, keys, values, seen):
    """Softmax attention in float64, head by head."""
    queries, keys, values = (np.array(a.astype(mx.float32), np.float64) for a in (queries, keys, values))
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat(group, axis=1), values.repeat(group, axis=1)
    scores = np.where(seen[:, None], queries @ keys.swapaxes(-1, -2), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True) @ values


def draw(batch, heads, kv_heads, length, count, dim=8, dtype=mx.float32):
    shapes = (batch, heads, length, dim), (batch, kv_heads, count, dim), (batch, kv_heads, count, dim)
    return [mx.random.normal(s, key=mx.random.key(i)).astype(dtype) for i, s in enumerate(shapes)]


SHAPES = [(1, 4, 2, 6, 23), (3, 4, 1, 5, 17), (2, 2, 2, 1, 9), (2, 6, 2, 8, 8), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "count"), SHAPES)
def test_a_mask_of_ranges_is_the_mask_of_all_keys(batch, heads, kv_heads, length, count):
    for name, mask in masks(batch, length, count, 1).items():
        seen = table(mask, batch, length)
        whole = len(mask.keys)
        for start, end in {(0, whole), (0, 1), (whole - 1, whole), (whole // 3, whole - whole // 3), (0, whole // 2)}:
            if start == end:
                continue
            part = mask.of_keys(start, end)
            expected = seen[:, :, start:end]
            assert (part is None) == expected.all() or name.startswith(("causal, spans", "sliding, spans")), name
            if part is not None:
                assert np.array_equal(np.broadcast_to(np.array(part)[:, 0], expected.shape), expected), name
        if isinstance(mask.all_keys, str):
            assert mask.all_keys == "causal"
            assert np.array_equal(seen[0], np.tri(length, count, count - length, dtype=bool)), name
        else:
            assert (mask.all_keys is None) == (mask.of_keys(0, whole) is None), name


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "count"), SHAPES)
def test_attention_in_groups_equals_a_plain_loop(grouped, batch, heads, kv_heads, length, count, group):
    for name, mask in masks(batch, length, count, group).items():
        queries, k, v = draw(batch, heads, kv_heads, length, len(mask.keys))
        expected = plain(queries, k, v, table(mask, batch, length))
        with pytest.MonkeyPatch.context() as once:
            once.setattr(attention, "SCORE_BYTES", 2**40)
            assert np.abs(np.array(attend(queries, k, v, mask)) - expected).max() < 1e-5, name
        grouped(group)
        assert np.abs(np.array(attend(queries, k, v, mask)) - expected).max() < 1e-5, name


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_groups_keep_the_dtype_and_its_precision(grouped, spread):
    """Scores of several hundred, whose exponentials are infinite without a running maximum."""
    queries, keys, values = draw(1, 4, 2, 6, 90, dtype=mx.bfloat16)
    queries = queries * spread
    mask = Mask(np.arange(90), np.arange(84, 90))
    expected = plain(queries, keys, values, table(mask, 1, 6))
    one = attend(queries, keys, values, mask)
    grouped(2)
    several = attend(queries, keys, values, mask)
    assert several.dtype == one.dtype == mx.bfloat16
    errors = [np.abs(np.array(a.astype(mx.float32)) - expected).max() for a in (one, several)]
    assert errors[1] < max(1.5 * errors[0], 0.02)


def test_scores_within_the_budget_are_computed_in_one_piece(monkeypatch):
    """One byte less than the scores need, and queries come in groups, each with the keys that it may see."""
    arrays, mask = draw(2, 4, 2, 300, 5000), Mask(np.arange(5000), np.arange(4700, 5000))
    seen = []
    unfused = attention._unfused

    def watched(queries, keys, values, visible=None):
        seen.append((queries.shape[2], keys.shape[2], None if visible is None else visible.shape[-1]))
        return unfused(queries, keys, values, visible)

    monkeypatch.setattr(attention, "_unfused", watched)
    needed = 2 * 4 * 300 * 5000 * 4
    monkeypatch.setattr(attention, "SCORE_BYTES", needed)
    attend(*arrays, mask)
    assert seen == []  # one call of MLX's own
    monkeypatch.setattr(attention, "SCORE_BYTES", needed - 1)
    attend(*arrays, mask)
    assert seen == [(288, 4988, 287), (12, 5000, 11)]  # by sixteens
    seen.clear()
    monkeypatch.setattr(attention, "SCORE_BYTES", needed // 3)
    attend(*arrays, mask)
    assert seen == [(96, 4796, 95), (96, 4892, 95), (96, 4988, 95), (12, 5000, 11)]
    seen.clear()
    attend(*arrays, Mask(np.arange(5000)))
    assert seen == [(96, 5000, None)] * 3 + [(12, 5000, None)]


def peak(queries, keys, values):
    mask = Mask(np.arange(keys.shape[2]))
    mx.eval(queries, keys, values)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    stages = []
    found = attend(queries, keys, values, mask, stages)
    queue = device.Queue()
    queue.add(*stages, found)
    del stages
    queue.finish()
    return mx.get_peak_memory() - before


def test_groups_and_waiting_bound_the_peak(monkeypatch):
    """64 MiB of scores in groups of 1 MiB: a few groups are in memory at once."""
    arrays = draw(1, 4, 1, 64, 65536)
    assert peak(*arrays) >= 2**26
    monkeypatch.setattr(attention, "SCORE_BYTES", 2**20)
    monkeypatch.setattr(device, "SOFT_LIMIT", 2**20)
    assert peak(*arrays) < 6 * 2**20


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("kinds", [(SLIDING, FULL, SLIDING, FULL), (FULL, FULL)])
def test_a_model_in_groups_gives_the_same_logits(grouped, kinds, group):
    """With grouped prefill, padded rows, rings that wrapped, an image span, a commit and a conditioned canvas."""
    model = small_model(4, layers=kinds)
    tokens, more, canvas = random_tokens(0, 3, 21), random_tokens(1, 3, 6), random_tokens(2, 3, 4)
    padded = np.arange(21)[None] >= np.array([[0], [13], [20]])
    spans = np.zeros((3, 9), np.int32)
    spans[0, 2:6], spans[1, 4:9], spans[2, :3] = 1, 1, 1
    conditioning = mx.random.normal((3, 4, 16), key=mx.random.key(0))

    def logits():
        prefix = model.new_prefix(3)
        hidden = [model.encode(tokens[:, a:b], prefix, mask=padded[:, a:b]) for a, b in ((0, 2), (2, 12))]
        prefix.pad(padded[:, 12:])
        embedded = model._embed(tokens[:, 12:])
        hidden.append(model._run(embedded, [prefix], [prefix.encode_masks(9, spans)], encoder=True, canvas=False))
        prefix.offset += 9
        first = model.denoise(canvas, prefix)
        hidden.append(model.encode(more, prefix))
        seen = mx.concatenate([*hidden, first, model.denoise(canvas, prefix, conditioning)], axis=1)
        return model.logits(seen)

    expected = logits()
    grouped(group)
    assert gap(logits(), expected) < 1e-4


@pytest.mark.parametrize("budget", [2**40, 1])
def test_attention_is_computed_in_the_fifth_frame_from_denoise(monkeypatch, budget):
    """In one piece and in groups, for a batch and for rows with prefixes of their own."""
    model, seen = small_model(4), set()

    def watch(module, name):
        function = getattr(module, name)

        def watched(*arguments, **named):
            frames = [frame.name for frame in traceback.extract_stack()[:-1]]
            if "denoise" in frames:
                seen.add((name, *frames[frames.index("denoise") :]))
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, watched)

    monkeypatch.setattr(attention, "SCORE_BYTES", budget)
    watch(mx.fast, "scaled_dot_product_attention")
    watch(attention, "_unfused")
    prefixes = [model.new_prefix(), model.new_prefix()]
    for prefix in prefixes:
        model.encode(random_tokens(0, 1, 7), prefix)
    model.denoise(random_tokens(1, 1, 4), prefixes[0])
    model.denoise(random_tokens(1, 2, 4), prefixes)
    whole = "denoise", "_run", "__call__", "__call__", "attend"
    by_groups = ("_unfused", *whole, "_in_groups", "of_group")
    assert seen == {by_groups if budget == 1 else ("scaled_dot_product_attention", *whole)}


@pytest.mark.parametrize(
    ("dim", "share", "pairs"), [(16, 0.33, 2), (20, 0.25, 2), (8, 0.125, 0), (16, 0.25, 2), (16, 0, 0), (16, 1, 8)]
)
def test_an_odd_count_of_rotated_dimensions_is_rounded_down(dim, share, pairs):
    """As in Transformers; the custom kernels and MLX's RoPE turn the same pairs."""
    full = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": share}
    rope = {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: full}
    config = ModelConfig.from_dict(small_config(global_head_dim=dim, rope_parameters=rope)).text
    frequencies = config.rope_frequencies(FULL)
    assert np.count_nonzero(frequencies) == pairs
    x = np.random.default_rng(0).normal(size=(1, 1, 3, dim)).astype(np.float32)
    a, b = np.split(x, 2, axis=-1)
    angles = np.arange(7, 10)[:, None] * frequencies
    turned = np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)
    assert gap(Attention(config, FULL)._rope(mx.array(x), offset=7), mx.array(turned.astype(np.float32))) < 1e-5
