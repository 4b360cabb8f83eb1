"""The head in chunks of any size against full logits: float, 8-bit and mxfp4 embeddings."""

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from naive import two_levels
from support import FULL, gap, small_model

from mlx_dgemma.decoding import sampler
from mlx_dgemma.model import device, functions, head, tiling

T = 0.7
KINDS = ["float32", "8bit", "mxfp4", "bfloat16"]
SIZES = [(40, 1), (40, 40), (1000, 1), (1000, 3), (5000, 3), (5000, 64)]  # vocabulary, tokens of a tile


@lru_cache(maxsize=8)
def model_of(kind, vocab):
    model = small_model(vocab, layers=(FULL,), vocab_size=vocab, hidden_size=64)
    packed = {"8bit": {"bits": 8, "group_size": 64}, "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}
    if kind in packed:
        nn.quantize(model, class_predicate=lambda _, module: isinstance(module, nn.Embedding), **packed[kind])
    if kind == "bfloat16":
        model.set_dtype(mx.bfloat16)
    return model


def states(model, rows=2, seed=0):
    """[rows, 4, H]: the first position of a row is certain, the second nearly, the third and fourth are not."""
    table = model.model.decoder.embed_tokens
    tokens = mx.random.randint(0, model.config.text.vocab_size, (rows, 4), key=mx.random.key(seed))
    noise = mx.random.normal((rows, 4, 64), key=mx.random.key(seed + 100))
    mine, other = mx.array([2, 0.7, 0.25, 0])[:, None], mx.array([0.1, 0.2, 0.3, 0.05])[:, None]
    return (table(tokens).astype(mx.float32) * mine + noise * other).astype(model.dtype)


def keys_of(*seeds):
    return mx.stack([mx.random.key(seed) for seed in seeds])


def f64(array):
    return np.array(array.astype(mx.float32), np.float64)


def rows_of(model):
    """The embedding table in float64."""
    return f64(model.model.decoder.embed_tokens(mx.arange(model.config.text.vocab_size)))


def full_logits(model, hidden):
    return model.logits(hidden) / T


def wide(logits, dtype=None):
    """Log-probabilities in float64, of logits that are first rounded to `dtype` if one is given."""
    if dtype is not None:
        logits = logits.astype(dtype)
    logits = f64(logits)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def sizes_of_chunks(vocab, tall, positions):
    """`nbytes` for one block at once, for two, three, and for the full vocabulary."""
    return [4 * tall * tiling.STRIDE * positions * blocks for blocks in (0, 1, 2, 3, 10**4)]


@pytest.fixture(params=SIZES, ids=lambda size: "x".join(map(str, size)))
def size(request, monkeypatch):
    """Vocabulary and tokens of a tile."""
    vocab, tall = request.param
    monkeypatch.setattr(tiling, "TILES", vocab // tall)
    assert tiling.tile_size(vocab) == tall
    return vocab, tall


def test_tiles_depend_on_the_vocabulary_alone():
    assert [tiling.tile_size(vocab) for vocab in (40, 4095, 8191, 8192, 262_144)] == [1, 1, 1, 2, 64]


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 7, 100])
def test_chunks_are_multiples_of_a_block_and_cover_the_vocabulary(size, blocks):
    vocab, tall = size
    block = tall * tiling.STRIDE
    found = list(tiling.vocab_chunks(vocab, 8, 4 * block * 8 * blocks + 3))
    assert [token for chunk in found for token in range(*chunk)] == list(range(vocab))
    assert all(end - start == max(blocks, 1) * block for start, end in found[:-1])
    assert found[-1][1] - found[-1][0] <= max(blocks, 1) * block


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_the_table_multiplies_like_its_rows(kind):
    model = model_of(kind, 1000)
    hidden = states(model)
    rows = model.model.decoder.embed_tokens(mx.arange(130, 997)).astype(mx.float32)
    close = 0.02 if kind == "bfloat16" else 1e-5  # of its largest
    across = head.matmul_slice(model.model.decoder.embed_tokens, hidden, 130, 997)
    assert gap(across, hidden.astype(mx.float32) @ rows.T) < close * mx.abs(across).max().item()
    p = mx.softmax(mx.random.normal((2, 4, 867), key=mx.random.key(1)), axis=-1).astype(model.dtype)
    back = head.matmul_slice(model.model.decoder.embed_tokens, p, 130, 997, transpose=False)
    assert gap(back, p.astype(mx.float32) @ rows) < close * mx.abs(back).max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
