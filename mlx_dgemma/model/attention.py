"""The attention of the text stack. Names of submodules are the checkpoint's keys."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from .config import TextConfig
from .device import fused
from .functions import rms_norm
from .kv_cache import LayerKV
from .masks import Mask

SCORE_BYTES = 256 * 2**20  # of attention scores at once; a pass that has more attends to its keys chunk by chunk
KEY_CHUNK = 256  # keys; a chunk is a multiple of this
MAX_KEY_CHUNK = 4096  # keys of a chunk at most: larger chunks take more memory and are not faster


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, stages: list[mx.array] | None = None
) -> mx.array:
    """Grouped-query attention with scale 1.

    Where the scores would take more than `SCORE_BYTES`, the keys are taken in chunks, which are merged by log-sum-exp
    in float32. Matrix products are computed in the dtype of their factors either way.

    Args:
        queries: [B, heads, L, D].
        keys: [B, kv_heads, N, D].
        values: [B, kv_heads, N, D].
        mask: of L queries and N keys; every query sees at least one key.
        stages: one small array per chunk is appended to it; when they are evaluated in order, one chunk is in memory
            at a time.

    Returns:
        [B, heads, L, D] in the dtype of the values.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, count = keys.shape[1:3]
    rows = batch * heads * length
    if rows * count * queries.dtype.size <= SCORE_BYTES:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask.all_keys)
    size = min(max(SCORE_BYTES // (2 * rows * mx.float32.size) // KEY_CHUNK * KEY_CHUNK, KEY_CHUNK), MAX_KEY_CHUNK)
    queries = queries.reshape(batch, kv_heads, -1, dim)  # the queries of a KV head in one matrix: no key is repeated
    # Finite, unlike the scores of hidden keys: a chunk whose keys are all hidden then adds zeros instead of NaN.
    top = mx.full((*queries.shape[:3], 1), mx.finfo(mx.float32).min)
    total, out = mx.zeros(top.shape), mx.zeros(queries.shape)
    for start in range(0, count, size):
        end = min(start + size, count)
        scores = queries @ keys[:, :, start:end].swapaxes(-1, -2)
        visible = mask.of_keys(start, end)
        if visible is not None:
            grouped = scores.reshape(batch, kv_heads, -1, length, end - start)
            scores = mx.where(visible[:, :, None], grouped, -mx.inf).reshape(scores.shape)
        highest = mx.maximum(top, scores.max(axis=-1, keepdims=True))
        shares, kept = _exp_above(scores, highest), _exp_above(top, highest)
        total = _add_scaled(total, kept, shares.sum(axis=-1, keepdims=True))
        out = _add_scaled(out, kept, shares.astype(values.dtype) @ values[:, :, start:end])
        top = highest
        queries, total = mx.depends([queries, total], [out])  # the next chunk waits for this one
        if stages is not None:
            stages.append(mx.array(total))
    return (out / total).astype(values.dtype).reshape(batch, heads, length, dim)


@fused
def _exp_above(scores: mx.array, highest: mx.array) -> mx.array:
    return mx.exp(scores.astype(mx.float32) - highest)


@fused
def _add_scaled(old: mx.array, scale: mx.array, new: mx.array) -> mx.array:
    return old * scale + new


class LayerContext(NamedTuple):
    """What one layer attends to besides the new positions, in one pass.

    The lists have one entry for the whole batch, or one per row where the rows have prefixes of their own.
    """

    caches: list[LayerKV]  # this layer's
    offsets: list[int]  # positions that each prefix holds
    masks: list[Mask]
    rope_offset: int | mx.array  # position of the first new token; [B] where it differs by row
    canvas: bool  # attend to prefix and canvas without extending the prefix; false: append the new positions to it


class Attention(nn.Module):
    """Grouped-query attention with normed heads and scale 1; full layers compute V with `k_proj`."""

    def __init__(self, config: TextConfig, layer_type: str):
        super().__init__()
        self._heads = config.num_attention_heads
        self._kv_heads, self._dim = config.kv_shape(layer_type)
        self._eps = config.rms_norm_eps
        full = layer_type == "full_attention"
        width = self._heads * self._dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self._kv_heads * self._dim, bias=False)
        if not full:
            self.v_proj = nn.Linear(config.hidden_size, self._kv_heads * self._dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self._dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self._dim, eps=config.rms_norm_eps)
        rope = (config.full_rope if full else config.sliding_rope) or {}
        self._rope = initialize_rope(
            self._dim,
            base=rope.get("rope_theta", 1e4),
            traditional=False,
            scaling_config=rope,
            max_position_embeddings=config.max_position_embeddings,
        )

    def __call__(self, x: mx.array, context: LayerContext) -> mx.array:
        """x [B, L, H] -> [B, L, H]; rows with prefixes of their own attend one after the other."""
        batch, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, length, self._heads, self._dim))
        raw = self.k_proj(x).reshape(batch, length, self._kv_heads, self._dim)
        keys = self.k_norm(raw)
        values = raw if "v_proj" not in self else self.v_proj(x).reshape(raw.shape)
        values = rms_norm(values, self._eps).transpose(0, 2, 1, 3)
        queries = self._rope(queries.transpose(0, 2, 1, 3), offset=context.rope_offset)
        keys = self._rope(keys.transpose(0, 2, 1, 3), offset=context.rope_offset)
        new, rows = (queries, keys, values), []
        for i, (cache, offset, mask) in enumerate(zip(context.caches, context.offsets, context.masks)):
            q, k, v = new if len(context.caches) == 1 else (a[i : i + 1] for a in new)
            k, v = (cache.with_canvas if context.canvas else cache.extend)(k, v, offset)
            cache.stages = []
            rows.append(attend(q, k, v, mask, cache.stages))
        out = rows[0] if len(rows) == 1 else mx.concatenate(rows)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
