"""The Gemma 4 vision tower: patches of pictures in, soft tokens of the text stack out."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config import VisionConfig
from .functions import geglu, rms_norm

QUERY_CHUNK = 2560  # queries that attend at once; bounds the scores where attention is not fused


class ClippedLinear(nn.Module):
    """A linear layer under the key `linear`, with the calibrated clipping that some towers have."""

    def __init__(self, inputs: int, outputs: int, clipped: bool):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        if clipped:
            self.input_min, self.input_max = mx.array(-mx.inf), mx.array(mx.inf)
            self.output_min, self.output_max = mx.array(-mx.inf), mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] -> [..., outputs]."""
        if "input_min" not in self:
            return self.linear(x)
        x = self.linear(mx.clip(x, self.input_min, self.input_max))
        return mx.clip(x, self.output_min, self.output_max)


class VisionAttention(nn.Module):
    """Bidirectional attention with 2-D RoPE: the first half of a head is rotated by x, the second half by y."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._dim, self._eps = config.head_dim, config.rms_norm_eps
        width, kv_width = self._heads * self._dim, self._kv_heads * self._dim
        clipped = config.use_clipped_linears
        self.q_proj = ClippedLinear(config.hidden_size, width, clipped)
        self.k_proj = ClippedLinear(config.hidden_size, kv_width, clipped)
        self.v_proj = ClippedLinear(config.hidden_size, kv_width, clipped)
        self.o_proj = ClippedLinear(width, config.hidden_size, clipped)
        self.q_norm = nn.RMSNorm(self._dim, eps=self._eps)
        self.k_norm = nn.RMSNorm(self._dim, eps=self._eps)

    def __call__(self, x: mx.array, rotation: tuple[mx.array, mx.array], mask: mx.array | None) -> mx.array:
        """x [N, P, hidden], rotation (cos, sin) as for `_rotate`, mask [N, 1, 1, P] true for real patches, or None."""
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(batch, length, self._heads, self._dim))
        k = self.k_norm(self.k_proj(x).reshape(batch, length, self._kv_heads, self._dim))
        v = rms_norm(self.v_proj(x).reshape(batch, length, self._kv_heads, self._dim), self._eps)
        q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        rows = []
        for i in range(0, length, QUERY_CHUNK):
            rows.append(mx.fast.scaled_dot_product_attention(q[:, :, i : i + QUERY_CHUNK], k, v, scale=1.0, mask=mask))
            if length > QUERY_CHUNK:
                mx.eval(rows[-1])  # otherwise the scores of all queries would be in memory at once
        out = mx.concatenate(rows, axis=2)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """x [B, P, heads, D]; cos and sin [B, P, 1, 2, D / 4]; rotate-half within each half of the head."""
    parts = x.reshape(*x.shape[:-1], 2, 2, x.shape[-1] // 4)
    a, b = parts[..., 0, :], parts[..., 1, :]
    turned = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


class VisionMLP(nn.Module):
    """A GeGLU of clipped linears."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gate_proj = ClippedLinear(config.hidden_size, config.intermediate_size, config.use_clipped_linears)
        self.up_proj = ClippedLinear(config.hidden_size, config.intermediate_size, config.use_clipped_linears)
        self.down_proj = ClippedLinear(config.intermediate_size, config.hidden_size, config.use_clipped_linears)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention and MLP, with norms before and after each."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            setattr(self, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def __call__(self, x: mx.array, rotation: tuple[mx.array, mx.array], mask: mx.array | None) -> mx.array:
        """x [N, P, hidden] -> [N, P, hidden]; rotation and mask as for `VisionAttention`."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation, mask))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """Linear patch embedding plus a learned vector for each x and each y."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.ones((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """patches [N, P, 3 * patch_size**2] in 0..1, positions [N, P, 2] -> [N, P, hidden]."""
        table = self.position_embedding_table
        at = mx.maximum(positions, 0)
        x = self.input_proj((2 * (patches - 0.5)).astype(table.dtype))
        real = (positions[..., :1] >= 0).astype(table.dtype)
        return x + (table[0][at[..., 0]] + table[1][at[..., 1]]) * real


class VisionEncoder(nn.Module):
    """The layers of the tower, under the checkpoint's `encoder` key."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches to pooled features, one for each square of `pooling_kernel_size` x `pooling_kernel_size` patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self._config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """Encode pictures.

        Args:
            patches: [N, P, 3 * patch_size**2] pixel values in 0..1, row by row.
            positions: [N, P, 2] int32 (x, y) of each patch, -1 where padded.

        Returns:
            [tokens, hidden], the features of one picture after another, without padding.
        """
        config = self._config
        x = self.patch_embedder(patches, positions)
        quarter = config.head_dim // 4
        frequencies = config.rope_theta ** (-mx.arange(quarter) / quarter)
        angles = positions.astype(mx.float32)[:, :, None, :, None] * frequencies
        rotation = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
        grid = np.asarray(positions)
        # Without padding there is no mask, so that fused attention kernels can be used.
        mask = None if (grid >= 0).all() else mx.array(grid[:, None, None, :, 0] >= 0)
        for layer in self.encoder.layers:
            x = layer(x, rotation, mask)
        # float32 until standardized: scaled features exceed the range of float16, and the bias cancels most of them.
        pooled = self._pool(x, grid) * config.hidden_size**0.5
        if config.standardize:
            pooled = (pooled - self.std_bias) * self.std_scale
        return pooled.astype(x.dtype)

    def _pool(self, x: mx.array, positions: np.ndarray) -> mx.array:
        """Mean of each k x k square of patches: [N, P, hidden] -> [tokens, hidden] float32."""
        k = self._config.pooling_kernel_size
        pooled = []
        for i, one in enumerate(positions):
            where = one[one[:, 0] >= 0]
            columns = (where[:, 0].max() + 1) // k
            square = where[:, 1] // k * columns + where[:, 0] // k
            members = np.argsort(square, kind="stable").reshape(-1, k * k)
            pooled.append(x[i][mx.array(members)].astype(mx.float32).mean(axis=1))
        return mx.concatenate(pooled)


class Projector(nn.Module):
    """Features to soft tokens: a norm without weight, then a linear layer."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.embedding_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)
        self._eps = config.rms_norm_eps

    def __call__(self, features: mx.array) -> mx.array:
        """[tokens, vision hidden] -> [tokens, text hidden]."""
        return self.embedding_projection(rms_norm(features, self._eps))