def test_a_prediction_equals_that_of_full_logits_whatever_the_chunks(kind, size, full):
    vocab, tall = size
    model = model_of(kind, vocab)
    hidden, keys = states(model), keys_of(3, 4)
    logits = full_logits(model, hidden)
    log_p = wide(logits)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    expected = [two_levels(logits[row], keys[row], tiling.TILES) for row in range(2)]
    low = np.logaddexp.reduce(f64(logits.astype(model.dtype)), axis=-1)
    for nbytes in sizes_of_chunks(vocab, tall, 8):
        prediction = model.head.predict(hidden, T, keys, full, nbytes)
        assert prediction.argmax.dtype == prediction.sample.dtype == mx.int32
        assert prediction.argmax.tolist() == mx.argmax(logits, axis=-1).tolist()
        assert np.abs(np.array(prediction.entropy) - entropy).max() < 1e-5
        accepted = sampler.accept(prediction.entropy, 0.5)
        assert accepted.tolist() == sampler.accept(functions.entropy(logits), 0.5).tolist()
        assert np.abs(np.array(prediction.confidence) / np.exp(log_p.max(-1)) - 1).max() < 1e-5
        assert np.abs(np.array(prediction.logsumexp) - low).max() < 1e-5
        assert prediction.sample.tolist() == expected
    assert entropy.min() < 0.01 < 0.9 * np.log(vocab) < entropy.max()


def best_of_tiles(logits, tall):
    """The best tokens [likely] of the best tiles of logits [V]."""
    block = tall * tiling.STRIDE
    tiles = [
        range(b + j, min(b + block, len(logits)), tiling.STRIDE)
        for b in range(0, len(logits), block)
        for j in range(tiling.STRIDE)
    ]
    best = [max(tile, key=logits.__getitem__) for tile in tiles if tile]
    return sorted(best, key=lambda token: -logits[token])[: tiling.TOP_TOKENS]


@pytest.mark.parametrize("kind", KINDS)
def test_likely_tokens_are_the_best_of_the_best_tiles(kind, size, monkeypatch):
    """And `needs_full_vocab` is true where they leave out more than `TAIL`."""
    vocab, tall = size
    model = model_of(kind, vocab)
    hidden = states(model)
    prediction = model.head.predict(hidden, T, keys_of(3, 4), nbytes=0)
    logits, p = np.array(full_logits(model, hidden)), np.exp(wide(full_logits(model, hidden), model.dtype))
    left_out = np.zeros((2, 4))
    for at in np.ndindex(2, 4):
        best = best_of_tiles(logits[at], tall)
        left_out[at] = 1 - p[at][best].sum()
        found, probability = np.array(prediction.top_tokens[at]), np.array(prediction.top_probs[at])
        real = found < vocab  # the padding of the last tiles has no probability
        assert (probability[~real] == 0).all()
        assert np.allclose(probability[real], p[at][found[real]], rtol=1e-4, atol=0)
        # Tokens with equal logits may be swapped.
        assert sorted(logits[at][found[real]], reverse=True) == pytest.approx(logits[at][best].tolist(), abs=1e-5)
        assert abs(probability.sum() - p[at][best].sum()) < 1e-5
    assert (left_out > 1e-3).any()
    for tail in left_out.flatten():
        for bound in (tail - 3e-6, tail + 3e-6):
            monkeypatch.setattr(head, "TAIL", bound)
            assert np.array(prediction.needs_full_vocab).tolist() == (left_out > bound).tolist()


def test_samples_follow_the_softmax(monkeypatch):
    """150 tokens in 64 tiles of two or three, so that both levels of the draw matter."""
    monkeypatch.setattr(tiling, "TILES", 50)
    model, count = model_of("float32", 150), 10_000
    hidden = mx.random.normal((1, 1, 64), key=mx.random.key(5)) * 0.12
    p = np.exp(wide(full_logits(model, hidden))[0, 0])
    prediction = model.head.predict(mx.broadcast_to(hidden, (1, count, 64)), T, keys_of(1))
    seen = np.bincount(np.array(prediction.sample)[0], minlength=150)
    assert len(seen) == 150
    assert p.min() * count > 5
    assert p.max() > 5 * p.min()
    assert ((seen - count * p) ** 2 / (count * p)).sum() < 207  # 149 degrees of freedom, one key in a thousand
    drawn = np.array(prediction.sample)[0]
    assert abs((drawn[1:] == drawn[:-1]).mean() - (p**2).sum()) < 0.004  # and positions are independent


