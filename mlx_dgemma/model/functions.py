"""Functions of arrays that several modules of the model share."""

from __future__ import annotations

import math

import mlx.core as mx

from .device import fused, on_cpu


@fused
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """tanh-approximated GELU of `gate`, times `up`."""
    if on_cpu():  # (1 + tanh(u)) / 2 as sigmoid(2 u): powers, tanh and its gradient are slow there
        u = math.sqrt(2 / math.pi) * gate * (1 + 0.044715 * gate * gate)
        return gate * mx.sigmoid(2 * u) * up
    x = gate.astype(mx.float32)  # products with small numbers are rounded once
    x = 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return x.astype(gate.dtype) * up


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """RMS norm without a weight, computed in float32."""
    return mx.fast.rms_norm(x, None, eps)


def entropy(logits: mx.array) -> mx.array:
    """[B, C, V] float32 -> Shannon entropy [B, C] in nats."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(log_p) * log_p).sum(axis=-1)


def finite(x: mx.array) -> mx.array:
    """[B, ...] -> [B] bool, false for rows that hold inf or NaN: 0 times these is NaN."""
    return (x * 0).reshape(x.shape[0], -1).sum(axis=-1) == 0
