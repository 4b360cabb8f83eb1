"""Affine groups as MLX stores them: codes, a scale and a bias for every group of a row."""

from __future__ import annotations

import mlx.core as mx

WORD = 32  # bits
SHRINKS = tuple(1 - 0.05 * i for i in range(11))  # of a group's range, tried for its scale
REFITS = 2  # fits of scale and bias to the codes of each
LEAST_SCALE = 1e-7  # MLX's own


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes in MLX's layout: one stream of bits a row, the lowest bit of the first code first.

    Args:
        codes: [..., I] uint32, each below 2**bits; I is a multiple of 32.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        [..., I * bits / 32] uint32.
    """
    runs = codes.reshape(*codes.shape[:-1], -1, WORD)
    words = [mx.zeros(runs.shape[:-1], mx.uint32) for _ in range(bits)]
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        words[word] = words[word] | (runs[..., i] << shift)
        if shift + bits > WORD:
            words[word + 1] = words[word + 1] | (runs[..., i] >> (WORD - shift))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


def encode(weight: mx.array, scales: mx.array, biases: mx.array, levels: int) -> mx.array:
    """The nearest codes, float32, of weights whose scales and biases broadcast to them."""
    return mx.clip(mx.round((weight - biases) / scales), 0, levels)


def fit(weight: mx.array, importance: mx.array, bits: int, group_size: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Scales and biases of the least weighted error when every weight takes its nearest code.

    Shrunk ranges of each group are tried, each with scale and bias fitted to its codes by least squares, and MLX's own.

    Args:
        weight: [..., O, I] float32.
        importance: [..., 1, I] float32, what an error of each column weighs.
        bits: of a code.
        group_size: columns of a group.
        dtype: in which scales and biases are stored.

    Returns:
        Scales and biases, [..., O, I / group_size] each, float32 numbers that `dtype` can say.
    """
    levels = 2**bits - 1
    groups = mx.unflatten(weight, -1, (-1, group_size))
    share = mx.unflatten(importance, -1, (-1, group_size))
    share = share / (share.sum(axis=-1, keepdims=True) + 1e-30) + 1e-6
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    _, own, bias = mx.quantize(weight.astype(dtype), group_size=group_size, bits=bits)
    own, bias = own[..., None].astype(mx.float32), bias[..., None].astype(mx.float32)
    candidates = [(own, bias), *(((high - low) * p / levels, low * p) for p in SHRINKS)]
    best: tuple[mx.array, ...] | None = None
    for i, candidate in enumerate(candidates):
        scale, offset = candidate if i == 0 else _refitted(groups, *candidate, share, levels)
        scale, offset = (one.astype(dtype).astype(mx.float32) for one in (_at_least(scale), offset))
        wrong = groups - (encode(groups, scale, offset, levels) * scale + offset)
        error = (wrong * wrong * share).sum(axis=-1, keepdims=True)
        if best is None:
            best = error, scale, offset
        else:
            better = error < best[0]
            best = tuple(mx.where(better, new, old) for new, old in zip((error, scale, offset), best))
        mx.eval(best)
    assert best is not None
    return best[1][..., 0], best[2][..., 0]


def _refitted(
    groups: mx.array, scale: mx.array, offset: mx.array, share: mx.array, levels: int
) -> tuple[mx.array, mx.array]:
    """Scale and bias fitted to the nearest codes, `REFITS` times."""
    for _ in range(REFITS):
        held = _at_least(scale)
        scale, offset = _least_squares(groups, encode(groups, held, offset, levels), share, held)
    return scale, offset


def _least_squares(groups: mx.array, codes: mx.array, share: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """Scale and bias of the least weighted error with these codes; the scale stays where all codes are equal."""
    total = share.sum(axis=-1, keepdims=True)
    mean_code = (share * codes).sum(axis=-1, keepdims=True) / total
    mean = (share * groups).sum(axis=-1, keepdims=True) / total
    centred = (codes - mean_code) * share
    spread = (centred * (codes - mean_code)).sum(axis=-1, keepdims=True)
    slope = (centred * (groups - mean)).sum(axis=-1, keepdims=True) / mx.maximum(spread, 1e-12)
    scale = mx.where(spread > 1e-9, slope, scale)
    return scale, mean - scale * mean_code


def _at_least(scale: mx.array) -> mx.array:
    return mx.where(scale < 0, mx.minimum(scale, -LEAST_SCALE), mx.maximum(scale, LEAST_SCALE))
