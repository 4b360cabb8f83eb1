"""The mixture of experts of a layer and its router. Names of submodules are the checkpoint's keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..upstream import QuantizedSwitchLinear, SwitchLinear
from .config import TextConfig
from .device import fused
from .functions import geglu, rms_norm
from .kernels import launch as kernels

MATMUL_ROWS = 512  # up to so many rows CUDA gathers faster by a product with a one-hot matrix
GROUPED_FROM = 4  # rows an expert, on average, from which Metal reads an expert once for several rows
PAD_FROM = 2  # rows an expert from which it pays to fill up to `GROUPED_FROM` by rows that nobody reads
CPU_RUNS_FROM = 64  # rows an expert from which a CPU computes runs, which a good BLAS multiplies three times as fast
SORT_FROM = 64  # rows * top_k from which sorting by expert is faster; MLX's grouped kernels need sorted rows


class Router(nn.Module):
    """Chooses the experts of each position and their weights."""

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

        The softmax over the chosen logits equals the softmax over all logits, renormalised over the chosen ones.
        """
        scaled = (rms_norm(x, self._eps) * self.scale).astype(mx.float32) * self._root  # the root is not rounded
        scores = self.proj(scaled.astype(x.dtype))
        indices = mx.stop_gradient(mx.argpartition(scores, kth=-self._top_k, axis=-1)[..., -self._top_k :])
        weights = mx.softmax(mx.take_along_axis(scores, indices, axis=-1), axis=-1, precise=True)
        return indices, weights * self.per_expert_scale[indices]

    def choose(self, scaled: mx.array) -> list[mx.array]:
        """As `__call__`, by a custom kernel, of rows [N, H] that were normed and scaled already."""
        return kernels.route(self.proj(scaled), self.per_expert_scale, self._top_k)


