"""The token embedding rounded for both of its uses: rows that are looked up, and the head's products with them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .gptq import Rounded, prepare
from .layers import LayerRounding, Moments, best, nearest

PIECE_BYTES = 256 * 2**20  # of float32 rows that are rounded at once
DAMPING = 0.01


def round_embedding(path: str, table: mx.array, rows: mx.array, work: LayerRounding) -> mx.array:
    """Round a tied embedding.

    An error counts by what it does to the logits, and as much again by its square, for where the row is looked up.

    Args:
        path: of the module.
        table: [V, H].
        rows: [N, H] that the head multiplies with it.
        work: takes the result.

    Returns:
        What the table becomes, [V, H] float32.
    """
    quantization = work.choose(path)
    if quantization is None or quantization.mode != "affine":
        return table if quantization is None else nearest(table, quantization, work.dtype)
    both = Moments(*(_with_look_ups(one) for one in Moments.of(rows)))
    columns, moments = [prepare(one[None], DAMPING) for one in both[:1]], Moments(*(one[None] for one in both))
    made, parts, squares, kept = [], [], np.zeros(3), 0
    size = max(PIECE_BYTES // (4 * table.shape[-1]), 1)
    for start in range(0, len(table), size):
        found = best(table[None, start : start + size], moments, quantization, work.dtype, columns)
        mx.eval(found.made, found.values)
        made.append(found.made)
        parts.append(found.values[0])
        squares, kept = squares + found.squares, kept + found.kept
    work.keep(path, Rounded(*(mx.concatenate([one[0] for one in some]) for some in zip(*made))), squares, kept)
    return mx.concatenate(parts)


def _with_look_ups(moment: mx.array) -> mx.array:
    """A moment of mean 1, and one that takes all columns alike."""
    mean = mx.maximum(mx.diagonal(moment).mean(), 1e-30)
    return moment / mean + mx.eye(len(moment))
