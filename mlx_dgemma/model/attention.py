"""The attention of the text stack. Names of submodules are the checkpoint's keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..upstream import ProportionalRoPE
from .cache.quantized import Packed, Part, QuantizedKV
from .config import TextConfig
from .device import fused, on_metal
from .functions import rms_norm
from .kernels import launch as kernels
from .kv_cache import BUFFER_STEP, LayerKV
from .masks import Mask, Narrow

SCORE_BYTES = 256 * 2**20  # of attention scores at once; a pass that has more takes its queries group by group
ALIGNMENT = 8  # keys; products of other sizes take CUDA twice as long


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, stages: list[mx.array] | None = None
) -> mx.array:
    """Grouped-query attention with scale 1.

    Where the scores would take more than `SCORE_BYTES`, the queries are taken in groups, each with the keys that it
    may see. Products are computed in the dtype of their factors, the softmax in float32.

    Args:
        queries: [B, heads, L, D].
        keys: [B, kv_heads, N, D].
        values: [B, kv_heads, N, D].
        mask: of L queries and N keys; every query sees at least one key.
        stages: one small array per group is appended to it; when they are evaluated in order, one group's scores are in
            memory at a time.

    Returns:
        [B, heads, L, D] in the dtype of the values.
    """
    batch, heads, length, _ = queries.shape
    per_query = batch * heads * keys.shape[2] * queries.dtype.size
    if length * per_query <= SCORE_BYTES:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask.all_keys)
    size = queries_at_once(per_query)

    def of_group(some: mx.array, rows: slice) -> mx.array:
        first, last = mask.visible_keys(rows)
        visible = mask.of_keys(first, last, rows) if first < last else None
        return _unfused(some, keys[:, :, :last], values[:, :, :last], visible)

    return _in_groups(queries, size, of_group, stages)


def attend_by_kernel(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    leading: tuple[int | mx.array, int],
    stages: list[mx.array] | None = None,
) -> mx.array:
    """As `attend`, with a custom kernel for the softmax, where each query sees the first keys.

    Args:
        queries: [B, heads, L, D].
        keys: [B, kv_heads, N, D], where N is a multiple of `ALIGNMENT`.
        values: [B, kv_heads, N, D].
        leading: as `Mask.leading`; what lies behind these keys is not looked at, but must be finite. Of one query in a
            traced pass, which does not know a number, the first is [3] as `kernels.softmax` takes it.
        stages: as in `attend`.
    """
    batch, heads, length, _ = queries.shape
    count, step = leading
    if isinstance(count, mx.array):
        return _unfused(queries, keys, values, leading=(count, step))
    per_query = batch * heads * keys.shape[2] * queries.dtype.size
    size = length if length * per_query <= SCORE_BYTES else queries_at_once(per_query)
    if size < length and on_metal() and (fused := _fused_in_blocks(queries, keys, values, (count, step))) is not None:
        return fused

    def of_group(some: mx.array, rows: slice) -> mx.array:
        last = count + step * (rows.stop - 1)
        last += -last % ALIGNMENT
        return _unfused(some, keys[:, :, :last], values[:, :, :last], leading=(count + step * rows.start, step))

    return _in_groups(queries, size, of_group, stages)


def attend_to_parts(
    queries: mx.array,
    parts: Iterable[Part],
    mask: Mask,
    stages: list[mx.array] | None = None,
    by_kernel: bool = False,
) -> mx.array:
    """As `attend`, to keys and values that come part by part: one part and its scores are in memory at a time.

    Args:
        queries: [B, heads, L, D].
        parts: of the N keys, from the first to the last.
        mask: as in `attend`.
        stages: one small array per part is appended to it.
        by_kernel: take a custom kernel for the softmax.
    """
    sums: tuple[mx.array, mx.array] | None = None
    for part in parts:
        found = _of_part(queries, part, mask, by_kernel)
        sums = found if sums is None else _merged(*sums, *found)
        queries = mx.depends(queries, [sums[1]])  # the next part waits for this one
        if stages is not None:
            stages.append(sums[1][..., :1])
    assert sums is not None
    return sums[1].astype(queries.dtype).reshape(queries.shape)


def _of_part(queries: mx.array, part: Part, mask: Mask, by_kernel: bool) -> tuple[mx.array, mx.array]:
    """Attention to a part.

    Returns:
        level: [B, kv_heads, heads / kv_heads * L, 1] float32, the logarithm of the sum of each query's exp(scores).
        values: [B, kv_heads, heads / kv_heads * L, D] float32.
    """
    (batch, _, length, dim), (start, keys, values) = queries.shape, part
    kv_heads, count = keys.shape[1:3]
    visible, free = mask.of_keys(start, start + count), -count % ALIGNMENT
    if free:
        keys, values = (mx.pad(one, [(0, 0), (0, 0), (0, free), (0, 0)]) for one in (keys, values))
        visible = mx.ones((1, 1, 1, count), mx.bool_) if visible is None else visible
        visible = mx.pad(visible, [(0, 0), (0, 0), (0, 0), (0, free)])
    scores = queries.reshape(batch, kv_heads, -1, dim) @ keys.swapaxes(-1, -2)
    if visible is not None:
        grouped = scores.reshape(batch, kv_heads, -1, length, count + free)
        # The lowest number and not -inf: what a query sees may all lie in other parts.
        lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
        scores = mx.where(visible[:, :, None], grouped, lowest).reshape(scores.shape)
    if by_kernel:
        shares, level = kernels.softmax_with_sums(scores, count + free)
    else:
        shares = mx.softmax(scores, axis=-1, precise=True)
        # One key's score and share tell the sum; two passes over all scores would cost more.
        best = mx.argmax(scores, axis=-1, keepdims=True)
        score, share = (mx.take_along_axis(one, best, axis=-1).astype(mx.float32) for one in (scores, shares))
        level = score - mx.log(share)
    return level, (shares @ values).astype(mx.float32)


@fused
def _merged(level: mx.array, values: mx.array, other: mx.array, more: mx.array) -> tuple[mx.array, mx.array]:
    """What `_of_part` returns, of earlier parts and of one more."""
    both = mx.logaddexp(level, other)
    return both, values * mx.exp(level - both) + more * mx.exp(other - both)


def keys_at_once(queries: mx.array, kv_heads: int) -> int:
    """Keys of a part whose scores fit into `SCORE_BYTES`, and whose keys and values do."""
    batch, heads, length, dim = queries.shape
    per_key = max(heads * length, 2 * kv_heads * dim) * batch * queries.dtype.size
    return max(SCORE_BYTES // per_key // BUFFER_STEP, 1) * BUFFER_STEP


def queries_at_once(per_query: int) -> int:
    """Queries of a group whose scores of `per_query` bytes each fit into `SCORE_BYTES`, at least one.

    Multiples of 16 fill whole tiles of a product: the eight heads that share keys at the release's shape make 128 rows.
    """
    size = max(SCORE_BYTES // per_query, 1)
    return size // 16 * 16 or size


def _in_groups(
    queries: mx.array,
    size: int,
    of_group: Callable[[mx.array, slice], mx.array],
    stages: list[mx.array] | None,
) -> mx.array:
    """Attention of `size` queries after the other, one group's scores in memory at a time."""
    length, found = queries.shape[2], []
    if size >= length:
        return of_group(queries, slice(0, length))
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        found.append(of_group(queries[:, :, rows], rows))
        queries = mx.depends(queries, [found[-1]])  # the next group waits for this one
        if stages is not None:
            stages.append(found[-1][..., :1])
    return mx.concatenate(found, axis=2)


