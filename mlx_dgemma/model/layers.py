"""A layer of the text stack, its dense branch, and self-conditioning. Names of submodules are the checkpoint's keys."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..distributed.group import ALONE, Group
from .attention import Attention, LayerContext
from .config import TextConfig
from .experts import Experts, Router, mix_rows
from .functions import geglu, rms_norm
from .kernels import launch as kernels


class MLP(nn.Module):
    """The dense branch: a GeGLU MLP."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, activate: Callable[[mx.array, mx.array], mx.array] = geglu) -> mx.array:
        """[..., H] -> [..., H]."""
        return self.down_proj(activate(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """Attention, then a dense branch and a mixture of experts in parallel; norms before and after each.

    Ranks of a group hold parts of the heads and of both branches' widths. Their outputs are summed before the norms:
    once behind attention, and once of both branches together.
    """

    def __init__(self, config: TextConfig, layer_type: str):
        super().__init__()
        self._layer_type = layer_type
        self._group: Group = ALONE
        self.self_attn = Attention(config, layer_type)
        self.mlp = MLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.layer_scalar = mx.ones((1,))
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
        ):
            setattr(self, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def __call__(self, x: mx.array, scalar: mx.array, context: LayerContext) -> mx.array:
        """x [B, L, H] -> [B, L, H]; `scalar` is the layer's factor in this mode (encoder or decoder)."""
        attended = self._group.sum(self.self_attn(self.input_layernorm(x), context))
        if context.turn is not None:
            return self._with_kernels(x, attended, scalar)
        h = x + self.post_attention_layernorm(attended)
        dense = self.mlp(self.pre_feedforward_layernorm(h))
        flat = h.reshape(-1, h.shape[-1])
        sparse = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).reshape(h.shape)
        dense, sparse = self._group.sum_together(dense, sparse)
        dense, sparse = self.post_feedforward_layernorm_1(dense), self.post_feedforward_layernorm_2(sparse)
        return (h + self.post_feedforward_layernorm(dense + sparse)) * scalar

    def _with_kernels(self, x: mx.array, attended: mx.array, scalar: mx.array) -> mx.array:
        """The rest of `__call__` behind attention, by custom kernels."""
        eps, flat = self.input_layernorm.eps, (-1, x.shape[-1])
        h, for_dense, for_experts, for_router = kernels.add_and_norm(
            x,
            attended,
            self.post_attention_layernorm.weight,
            self.pre_feedforward_layernorm.weight,
            self.pre_feedforward_layernorm_2.weight,
            self.router.scale,
            eps,
        )
        chosen, shares = self.router.choose(for_router.reshape(flat))
        rows, slots = self.experts.rows(for_experts.reshape(flat), chosen)
        norms = self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2, self.post_feedforward_layernorm
        dense_norm, experts_norm, norm = (one.weight for one in norms)
        dense = self.mlp(for_dense, kernels.geglu)
        if self._group.size > 1:
            rows = mix_rows(rows, slots, shares)
            dense, rows = self._group.sum_together(dense, rows.reshape(h.shape))
            rows, slots = rows.reshape(flat), mx.arange(slots.shape[0], dtype=mx.int32)[:, None]
            shares = mx.ones(slots.shape, shares.dtype)
        return kernels.combine(h, dense, rows, slots, shares, (dense_norm, experts_norm, norm), scalar, eps)


class SelfConditioning(nn.Module):
    """Adds the expected embedding of the previous step to the canvas (decoder only)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._eps = config.rms_norm_eps

    def __call__(self, embedded: mx.array, conditioning: mx.array | None) -> mx.array:
        """Both [B, C, H] -> [B, C, H]; None, as in a canvas's first step, means zeros."""
        if conditioning is not None:  # without one nothing is added: a GeGLU without bias maps zeros to zeros
            n = self.pre_norm(conditioning)
            embedded = embedded + self.down_proj(geglu(self.gate_proj(n), self.up_proj(n)))
        return rms_norm(embedded, self._eps)
