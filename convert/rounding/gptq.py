"""GPTQ: weights rounded column by column, the error of each carried over to those that are still open.

Method of Frantar et al. 2022 (arXiv 2210.17323), for MLX's affine layout.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..recipes import Quantization
from .groups import encode, fit, pack

BLOCK = 128  # columns whose errors are carried over to the rest together
DAMPING = 0.01  # of the mean second moment, added to each


class Rounded(NamedTuple):
    """A quantized weight as MLX stores it."""

    weight: mx.array  # [..., O, I * bits / 32] uint32
    scales: mx.array  # [..., O, I / group_size]
    biases: mx.array  # the same


def gptq(weight: mx.array, root: mx.array, quantization: Quantization, dtype: mx.Dtype) -> Rounded:
    """Round weights so that the products with the inputs change little.

    What is made small is the sum over the inputs x of |(W - W') x|^2, where W' is `mx.dequantize` of the result.

    Args:
        weight: [..., O, I].
        root: [..., I, I], from `inverse_root` of the sum of x x^T over the inputs of each matrix.
        quantization: affine.
        dtype: of scales and biases.
    """
    levels, size = 2**quantization.bits - 1, quantization.group_size
    shape = weight.shape
    weight = weight.astype(mx.float32).reshape(-1, *shape[-2:])
    upper = root.reshape(-1, shape[-1], shape[-1])
    diagonal = mx.diagonal(upper, axis1=-2, axis2=-1)[:, None]
    scales, biases = fit(weight, 1 / (diagonal * diagonal), quantization.bits, size, dtype)
    codes = []
    for start in range(0, shape[-1], BLOCK):
        stop = min(start + BLOCK, shape[-1])
        rest, errors = weight[..., : stop - start], []
        for k in range(start, stop):
            now, group = rest[..., 0], k // size
            scale, bias = scales[..., group], biases[..., group]
            codes.append(encode(now, scale, bias, levels))
            errors.append((now - (codes[-1] * scale + bias)) / diagonal[..., k])
            rest = rest[..., 1:] - errors[-1][..., None] * upper[:, k : k + 1, k + 1 : stop]
        carried = mx.stack(errors, axis=-1)
        weight = weight[..., stop - start :] - carried @ upper[:, start:stop, stop:]
        mx.eval(weight, codes)
    packed = pack(mx.stack(codes, axis=-1).astype(mx.uint32), quantization.bits)
    found = packed, scales.astype(dtype), biases.astype(dtype)
    return Rounded(*(one.reshape(*shape[:-1], -1) for one in found))


def inverse_root(moment: mx.array) -> mx.array:
    """The upper triangular U with U^T U = moment^-1, [..., I, I], of a float32 moment that is damped first.

    The moment's scale does not matter to what is rounded by it.
    """
    width = moment.shape[-1]
    mean = mx.diagonal(moment, axis1=-2, axis2=-1).mean(axis=-1)[..., None, None]
    damped = moment / mx.maximum(mean, 1e-30) + DAMPING * mx.eye(width)
    # MLX factors matrices on the CPU alone.
    inverse = mx.linalg.cholesky_inv(mx.linalg.cholesky(damped, stream=mx.cpu), stream=mx.cpu)
    upper = mx.linalg.cholesky((inverse + inverse.swapaxes(-1, -2)) / 2, upper=True, stream=mx.cpu)
    mx.eval(upper)
    return upper