def test_many_samples_are_those_of_full_logits_whatever_the_chunks(monkeypatch):
    """So many samples that some win by a small difference."""
    monkeypatch.setattr(tiling, "TILES", 300)
    model, keys = model_of("float32", 1000), keys_of(8)
    hidden = mx.random.normal((1, 600, 64), key=mx.random.key(2)) * 0.1
    expected = two_levels(full_logits(model, hidden)[0], keys[0], 300)
    for nbytes in sizes_of_chunks(1000, 3, 600):
        assert model.head.predict(hidden, T, keys, nbytes=nbytes).sample.tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_equal_rows_alone(kind, monkeypatch):
    monkeypatch.setattr(tiling, "TILES", 300)
    model = model_of(kind, 1000)
    hidden = states(model, rows=3)
    together = model.head.predict(hidden, T, keys_of(4, 5, 6), True, nbytes=0)
    for row, seed in enumerate((4, 5, 6)):
        alone = model.head.predict(hidden[row : row + 1], T, keys_of(seed), True, nbytes=0)
        assert together.argmax[row].tolist() == alone.argmax[0].tolist()
        assert together.sample[row].tolist() == alone.sample[0].tolist()
        assert gap(together.entropy[row], alone.entropy[0]) < 1e-5
        assert gap(together.condition(model.head, 0)[row], alone.condition(model.head, 0)[0]) < (
            0.05 if kind == "bfloat16" else 1e-4
        )


def test_a_sample_depends_on_its_rows_key_alone():
    model = model_of("float32", 1000)
    same = mx.broadcast_to(mx.random.normal((1, 1, 64), key=mx.random.key(0)) * 0.1, (2, 30, 64))
    first, second = model.head.predict(same, T, keys_of(4, 5)).sample.tolist()
    assert first != second
    assert len(set(first)) > 15  # the positions of a row draw independently
    assert model.head.predict(same, T, keys_of(5, 4)).sample.tolist() == [second, first]


# Conditioning.


def near(model, positions):
    """A bound for the rounding of an expected embedding, relative to its largest value."""
    return {mx.bfloat16: 0.02, mx.float32: 1e-5}[model.dtype] * mx.abs(positions).max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["full", "second pass", "larger second pass", "all"])
def test_conditioning_is_exact_where_the_full_vocabulary_is_needed_and_within_the_tail_elsewhere(kind, size, way):
    vocab, tall = size
    model = model_of(kind, vocab)
    hidden = states(model)
    dense = model.condition(full_logits(model, hidden))
    bound = head.TAIL * 8 * np.linalg.norm(rows_of(model), axis=-1).max()
    for nbytes in sizes_of_chunks(vocab, tall, 8):
        prediction = model.head.predict(hidden, T, keys_of(3, 4), way == "full", nbytes)
        diffuse = np.array(prediction.needs_full_vocab)
        assert 0 < diffuse.sum() < 8
        room = {"second pass": int(diffuse.sum()), "larger second pass": int(diffuse.sum()) + 1, "all": 8}.get(way, 0)
        got = prediction.condition(model.head, room, nbytes)
        assert got.dtype == model.dtype
        off = f64(got) - f64(dense)
        assert np.abs(off[diffuse]).max() < near(model, dense)
        assert np.linalg.norm(off[~diffuse], axis=-1).max() < bound + 8 * near(model, dense)


def test_no_bools_are_sorted(monkeypatch):
    """Metal has no kernel that sorts bools."""
    sort, seen = mx.argsort, []
    monkeypatch.setattr(mx, "argsort", lambda a, *rest, **named: seen.append(a.dtype) or sort(a, *rest, **named))
    model = model_of("float32", 1000)
    prediction = model.head.predict(states(model), T, keys_of(3, 4))
    mx.eval(prediction.condition(model.head, 4))
    assert seen and mx.bool_ not in seen


def test_what_the_tail_leaves_out_is_bounded(monkeypatch):
    """With a large `TAIL`, so that the bound is far above rounding errors."""
    model = model_of("float32", 1000)
    monkeypatch.setattr(head, "TAIL", 0.2)
    hidden = states(model, rows=16)
    prediction = model.head.predict(hidden, T, keys_of(*range(16)))
    left_out = 1 - np.array(prediction.top_probs, np.float64).sum(-1)
    off = np.array(prediction.condition(model.head, 0) - model.condition(full_logits(model, hidden)), np.float64)
    norms = np.linalg.norm(off, axis=-1)
    largest = 8 * np.linalg.norm(rows_of(model), axis=-1).max()
    sparse = ~np.array(prediction.needs_full_vocab)
    assert left_out[sparse].max() > 0.02
    assert (norms[sparse] <= left_out[sparse] * largest + 1e-4).all()
    assert norms[sparse].max() <= 0.2 * largest
    assert norms[sparse].max() > 0.01  # something was left out


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_of_a_certain_position_does_not_depend_on_the_others(kind):
    model = model_of(kind, 1000)
    hidden = states(model)
    prediction, summed = (model.head.predict(hidden, T, keys_of(3, 4), full) for full in (False, True))
    sure = ~np.array(prediction.needs_full_vocab)
    at = mx.array(np.flatnonzero(sure))
    plain = prediction.condition(model.head, 0).reshape(8, -1)[at]
    for other in (
        prediction.condition(model.head, 5),
        prediction.condition(model.head, 8),
        summed.condition(model.head, 0),
    ):
        assert gap(other.reshape(8, -1)[at], plain) == 0
    # A batch of the certain positions alone needs no second pass.
    alone = model.head.predict(hidden.reshape(1, 8, -1)[:, at], T, keys_of(3))
    assert not alone.needs_full_vocab.any().item()
    assert gap(alone.condition(model.head, 0)[0], plain) <= near(model, plain)
    assert gap(alone.condition(model.head, len(at)), alone.condition(model.head, 0)) == 0


