"""The parts of the text stack. Attribute names are the checkpoint's keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchLinear

from .config import TextConfig
from .prefix import LayerKV, Mask

SCORES = 256 * 2**20  # bytes of attention scores at once; where a whole pass has more, keys come in chunks
CHUNK = 256  # keys; a chunk is a multiple of this
LONGEST = 4096  # keys of a chunk at most: above them a step holds more and is not faster
MATMUL_ROWS = 512  # up to here CUDA gathers rows faster as a product with a one-hot matrix
SORT_FROM = 64  # rows * top_k from which sorting by expert pays: MLX's grouped kernels need it


def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return mx.default_device() == mx.cpu


def fused(function: Callable, shapeless: bool = True) -> Callable:
    """Compile elementwise chains on a GPU; MLX's CPU compiler needs a C++ compiler that may be missing."""
    compiled = mx.compile(function, shapeless=shapeless)

    @wraps(function)
    def call(*args):
        return (function if on_cpu() else compiled)(*args)

    return call


@fused
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """tanh-approximated GELU of `gate`, times `up`."""
    if on_cpu():  # (1 + tanh(u)) / 2 as sigmoid(2 u): powers, tanh and its gradient are slow there
        u = math.sqrt(2 / math.pi) * gate * (1 + 0.044715 * gate * gate)
        return gate * mx.sigmoid(2 * u) * up
    return nn.gelu_approx(gate) * up


def rms_norm(x: mx.array, eps: float) -> mx.array:
    """RMS norm without a weight, computed in float32."""
    return mx.fast.rms_norm(x, None, eps)


class MLP(nn.Module):
    """The dense branch: a GeGLU."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., H] -> [..., H]."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Chooses the experts of each position."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self._eps = config.rms_norm_eps
        self._root = config.hidden_size**-0.5
        self._top_k = config.top_k_experts

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [N, H] -> expert indices and weights, both [N, top_k].

        Softmax over the chosen logits equals softmax over all of them, renormalised to the chosen.
        """
        scores = self.proj(rms_norm(x, self._eps) * self.scale * self._root)
        indices = mx.stop_gradient(mx.argpartition(scores, kth=-self._top_k, axis=-1)[..., -self._top_k :])
        weights = mx.softmax(mx.take_along_axis(scores, indices, axis=-1), axis=-1, precise=True)
        return indices, weights * self.per_expert_scale[indices]


