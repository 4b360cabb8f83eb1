"""Random draws and entropy, against float64 and the distributions that they should follow."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.model import functions, rng


def keys_of(*seeds):
    return mx.stack([mx.random.key(seed) for seed in seeds])


def test_entropy_equals_float64():
    logits = np.random.default_rng(0).normal(size=(2, 5, 300)).astype(np.float32) * 6
    wide = logits.astype(np.float64)
    log_p = (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )
    expected = -(np.exp(log_p) * log_p).sum(-1)
    got = np.array(functions.entropy(mx.array(logits)))
    assert got.shape == (2, 5)
    assert np.abs(got - expected).max() < 1e-5


def test_entropy_of_one_token_and_of_a_uniform_distribution():
    certain = mx.where(mx.arange(2048) == 3, 75.0, -75.0)
    values = functions.entropy(mx.stack([certain, mx.full((2048,), 7.0)])[None])[0].tolist()
    assert values == pytest.approx([0.0, math.log(2048)], abs=5e-4)


def test_samples_follow_the_distribution():
    p = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    count = 20000
    logits = mx.broadcast_to(mx.array(np.log(p).astype(np.float32)), (1, count, 5))
    drawn = np.array(rng.sample(logits, keys_of(7)))[0]
    chi = ((np.bincount(drawn, minlength=5) - count * p) ** 2 / (count * p)).sum()
    assert chi < 18.5  # 4 degrees of freedom: exceeded once in a thousand keys


def test_a_sample_depends_on_its_rows_key_alone():
    logits = mx.random.normal((3, 6, 50), key=mx.random.key(0))
    together = rng.sample(logits, keys_of(4, 5, 6))
    assert together.dtype == mx.int32
    for row, seed in enumerate((4, 5, 6)):
        assert together[row].tolist() == rng.sample(logits[row : row + 1], keys_of(seed))[0].tolist()
    same = mx.broadcast_to(logits[:1], (2, 6, 50))
    first, second = rng.sample(same, keys_of(4, 5)).tolist()
    assert first != second


def test_positions_of_a_sample_are_independent():
    drawn = np.array(rng.sample(mx.zeros((1, 4000, 2)), keys_of(3)))[0]
    assert abs((drawn[1:] == drawn[:-1]).mean() - 0.5) < 0.04


def test_noise_is_uniform_over_the_vocabulary_and_depends_on_its_rows_key_alone():
    drawn = np.array(rng.noise(20000, 8, keys_of(1, 2)))
    assert drawn.dtype == np.int32
    assert drawn.shape == (2, 20000)
    for row in drawn:
        counts = np.bincount(row, minlength=8)
        assert len(counts) == 8  # tokens 0 to 7
        assert ((counts - 2500) ** 2 / 2500).sum() < 24.4  # 7 degrees of freedom, one key in a thousand
    assert drawn[1].tolist() == rng.noise(20000, 8, keys_of(2))[0].tolist()
    assert drawn[0].tolist() != drawn[1].tolist()


def test_split_keys_differ_and_depend_on_their_row_alone():
    parts = rng.split(keys_of(1, 2), 5)
    assert parts.shape == (5, 2, 2)
    assert parts.dtype == mx.uint32
    assert parts[:, 1].tolist() == rng.split(keys_of(2), 5)[:, 0].tolist()
    assert parts[:, 0].tolist() == mx.random.split(mx.random.key(1), 5).tolist()
    assert len({tuple(key) for key in parts.reshape(-1, 2).tolist()}) == 10
