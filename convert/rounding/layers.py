"""The weights of one layer rounded on the inputs that its modules get, one group of modules after the other.

What a module is rounded on is what the modules before it compute once they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.model.experts import Experts
from mlx_dgemma.model.functions import geglu
from mlx_dgemma.model.layers import MLP, Layer, SelfConditioning

from ..recipes import Quantization
from .gptq import Rounded, gptq, inverse_root
from .replay import Replay, by_rows

EXPERT_BYTES = 512 * 2**20  # of second moments and their factors at once
SHARED_ROWS = 512  # of all positions, for experts that few of them choose
Choose = Callable[[str], Quantization | None]


@dataclass(frozen=True)
class Module:
    """What was done with one weight.

    Attributes:
        path: of the module.
        nearest: squared error of the outputs with the nearest codes, as a share of the squared outputs.
        error: the same as it was rounded.
        few: experts that fewer positions chose than they have inputs, rounded on positions of others as well.
    """

    path: str
    nearest: float
    error: float
    few: int = 0


@dataclass(frozen=True)
class Moment:
    """The second moment of inputs, which maps share: `matrix` [I, I] float32, the sum of x x^T."""

    matrix: mx.array

    @classmethod
    def of(cls, rows: mx.array) -> Moment:
        """Of rows [N, I]."""
        rows = rows.astype(mx.float32)
        matrix = rows.T @ rows
        mx.eval(matrix)
        return cls(matrix)

    @cached_property
    def root(self) -> mx.array:
        """What `gptq` takes."""
        return inverse_root(self.matrix)


@dataclass
class LayerRounding:
    """Rounds modules, puts what they have become in their place, and keeps it.

    Attributes:
        choose: the quantization of the module at a path, None where it stays as it is.
        dtype: of scales and biases.
        rounded: {module path: its new weight}. Modes other than affine take their nearest codes and are not in it.
        modules: what was done with them.
    """

    choose: Choose
    dtype: mx.Dtype
    rounded: dict[str, Rounded] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)

    def weight(self, path: str, module: Any, moment: Moment) -> None:
        """Round the weight [O, I] of a linear map by the second moment of its inputs."""
        quantization = self.choose(path)
        if quantization is None:
            return
        near = nearest(module.weight, quantization, self.dtype)
        if quantization.mode != "affine":
            module.weight = near
            return
        made = gptq(module.weight, moment.root, quantization, self.dtype)
        found = values(made, quantization)
        self.keep(path, made, losses(module.weight, near, found, moment.matrix))
        module.weight = found

    def keep(self, path: str, made: Rounded, squares: np.ndarray, few: int = 0) -> None:
        """Keep a result; `squares` are the outputs', and those of both errors."""
        mx.eval(made)
        self.rounded[path] = made
        near, error = (squares[1:] / max(squares[0], 1e-30)).tolist()
        self.modules.append(Module(path, near, error, few))


def round_layer(
    replay: Replay, layer: Layer, index: int, scalars: tuple[mx.array, mx.array], work: LayerRounding
) -> None:
    """Round a layer's weights in place, and take the states behind it as the layer itself would.

    Args:
        replay: the states in front of it.
        layer: its weights are replaced.
        index: its place in the stack.
        scalars: its factor as encoder and as decoder.
        work: takes the result.
    """
    path = f"model.decoder.layers.{index}"
    attention: Any = layer.self_attn
    router: Any = layer.router
    moment = Moment.of(layer.input_layernorm(replay.h))
    for name in ("q_proj", "k_proj", "v_proj"):
        if name in attention:
            work.weight(f"{path}.self_attn.{name}", attention[name], moment)
    output, attention.o_proj = attention.o_proj, nn.Identity()
    rows = replay.attend(index, lambda x, context: attention(layer.input_layernorm(x), context))
    attention.o_proj = output
    work.weight(f"{path}.self_attn.o_proj", output, Moment.of(rows))
    h = replay.h + by_rows(lambda some: layer.post_attention_layernorm(output(some)), rows)
    dense = round_mlp(f"{path}.mlp", layer.mlp, layer.pre_feedforward_layernorm(h), work)
    proj = router.proj
    router.proj = kept = Inputs(proj)
    mx.eval(router(h))
    router.proj = proj
    work.weight(f"{path}.router.proj", proj, Moment.of(kept.rows))
    chosen, x = router(h), layer.pre_feedforward_layernorm_2(h)
    round_experts(f"{path}.experts", layer.experts, (x, *chosen), work)
    sparse = by_rows(layer.experts, x, *chosen)
    both = layer.post_feedforward_layernorm_1(dense) + layer.post_feedforward_layernorm_2(sparse)
    replay.h = (h + layer.post_feedforward_layernorm(both)) * replay.factors(*scalars)
    mx.eval(replay.h)


