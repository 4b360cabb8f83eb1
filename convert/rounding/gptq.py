"""GPTQ: weights rounded column by column, the error of each carried over to those that are still open.

Method of Frantar et al. 2022 (arXiv 2210.17323), for MLX's affine layout.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..recipes import Quantization
from .groups import encode, fit, pack

BLOCK = 128  # columns whose errors are carried over to the rest together
DAMPINGS = (0.01, 0.1, 1.0)  # shares of the mean second moment that can be added to each


class Rounded(NamedTuple):
    """A quantized weight as MLX stores it."""

    weight: mx.array  # [..., O, I * bits / 32] uint32
    scales: mx.array  # [..., O, I / group_size]
    biases: mx.array  # the same


class Columns(NamedTuple):
    """In which order columns are rounded, and how their errors are carried over."""

    order: mx.array  # [..., I] int, the columns of the largest second moment first
    upper: mx.array  # [..., I, I] float32, U with U^T U the inverse of the damped moment in that order


def gptq(weight: mx.array, columns: Columns, quantization: Quantization, dtype: mx.Dtype) -> Rounded:
    """Round weights so that the products with the inputs change little.

    What is made small is the sum over the inputs x of |(W - W') x|^2, where W' is `mx.dequantize` of the result.

    Args:
        weight: [..., O, I].
        columns: from `prepare`, of the sum of x x^T over the inputs of each matrix.
        quantization: affine.
        dtype: of scales and biases.
    """
    levels, size = 2**quantization.bits - 1, quantization.group_size
    shape = weight.shape
    weight = weight.astype(mx.float32).reshape(-1, *shape[-2:])
    upper = columns.upper.reshape(-1, shape[-1], shape[-1])
    order = columns.order.reshape(-1, 1, shape[-1])
    back = mx.argsort(order, axis=-1)
    diagonal = mx.diagonal(upper, axis1=-2, axis2=-1)[:, None]
    importance = mx.take_along_axis(1 / (diagonal * diagonal), back, axis=-1)
    scales, biases = fit(weight, importance, quantization.bits, size, dtype)
    weight = mx.take_along_axis(weight, order, axis=-1)
    own_scales, own_biases = (mx.take_along_axis(one, order // size, axis=-1) for one in (scales, biases))
    codes = []
    for start in range(0, shape[-1], BLOCK):
        stop = min(start + BLOCK, shape[-1])
        rest, errors = weight[..., : stop - start], []
        for k in range(start, stop):
            now, scale, bias = rest[..., 0], own_scales[..., k], own_biases[..., k]
            codes.append(encode(now, scale, bias, levels))
            errors.append((now - (codes[-1] * scale + bias)) / diagonal[..., k])
            rest = rest[..., 1:] - errors[-1][..., None] * upper[:, k : k + 1, k + 1 : stop]
        if stop < shape[-1]:
            weight = weight[..., stop - start :] - mx.stack(errors, axis=-1) @ upper[:, start:stop, stop:]
        mx.eval(weight, codes)
    made = mx.take_along_axis(mx.stack(codes, axis=-1), back, axis=-1)
    found = pack(made.astype(mx.uint32), quantization.bits), scales.astype(dtype), biases.astype(dtype)
    return Rounded(*(one.reshape(*shape[:-1], -1) for one in found))


def prepare(moment: mx.array, damping: float) -> Columns:
    """What `gptq` takes for a float32 second moment [..., I, I]; its scale does not matter.

    Args:
        moment: sum of x x^T over the inputs.
        damping: share of the mean second moment that is added to each; the more, the less is carried over.
    """
    width, diagonal = moment.shape[-1], mx.diagonal(moment, axis1=-2, axis2=-1)
    order = mx.argsort(-diagonal, axis=-1)
    mean = diagonal.mean(axis=-1)[..., None, None]
    damped = moment / mx.maximum(mean, 1e-30) + damping * mx.eye(width)
    damped = mx.take_along_axis(damped, order[..., None, :], axis=-1)
    damped = mx.take_along_axis(damped, order[..., :, None], axis=-2)
    # MLX factors matrices on the CPU alone.
    inverse = mx.linalg.cholesky_inv(mx.linalg.cholesky(damped, stream=mx.cpu), stream=mx.cpu)
    upper = mx.linalg.cholesky((inverse + inverse.swapaxes(-1, -2)) / 2, upper=True, stream=mx.cpu)
    mx.eval(order, upper)
    return Columns(order, upper)