def _unfused(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    visible: mx.array | None = None,
    leading: tuple[int | mx.array, int] | None = None,
) -> mx.array:
    """As MLX computes it for heads of this size, but in one matrix of queries per KV head and without the scale.

    `visible` is the mask of the last keys; those before are visible. `leading` is as in `attend_by_kernel`.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, slots = keys.shape[1:3]
    scores = queries.reshape(batch, kv_heads, -1, dim) @ keys.swapaxes(-1, -2)
    if visible is not None:
        grouped = scores.reshape(batch, kv_heads, -1, length, slots)
        masked = slots - visible.shape[-1]
        grouped[..., masked:] = mx.where(visible[:, :, None], grouped[..., masked:], -mx.inf)
        scores = grouped.reshape(scores.shape)
    if leading is None or (isinstance(leading[0], int) and leading == (slots, 0)):
        shares = mx.softmax(scores, axis=-1, precise=True)
    else:
        shares = kernels.softmax(scores, *leading, length)
    return (shares @ values).reshape(batch, heads, length, dim)


def _fused_in_blocks(queries: mx.array, keys: mx.array, values: mx.array, leading: tuple[int, int]) -> mx.array | None:
    """Attention by a kernel of MLX that keeps no scores; None where Metal has none for this shape."""
    count, step = leading
    count += step * (queries.shape[2] - 1)
    keys, values = keys[:, :, :count], values[:, :, :count]
    try:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=1.0, mask="causal" if step else None, force_fused=True
        )
    except ValueError:  # what has a kernel depends on the chip, the head's size and MLX's version
        return None


class LayerContext(NamedTuple):
    """What one layer attends to besides the new positions, in one pass.

    The lists have one entry for the whole batch, or one per row where the rows have prefixes of their own.
    """

    caches: list[LayerKV]  # this layer's
    offsets: list[int]  # positions that each prefix holds
    masks: list[Mask]
    rope_offset: int | mx.array  # position of the first new token; [B] where it differs by row
    canvas: bool  # attend to prefix and canvas without extending the prefix; false: append the new positions to it
    turn: tuple[mx.array, mx.array] | None = None  # of RoPE, for the custom kernels; None: compute without them
    narrow: Narrow | None = None  # what is computed of each canvas; None: all


class Attention(nn.Module):
    """Grouped-query attention with normed heads and scale 1; full layers compute V with `k_proj`."""

    def __init__(self, config: TextConfig, layer_type: str):
        super().__init__()
        kv_heads, self._dim = config.kv_shape(layer_type)
        self._eps = config.rms_norm_eps
        full = layer_type == "full_attention"
        width = config.num_attention_heads * self._dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self._dim, bias=False)
        if not full:
            self.v_proj = nn.Linear(config.hidden_size, kv_heads * self._dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self._dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self._dim, eps=config.rms_norm_eps)
        base, pairs = config.rope(layer_type)
        self._frequencies = mx.array(config.rope_frequencies(layer_type))
        # A count of dimensions and not their share: mlx-lm would round an odd one up, Transformers rounds it down.
        self._rope: Callable[..., mx.array] = (
            ProportionalRoPE(self._dim, 2 * pairs, base=base) if full else nn.RoPE(self._dim, base=base)
        )

    def __call__(self, x: mx.array, context: LayerContext) -> mx.array:
        """x [B, L, H] -> [B, L, H]; rows with prefixes of their own attend one after the other.

        Of narrow canvases x is [1, T, H].
        """
        batch, length, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)
        v = k if "v_proj" not in self else self.v_proj(x)
        if context.turn is not None:
            norms = self.q_norm.weight, self.k_norm.weight
            queries, keys, values = kernels.split_heads(q, k, v, norms, context.turn, self._eps)
        else:
            queries, keys, values = (one.reshape(batch, length, -1, self._dim) for one in (q, k, v))
            queries, keys = self.q_norm(queries).transpose(0, 2, 1, 3), self.k_norm(keys).transpose(0, 2, 1, 3)
            queries, keys = (self._turned(one, context) for one in (queries, keys))
            values = rms_norm(values, self._eps).transpose(0, 2, 1, 3)
        parts, rows = [_by_row(one, context) for one in (queries, keys, values)], []
        for i, (cache, offset, mask) in enumerate(zip(context.caches, context.offsets, context.masks)):
            q, k, v = (part[i] for part in parts)
            leading = mask.leading if context.turn is not None else None
            # Without a kernel there are as many keys as the mask has, which counts the slots in front of a full ring.
            alignment = 1 if leading is None and len(mask.keys) % ALIGNMENT else ALIGNMENT
            canvas = context.canvas and mask.queries is None
            if canvas:
                k, v = cache.with_canvas(k, v, offset, alignment, context.narrow and context.narrow.length)
            elif context.canvas:
                k, v = cache.ahead(k, v, offset, alignment)
            else:
                k, v = cache.extend(k, v, offset, alignment)
            cache.stages = []
            if isinstance(cache, QuantizedKV) and len(mask.keys) > (size := keys_at_once(q, k.shape[1])):
                held = offset if canvas else len(mask.keys)
                rows.append(
                    attend_to_parts(q, cache.parts(held, canvas, size), mask, cache.stages, context.turn is not None)
                )
            elif leading is None:
                rows.append(attend(q, k, v, mask, cache.stages))
            else:
                rows.append(attend_by_kernel(q, k, v, leading, cache.stages))
        out = rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=0 if context.narrow is None else 2)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def unpack(
        self,
        packed: Packed,
        group_size: int,
        bits: int,
        slots: tuple[int, int],
        position: int | mx.array,
        by_kernel: bool = False,
    ) -> Iterable[mx.array]:
        """Keys and values [B, heads, N, D] of a full layer's quantized values.

        Both are normed outputs of `k_proj`, the values without a weight.

        Args:
            packed: [B, heads, slots, ...].
            group_size: numbers that share a scale.
            bits: of a number.
            slots: the first of the N and the one behind the last.
            position: of the first slot, [B] where it differs by row.
            by_kernel: take a custom kernel.
        """
        if by_kernel:
            return kernels.unpack(packed, group_size, slots, position, self.k_norm.weight, self._frequencies)
        codes, scales, biases = (one[:, :, slice(*slots)] for one in packed)
        values = mx.dequantize(codes, scales, biases, group_size, bits)
        return self._rope((values * self.k_norm.weight).astype(values.dtype), offset=position), values

    def _turned(self, x: mx.array, context: LayerContext) -> mx.array:
        """x [B, heads, L, D], rotated by its positions."""
        if context.narrow is None:
            return self._rope(x, offset=context.rope_offset)
        parts = [self._rope(part, offset=at) for part, at in zip(_by_row(x, context), context.offsets)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _by_row(x: mx.array, context: LayerContext) -> list[mx.array]:
    """x [B, heads, L, D], or [1, heads, T, D] of narrow canvases, by the caches of a context."""
    if len(context.caches) == 1:
        return [x]
    if context.narrow is not None:
        return context.narrow.split(x)
    return [x[i : i + 1] for i in range(len(context.caches))]