def round_mlp(path: str, mlp: MLP | SelfConditioning, rows: mx.array, work: LayerRounding) -> mx.array:
    """Round a GeGLU's three maps on its inputs [N, H]; returns its outputs [N, H]."""
    moment = Moment.of(rows)
    for name in ("gate_proj", "up_proj"):
        work.weight(f"{path}.{name}", mlp[name], moment)
    inner = by_rows(lambda some: geglu(mlp.gate_proj(some), mlp.up_proj(some)), rows)
    work.weight(f"{path}.down_proj", mlp.down_proj, Moment.of(inner))
    return by_rows(mlp.down_proj, inner)


@dataclass
class _Chosen:
    """The rows of one expert: [n, I] its inputs, [n] its shares of them, and some of all positions' [m, I]."""

    own: mx.array
    shares: mx.array
    others: mx.array

    def through(self, weight: mx.array) -> _Chosen:
        """The rows behind gate and up."""
        own, others = (geglu(*mx.split(rows @ weight.T, 2, axis=-1)) for rows in (self.own, self.others))
        return _Chosen(own, self.shares, others)

    @property
    def few(self) -> bool:
        return self.own.shape[0] < self.own.shape[1]

    def moment(self) -> mx.array:
        """[I, I], rows weighed by the squares of their shares; where they are few, others fill them up."""
        weighed = self.own * self.shares[:, None]
        moment = weighed.T @ weighed
        if self.few:
            missing, count = self.own.shape[1] - self.own.shape[0], self.own.shape[0]
            share = (self.shares * self.shares).mean() if count else 1.0
            moment = moment + (self.others.T @ self.others) * (share * missing / self.others.shape[0])
        return moment


def round_experts(path: str, experts: Experts, rows: tuple[mx.array, mx.array, mx.array], work: LayerRounding) -> None:
    """Round the experts, some at a time, each on the positions that chose it.

    An expert that fewer positions chose than it has inputs is rounded on positions of others as well.

    Args:
        path: of the module.
        experts: its weights are replaced.
        rows: [N, H] inputs, [N, K] experts and [N, K] their shares.
        work: takes the result.
    """
    x, chosen, shares = rows[0], np.asarray(rows[1]), np.asarray(rows[2].astype(mx.float32))
    maps = {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
    how = {name: work.choose(f"{path}.{name}") for name in maps}
    made: dict[str, list[Rounded]] = {name: [] for name in maps}
    squares, few = {name: np.zeros(3) for name in maps}, dict.fromkeys(maps, 0)
    others = x[mx.array(np.linspace(0, len(x) - 1, min(len(x), SHARED_ROWS)).astype(np.int32))]
    count, step = maps["gate_up_proj"].weight.shape[0], max(1, EXPERT_BYTES // (16 * x.shape[-1] ** 2))
    for start in range(0, count, step):
        stop = min(start + step, count)
        found = []
        for expert in range(start, stop):
            where, place = np.nonzero(chosen == expert)
            found.append(_Chosen(x[mx.array(where.astype(np.int32))], mx.array(shares[where, place]), others))
        for name, one in maps.items():
            weight, quantization = one.weight[start:stop], how[name]
            if name == "down_proj":
                found = [rows.through(w) for rows, w in zip(found, maps["gate_up_proj"].weight[start:stop])]
            if quantization is None:
                continue
            new = near = nearest(weight, quantization, work.dtype)
            if quantization.mode == "affine":
                moments = mx.stack([rows.moment() for rows in found])
                few[name] += sum(rows.few for rows in found)
                made[name].append(gptq(weight, inverse_root(moments), quantization, work.dtype))
                new = values(made[name][-1], quantization)
                squares[name] += losses(weight, near, new, moments)
                mx.eval(made[name][-1])
            one.weight[start:stop] = new
            mx.eval(one.weight)
        mx.clear_cache()
    for name, parts in made.items():
        if parts:
            whole = Rounded(*(mx.concatenate(list(part)) for part in zip(*parts)))
            work.keep(f"{path}.{name}", whole, squares[name], few[name])


class Inputs(nn.Module):
    """Keeps the rows that a map gets, and hands them on to it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module, self.rows = module, mx.zeros(0)

    def __call__(self, x: mx.array) -> mx.array:
        """As the map itself."""
        self.rows = x
        return self._module(x)


def nearest(weight: mx.array, quantization: Quantization, dtype: mx.Dtype) -> mx.array:
    """The float32 values of the nearest codes, as a conversion rounds otherwise."""
    made = mx.quantize(weight.astype(dtype), **quantization.as_dict)
    return mx.dequantize(*made, **quantization.as_dict).astype(mx.float32)


def values(made: Rounded, quantization: Quantization) -> mx.array:
    """The float32 values that a quantized weight stands for."""
    scales, biases = made.scales.astype(mx.float32), made.biases.astype(mx.float32)
    return mx.dequantize(made.weight, scales, biases, **quantization.as_dict)


def losses(weight: mx.array, near: mx.array, made: mx.array, moment: mx.array) -> np.ndarray:
    """Squared outputs of inputs with a second moment, and the squared errors of two roundings; [3]."""
    weight = weight.astype(mx.float32)
    return np.array([float(((one @ moment) * one).sum()) for one in (weight, near - weight, made - weight)])