class Experts(nn.Module):
    """The mixture of experts. Gate and up are one tensor, gate rows first, so that they take one gather."""

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
            y = self._mlp(x[:, None, None], indices)
        elif uses_padded_runs(flat.size // self.gate_up_proj.num_experts):
            return self._in_padded_runs(x, flat, weights.flatten())
        else:
            order = mx.argsort(flat)
            # The unit axis is added before the gather: MLX's sorted kernels misread rows that get it afterwards.
            y = self._mlp(x[:, None][order // top_k], flat[order], sorted_indices=True)[mx.argsort(order)]
        y = y.reshape(rows, top_k, -1)
        return (y * weights[..., None]).sum(axis=-2).astype(y.dtype)

    def rows(self, x: mx.array, chosen: mx.array) -> tuple[mx.array, mx.array]:
        """As `__call__`, by custom kernels and before rows are summed.

        Args:
            x: [N, H].
            chosen: [N, K] uint32.

        Returns:
            What the experts make of the rows, [S, H] in order of slots, and the slots of each row, [N, K] int32.
        """
        experts, size = self.gate_up_proj.num_experts, x.shape[-1]
        if uses_padded_runs() and 2 * chosen.size > experts:
            length = self._run_length(chosen.size)
            runs = kernels.lay_out(chosen, experts, length)
            y = self._mlp(kernels.take_rows(x, runs.source, length), runs.owners, activate=kernels.geglu)
        elif chosen.size < PAD_FROM * experts:
            return self._few_rows(x, chosen).reshape(-1, size), places(chosen.shape, np.int32)
        else:
            runs = kernels.lay_out(chosen, experts, 1, GROUPED_FROM * experts)
            y = self._mlp(kernels.take_rows(x, runs.source, 1), runs.owners, True, kernels.geglu)
        return y.reshape(-1, size), runs.slots

    def _few_rows(self, x: mx.array, chosen: mx.array) -> mx.array:
        """[N, K, 1, H], what each chosen expert makes of its row; all numbers of rows are arrays of the host."""
        up, down = self.gate_up_proj, self.down_proj
        both = gather(up, x[:, None, None], places((len(x), 1), np.uint32), chosen)
        return gather(down, kernels.geglu(both), places(chosen.shape, np.uint32), chosen).astype(x.dtype)

    def _run_length(self, count: int) -> int:
        # CUDA compiles gather_qmm for every length, which takes a minute: quantized weights use a single length.
        longest = 64 if isinstance(_without_adapter(self.gate_up_proj), SwitchLinear) else 16
        return run_length(count, self.gate_up_proj.num_experts, longest)

    def _in_padded_runs(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """As `__call__`, by runs of equal length: x [N, H], experts and weights [N * K] in order of rows -> [N, H]."""
        rows, size = x.shape
        length = self._run_length(chosen.size)
        slots, owners = lay_out_runs(chosen, self.gate_up_proj.num_experts, length)
        source, share = slot_contents(slots, weights, owners.size * length, rows)
        if gathers_by_products(rows):
            take, mix = gather_matrices(source, share, rows, x)
            return mix.T @ self._mlp((take @ x).reshape(owners.size, length, size), owners).reshape(-1, size)
        y = self._mlp(x[mx.minimum(source, rows - 1)].reshape(owners.size, length, size), owners)
        y = y.reshape(-1, size)[slots].reshape(rows, -1, size)
        return (y * weights.reshape(rows, -1, 1)).sum(axis=-2).astype(x.dtype)

    def _mlp(
        self,
        x: mx.array,
        indices: mx.array,
        sorted_indices: bool = False,
        activate: Callable[[mx.array], mx.array] = lambda both: geglu(*mx.split(both, 2, axis=-1)),
    ) -> mx.array:
        """x [..., rows, H] through the experts of `indices` [...]."""
        dtype = x.dtype
        if isinstance(base := _without_adapter(self.gate_up_proj), SwitchLinear):
            x = x.astype(base.weight.dtype)  # on the CPU experts are float32 whatever the dtype of activations
        both = self.gate_up_proj(x, indices, sorted_indices=sorted_indices)
        return self.down_proj(activate(both), indices, sorted_indices=sorted_indices).astype(dtype)


def mix_rows(rows: mx.array, slots: mx.array, shares: mx.array) -> mx.array:
    """The rows of each position by their shares: rows [S, H], slots and shares [N, K] -> [N, H]."""
    return (shares[:, None] @ rows[slots])[:, 0]


def places(shape: tuple[int, ...], dtype: type[np.integer]) -> mx.array:
    """0, 1, 2, ... in an array of the host; `mx.arange` is a launch."""
    return mx.array(np.arange(np.prod(shape), dtype=dtype).reshape(shape))


def gather(module: Any, x: mx.array, rows: mx.array, experts: mx.array) -> mx.array:
    """Rows of x [..., 1, I] through experts, both given by numbers of one shape or broadcast to it: [..., 1, O].

    A module's own call lets MLX number the rows, which is a launch.
    """
    if type(module) is SwitchLinear and "bias" not in module:
        return mx.gather_mm(x, module.weight.swapaxes(-1, -2), rows, experts)
    if type(module) is QuantizedSwitchLinear and "bias" not in module and module.get("global_scale") is None:
        return mx.gather_qmm(
            x, module.weight, module.scales, module.get("biases"), rows, experts,
            transpose=True, group_size=module.group_size, bits=module.bits, mode=module.mode,
        )  # fmt: skip
    return module(x, experts)


def _without_adapter(module: nn.Module) -> nn.Module:
    """The linear map inside an adapter's module, or the module itself."""
    return module.get("linear", module)


def uses_padded_runs(rows: int = 0) -> bool:
    """Whether experts are computed in padded runs: on CUDA, and on a CPU where each has many rows on average.

    CUDA's gather kernels read the expert once for every row, and a CPU multiplies them one by one. Runs of several rows
    read it once each. Metal's sorted kernels tile the rows themselves.
    """
    if mx.default_device() == mx.cpu:
        return rows >= CPU_RUNS_FROM
    return not mx.metal.is_available()


def gathers_by_products(rows: int) -> bool:
    """Whether rows are gathered and mixed by products with one-hot matrices, which is faster for few rows on CUDA."""
    return rows <= MATMUL_ROWS and mx.default_device() != mx.cpu


def run_length(count: int, experts: int, longest: int) -> int:
    """Slots of a run: a power of two near the mean of `count` rows an expert, from 16 to `longest`."""
    return min(max(16, 1 << (max(count // experts, 1).bit_length() - 1)), longest)


def lay_out_runs(chosen: mx.array, experts: int, length: int) -> tuple[mx.array, mx.array]:
    """Assign rows to the slots of runs of equal length; a run holds rows of one expert, then padding.

    Args:
        chosen: [N] expert of each row.
        experts: number of experts.
        length: of a run. `run_length` keeps the padding below one run per expert.

    Returns:
        [N] slot of each row, and [runs] expert of each run.
    """
    return _assign_slots(chosen.astype(mx.int32), experts, length)


@partial(fused, shapeless=False)
def _assign_slots(chosen: mx.array, experts: int, length: int) -> tuple[mx.array, mx.array]:
    numbers = mx.arange(experts, dtype=mx.int32)
    rank = mx.cumsum((chosen[:, None] == numbers).astype(mx.int32), axis=0)
    needed = (rank[-1] + (length - 1)) // length
    ends = mx.cumsum(needed)
    slots = ((ends - needed) * length)[chosen] + mx.take_along_axis(rank, chosen[:, None], axis=1)[:, 0] - 1
    total = chosen.size // length + min(experts, chosen.size)
    owners = (mx.arange(total, dtype=mx.int32)[:, None] >= ends).astype(mx.int32).sum(axis=1)
    return slots, mx.minimum(owners, experts - 1).astype(mx.uint32)


def slot_contents(slots: mx.array, weights: mx.array, total: int, rows: int) -> tuple[mx.array, mx.array]:
    """What each slot holds: [total] its row, or `rows` for padding, and [total] its weight, 0 for padding."""
    source, share = mx.full((total,), rows, mx.int32), mx.zeros((total,), weights.dtype)
    source[slots] = mx.arange(slots.size, dtype=mx.int32) // (slots.size // rows)
    share[slots] = weights
    return source, share


@partial(fused, shapeless=False)
def gather_matrices(source: mx.array, share: mx.array, rows: int, like: mx.array) -> tuple[mx.array, mx.array]:
    """Two [slots, rows] matrices in the dtype of `like`.

    The first times x [rows, H] gathers the rows into slots. The second, transposed, sums the slots of a row by weight.
    """
    taken = source[:, None] == mx.arange(rows, dtype=mx.int32)
    return taken.astype(like.dtype), mx.where(taken, share[:, None], 0).astype(like.dtype)
