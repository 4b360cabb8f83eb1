"""GPTQ for MLX's affine layout: packing, groups, and the columns' errors against a naive version."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.convert import Quantization
from mlx_dgemma.convert.rounding.gptq import gptq, prepare
from mlx_dgemma.convert.rounding.groups import fit, pack
from mlx_dgemma.convert.rounding.layers import nearest, values

BITS = (2, 3, 4, 5, 6, 8)
DAMPING = 0.01


def correlated(count: int, width: int, seed: int = 0) -> np.ndarray:
    """[count, width] inputs whose columns hang together and differ in size."""
    source = np.random.default_rng(seed)
    mixed = source.normal(size=(count, width)) @ source.normal(size=(width, width))
    return (mixed * np.exp(source.normal(size=width))).astype(np.float32)


def codes_of(packed: mx.array, bits: int) -> np.ndarray:
    """[O, I] codes, read from the stream of bits."""
    stream = np.unpackbits(np.array(packed).view(np.uint8), axis=-1, bitorder="little")
    return (stream.reshape(len(packed), -1, bits) << np.arange(bits)).sum(axis=-1)


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_where_mlx_puts_them(bits):
    weight = mx.random.normal((5, 192), key=mx.random.key(bits))
    packed, _, _ = mx.quantize(weight, group_size=64, bits=bits)
    codes = codes_of(packed, bits)
    assert codes.max() == 2**bits - 1
    assert mx.array_equal(pack(mx.array(codes.astype(np.uint32)), bits), packed)


def naive(weight: np.ndarray, moment: np.ndarray, scales: np.ndarray, biases: np.ndarray, levels: int) -> np.ndarray:
    """[O, I] codes: column by column, the greatest first, with the inverse of what is left of the moment; float64."""
    weight, moment = weight.astype(np.float64), moment.astype(np.float64)
    moment = moment / np.diag(moment).mean()
    inverse = np.linalg.inv(moment + DAMPING * np.eye(len(moment)))
    size, codes = weight.shape[1] // scales.shape[1], np.zeros(weight.shape, int)
    for k in np.argsort(-np.diag(moment), kind="stable"):
        scale, bias = scales[:, k // size], biases[:, k // size]
        codes[:, k] = np.clip(np.round((weight[:, k] - bias) / scale), 0, levels)
        error = (weight[:, k] - (codes[:, k] * scale + bias)) / inverse[k, k]
        weight -= error[:, None] * inverse[k]
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


def test_columns_carry_their_errors_as_a_naive_version_does():
    """Two matrices with moments of their own, and more columns than a block has."""
    weight = mx.random.normal((2, 6, 192), key=mx.random.key(1))
    inputs = [correlated(400, 192, seed) for seed in range(2)]
    moments = np.stack([x.T @ x for x in inputs])
    made = gptq(weight, prepare(mx.array(moments), DAMPING), Quantization(3, 64), mx.bfloat16)
    assert made.scales.dtype == made.biases.dtype == mx.bfloat16
    for i in range(2):
        scales, biases = (np.array(one[i].astype(mx.float32)) for one in made[1:])
        wanted = naive(np.array(weight[i]), moments[i], scales, biases, 7)
        found = codes_of(made.weight[i], 3)
        assert (found == wanted).mean() > 0.99  # float32 may fall to the other side of a tie, and what follows differs


@pytest.mark.parametrize("bits", BITS)
def test_outputs_keep_closer_than_with_the_nearest_codes(bits):
    inputs, how = correlated(500, 128), Quantization(bits, 32)
    weight = np.array(mx.random.normal((16, 128), key=mx.random.key(2)))
    made = gptq(mx.array(weight), prepare(mx.array(inputs.T @ inputs), DAMPING), how, mx.bfloat16)
    near = nearest(mx.array(weight), how, mx.bfloat16)
    far = [float(((inputs @ (weight - np.array(one)).T) ** 2).sum()) for one in (near, values(made, how))]
    assert far[1] < 0.6 * far[0]


def test_moments_of_nothing_and_equal_weights_stay_finite():
    weight = mx.concatenate([mx.zeros((2, 64)), mx.full((2, 64), 0.5)])
    made = gptq(weight, prepare(mx.zeros((64, 64)), DAMPING), Quantization(4, 32), mx.float16)
    assert mx.allclose(values(made, Quantization(4, 32)), weight, atol=1e-3)


def test_fitted_groups_are_no_worse_than_mlx_s_own():
    weight, share = mx.random.normal((8, 256), key=mx.random.key(3)), mx.ones((1, 256))
    scales, biases = (one[..., None] for one in fit(weight, share, 3, 64, mx.float32))
    groups = weight.reshape(8, 4, 64)
    codes = mx.clip(mx.round((groups - biases) / scales), 0, 7)
    near = nearest(weight, Quantization(3, 64), mx.float32).reshape(groups.shape)
    errors = [((one - groups) ** 2).sum(axis=-1) for one in (codes * scales + biases, near)]
    assert (errors[0] <= errors[1] + 1e-4).all() and errors[0].sum() < 0.9 * errors[1].sum()