class Experts(nn.Module):
    """The mixture of experts; gate and up lie in one tensor, gate rows first, and take one gather."""

    def __init__(self, config: TextConfig):
        super().__init__()
        size = config.moe_intermediate_size
        self.gate_up_proj = SwitchLinear(config.hidden_size, 2 * size, config.num_experts, bias=False)
        self.down_proj = SwitchLinear(size, config.hidden_size, config.num_experts, bias=False)

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """x [N, H], indices and weights [N, K] -> [N, H]."""
        rows, top_k = indices.shape
        flat = indices.flatten()
        if flat.size < SORT_FROM:
            y = self._feed(x[:, None, None], indices)
        elif pads_runs():
            return self._in_runs(x, flat, weights.flatten())
        else:
            order = mx.argsort(flat)
            # The unit axis comes before the gather: MLX's sorted kernels misread rows that get it after.
            y = self._feed(x[:, None][order // top_k], flat[order], sorted_indices=True)[mx.argsort(order)]
        y = y.reshape(rows, top_k, -1)
        return (y * weights[..., None]).sum(axis=-2).astype(y.dtype)

    def _in_runs(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x [N, H], experts and weights [N * K] in the rows' order -> [N, H], by `runs`."""
        rows, size = x.shape
        # CUDA compiles a gather_qmm for every length, a minute each: packed weights get a single one.
        longest = 64 if isinstance(_base(self.gate_up_proj), SwitchLinear) else 16
        slots, owners, length = runs(chosen, self.gate_up_proj.num_experts, longest)
        source, share = fill(slots, weights, owners.size * length, rows)
        if rows <= MATMUL_ROWS:
            take, mix = one_hot(source, share, rows, x)
            return mix.T @ self._feed((take @ x).reshape(owners.size, length, size), owners).reshape(-1, size)
        y = self._feed(x[mx.minimum(source, rows - 1)].reshape(owners.size, length, size), owners)
        y = y.reshape(-1, size)[slots].reshape(rows, -1, size)
        return (y * weights.reshape(rows, -1, 1)).sum(axis=-2).astype(x.dtype)

    def _feed(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., rows, H] through the expert of each leading index."""
        dtype = x.dtype
        if isinstance(base := _base(self.gate_up_proj), SwitchLinear):
            x = x.astype(base.weight.dtype)  # float32 on the CPU, whatever the rest is
        gate, up = mx.split(self.gate_up_proj(x, indices, sorted_indices=sorted_indices), 2, axis=-1)
        return self.down_proj(geglu(gate, up), indices, sorted_indices=sorted_indices).astype(dtype)


def _base(module: nn.Module) -> nn.Module:
    """The map itself, where an adapter stands around it."""
    return module.get("linear", module)


def pads_runs() -> bool:
    """Whether experts are computed in padded runs.

    CUDA's gather kernels read an expert once for every row, so there its rows are padded to runs that
    read it once each. Metal's sorted kernels tile runs themselves, and on the CPU nothing is gained.
    """
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


def runs(chosen: mx.array, experts: int, longest: int) -> tuple[mx.array, mx.array, int]:
    """Lay rows out in runs of equal length, each of one expert.

    Args:
        chosen: [N] expert of each row.
        experts: how many there are.
        longest: bound of a run's length, a power of two.

    Returns:
        [N] slot of each row, [runs] expert of each run, and the length of a run: a power of two near the
        mean number of rows an expert, 16 at least, so that padding stays below one run an expert.
    """
    count = chosen.size
    length = min(max(16, 1 << (max(count // experts, 1).bit_length() - 1)), longest)
    slots, owners = _lay_out(chosen.astype(mx.int32), experts, length)
    return slots, owners, length


@partial(fused, shapeless=False)
def _lay_out(chosen: mx.array, experts: int, length: int) -> tuple[mx.array, mx.array]:
    numbers = mx.arange(experts, dtype=mx.int32)
    rank = mx.cumsum((chosen[:, None] == numbers).astype(mx.int32), axis=0)
    needed = (rank[-1] + (length - 1)) // length
    ends = mx.cumsum(needed)
    slots = ((ends - needed) * length)[chosen] + mx.take_along_axis(rank, chosen[:, None], axis=1)[:, 0] - 1
    total = chosen.size // length + min(experts, chosen.size)
    owners = (mx.arange(total, dtype=mx.int32)[:, None] >= ends).astype(mx.int32).sum(axis=1)
    return slots, mx.minimum(owners, experts - 1).astype(mx.uint32)


def fill(slots: mx.array, weights: mx.array, total: int, rows: int) -> tuple[mx.array, mx.array]:
    """[total] row that each slot holds, `rows` where it is padding, and its weight, 0 there."""
    source, share = mx.full((total,), rows, mx.int32), mx.zeros((total,), weights.dtype)
    source[slots] = mx.arange(slots.size, dtype=mx.int32) // (slots.size // rows)
    share[slots] = weights
    return source, share


@partial(fused, shapeless=False)
def one_hot(source: mx.array, share: mx.array, rows: int, like: mx.array) -> tuple[mx.array, mx.array]:
    """[slots, rows] matrices in the dtype of `like` that gather rows into slots and, transposed, mix slots to rows."""
    taken = source[:, None] == mx.arange(rows, dtype=mx.int32)
    return taken.astype(like.dtype), mx.where(taken, share[:, None], 0).astype(like.dtype)


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
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask.whole)
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


class Layer(nn.Module):
    """Attention, then a dense branch and a mixture of experts side by side, all sandwich-normed."""

    def __init__(self, config: TextConfig, layer_type: str):
        super().__init__()
        self._layer_type = layer_type
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

    def __call__(self, x: mx.array, scalar: mx.array, see: View) -> mx.array:
        """x [B, L, H] -> [B, L, H]; `scalar` and `see` are the mode's own."""
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), see))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        flat = h.reshape(-1, h.shape[-1])
        sparse = self.experts(self.pre_feedforward_layernorm_2(flat), *self.router(flat)).reshape(h.shape)
        sparse = self.post_feedforward_layernorm_2(sparse)
        return (h + self.post_feedforward_layernorm(dense + sparse)) * scalar


class SelfConditioning(nn.Module):
    """Mixes the previous step's expected embedding into the canvas (decoder only)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.pre_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._eps = config.rms_norm_eps

    def __call__(self, embedded: mx.array, conditioning: mx.array | None) -> mx.array:
        """Both [B, C, H]; None, as in a canvas's first step, is a conditioning of zeros."""
        if conditioning is not None:  # a bias-free GeGLU of zeros is zero
            n = self.pre_norm(conditioning)
            embedded = embedded + self.down_proj(geglu(self.gate_proj(n), self.up_proj(n)))
        return rms_norm(embedded, self._eps)
