"""The parts of the text stack. Attribute names are the checkpoint's keys."""

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

SCORES = 256 * 2**20  # bytes of attention scores at once; where a whole pass has more, keys come in chunks
CHUNK = 256  # keys; a chunk is a multiple of this
LONGEST = 4096  # keys of a chunk at most: above them a step holds more and is not faster


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, stages: list[mx.array] | None = None
) -> mx.array:
    """Grouped-query attention with scale 1; where its scores exceed `SCORES`, chunk by chunk of the keys.

    Chunks are merged by log-sum-exp in float32; products are in the dtype of their factors either way.

    Args:
        queries: [B, heads, L, D].
        keys: [B, kv_heads, N, D].
        values: [B, kv_heads, N, D].
        mask: of L queries and N keys; every query sees at least one.
        stages: takes a small array per chunk; evaluated one after the other they take the memory of one chunk.

    Returns:
        [B, heads, L, D] in the dtype of the values.
    """
    batch, heads, length, dim = queries.shape
    kv_heads, count = keys.shape[1:3]
    rows = batch * heads * length
    if rows * count * queries.dtype.size <= SCORES:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask.all_keys)
    size = min(max(SCORES // (2 * rows * mx.float32.size) // CHUNK * CHUNK, CHUNK), LONGEST)
    queries = queries.reshape(batch, kv_heads, -1, dim)  # a KV head's queries in one matrix: no key is repeated
    # Finite, unlike the scores of hidden keys: a chunk that is all hidden then adds zeros instead of NaN.
    top = mx.full((*queries.shape[:3], 1), mx.finfo(mx.float32).min)
    total, out = mx.zeros(top.shape), mx.zeros(queries.shape)
    for start in range(0, count, size):
        end = min(start + size, count)
        scores = queries @ keys[:, :, start:end].swapaxes(-1, -2)
        seen = mask.part(start, end)
        if seen is not None:
            grouped = scores.reshape(batch, kv_heads, -1, length, end - start)
            scores = mx.where(seen[:, :, None], grouped, -mx.inf).reshape(scores.shape)
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


class Keys(NamedTuple):
    """What a layer's attention may see: the mode's own half of a forward."""

    kv: LayerKV
    offset: int  # positions that the prefix holds
    mask: Mask
    canvas: bool  # attend to prefix and canvas and leave the prefix alone; otherwise extend it

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attention of new positions, [B, heads, L, D], to what is held and to each other."""
        keys, values = (self.kv.with_canvas if self.canvas else self.kv.extend)(keys, values, self.offset)
        self.kv.stages = []
        return attend(queries, keys, values, self.mask, self.kv.stages)


class View(NamedTuple):
    """What a batch's attention may see in one layer."""

    keys: list[Keys]  # of the whole batch, or one of each row
    rope_offset: int | mx.array  # position of the first new token, [B] where rows differ

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """As `Keys.attend`; rows with prefixes of their own attend one after the other."""
        if len(self.keys) == 1:
            return self.keys[0].attend(queries, keys, values)
        rows = [one.attend(*(a[i : i + 1] for a in (queries, keys, values))) for i, one in enumerate(self.keys)]
        return mx.concatenate(rows)


class Attention(nn.Module):
    """Grouped-query attention with normed heads and scale 1; full layers take V from `k_proj`."""

    def __init__(self, config: TextConfig, layer_type: str):
        super().__init__()
        self._heads = config.num_attention_heads
        self._kv_heads, self._dim = config.head(layer_type)
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

    def __call__(self, x: mx.array, see: View) -> mx.array:
        """x [B, L, H] -> [B, L, H]."""
        batch, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, length, self._heads, self._dim))
        raw = self.k_proj(x).reshape(batch, length, self._kv_heads, self._dim)
        keys = self.k_norm(raw)
        values = raw if "v_proj" not in self else self.v_proj(x).reshape(raw.shape)
        values = rms_norm(values, self._eps).transpose(0, 2, 1, 3)
        queries = self._rope(queries.transpose(0, 2, 1, 3), offset=see.rope_offset)
        keys = self._rope(keys.transpose(0, 2, 1, 3), offset=see.rope_offset)
        out = see.attend(queries, keys, values)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