@pytest.mark.parametrize("likely", [32, 1])
def test_conditioning_follows_logits_rounded_to_bfloat16(monkeypatch, likely):
    """As in the reference. Logits above 16 are rounded to eighths, which changes the shares of two tokens."""
    monkeypatch.setattr(tiling, "TOP_TOKENS", likely)  # with a single one every position needs the full vocabulary
    model = model_of("bfloat16", 1000)
    pairs = mx.random.randint(0, 1000, (2, 4, 2), key=mx.random.key(1))
    hidden = model.model.decoder.embed_tokens(pairs).sum(axis=-2)
    rounded, plain = (wide(full_logits(model, hidden), dtype) for dtype in (mx.bfloat16, None))
    table = rows_of(model)

    def near_the_rounded(got, scale):
        one, other = (np.abs(f64(got) - np.exp(p) @ table * scale).max() for p in (rounded, plain))
        return one < other / 3

    for full in (False, True):
        prediction = model.head.predict(hidden, T, keys_of(3, 4), full)
        assert bool(prediction.needs_full_vocab.all().item()) == (likely == 1)
        of = np.take_along_axis(rounded, np.array(prediction.top_tokens), axis=-1)
        assert np.allclose(np.array(prediction.top_probs), np.exp(of), rtol=1e-4, atol=0)
        assert near_the_rounded(prediction.condition(model.head, 8), 8)
        assert not full or near_the_rounded(prediction.expected_embedding, 1)
        assert np.abs(np.array(prediction.confidence) - np.exp(plain).max(-1)).max() < 1e-5  # of unrounded logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_prediction_is_made_of_plain_functions(kind):
    model = model_of(kind, 1000)
    hidden, keys = states(model), keys_of(3, 4)
    logits = full_logits(model, hidden)
    prediction = model.head.predict_full(hidden, T, keys)
    assert prediction.argmax.dtype == mx.int32
    assert prediction.argmax.tolist() == mx.argmax(logits, axis=-1).tolist()
    assert gap(prediction.entropy, functions.entropy(logits)) == 0
    for row in range(2):
        noise = mx.random.gumbel((4, 1000), key=keys[row])
        assert prediction.sample[row].tolist() == mx.argmax(logits[row] + noise, axis=-1).tolist()
    assert gap(prediction.condition(model.head, 0), model.condition(logits)) == 0
    assert prediction.needs_full_vocab.shape == (2, 4)
    assert not prediction.needs_full_vocab.any().item()
    assert list(prediction.stages) == prediction.carried == []


# Memory.


@pytest.mark.parametrize("full", [False, True])
def test_no_array_of_positions_by_vocabulary_is_made(monkeypatch, full):
    """A prediction and its conditioning, evaluated in stages, take far less memory than full logits."""
    monkeypatch.setattr(tiling, "TILES", 512)
    monkeypatch.setattr(tiling, "STRIDE", 8)
    monkeypatch.setattr(device, "SOFT_LIMIT", 2**20)
    model, positions, vocab = model_of("float32", 65_536), 128, 65_536
    hidden = mx.random.normal((1, positions, 64), key=mx.random.key(0)) * 0.1
    keys = keys_of(0)
    mx.eval(hidden, keys)

    def peak(nbytes):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        prediction, queue = model.head.predict(hidden, T, keys, full, nbytes), device.Queue()
        queue.add(*prediction.stages, prediction.carried)
        queue.finish()
        mx.eval(prediction.condition(model.head, positions, nbytes))
        return mx.get_peak_memory() - before

    logits = 4 * positions * vocab
    assert peak(0) < logits / 5
    assert peak(logits) > logits
