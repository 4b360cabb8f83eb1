"""The weights of one layer rounded on the inputs that its modules get, one group of modules after the other.

What a module is rounded on is what the modules before it compute once they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.model.functions import geglu
from mlx_dgemma.model.layers import MLP, Layer, SelfConditioning

from ..recipes import Quantization
from .gptq import Rounded, gptq
from .replay import Replay, by_rows

EXPERT_BYTES = 512 * 2**20  # of second moments and their factors at once
SHARED_ROWS = 512  # of all positions, for experts that few of them choose
Choose = Callable[[str, int], Quantization | None]


@dataclass(frozen=True)
class Module:
    """What was done with one weight.

    Attributes:
        path: of the module.
        plain: error of the nearest codes, as a share of the squared outputs.
        error: the same as it was rounded.
        few: experts that had fewer rows than inputs, and were rounded on rows of all positions as well.
    """

    path: str
    plain: float
    error: float
    few: int = 0


@dataclass
class LayerRounding:
    """Rounds modules, puts what they have become in their place, and keeps it.

    Args:
        choose: the quantization of a module by its path and inputs, None where it stays as it is or takes its nearest
            codes.
        dtype: of scales and biases.
    """

    choose: Choose
    dtype: mx.Dtype
    rounded: dict[str, Rounded] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)

    def weight(self, path: str, module: nn.Module, moment: mx.array) -> None:
        """Round the weight [O, I] of a linear map by the second moment [I, I] of its inputs."""
        quantization = self.choose(path, module.weight.shape[-1])
        if quantization is None:
            return
        made = gptq(module.weight, moment, quantization, self.dtype)
        found = values(made, quantization)
        losses = _losses(module.weight, plain(module.weight, quantization, self.dtype), found, moment)
        module.weight = found
        self.rounded[path] = made
        self.modules.append(Module(path, losses[1] / losses[0], losses[2] / losses[0]))
        mx.eval(made, module.weight)


def round_layer(
    replay: Replay, layer: Layer, index: int, scalars: tuple[mx.array, mx.array], work: LayerRounding
) -> None:
    """Round a layer's weights in place, and take the states behind it as the layer itself would.

    Args:
        replay: the states in front of it.
        layer: float32.
        index: its place in the stack.
        scalars: its factor as encoder and as decoder.
        work: takes the result.
    """
    path, attention = f"model.decoder.layers.{index}", layer.self_attn
    moment = second_moment(layer.input_layernorm(replay.h))
    for name in ("q_proj", "k_proj", "v_proj"):
        if name in attention:
            work.weight(f"{path}.self_attn.{name}", attention[name], moment)
    output, attention.o_proj = attention.o_proj, nn.Identity()
    rows = replay.attend(index, lambda x, context: attention(layer.input_layernorm(x), context))
    attention.o_proj = output
    work.weight(f"{path}.self_attn.o_proj", output, second_moment(rows))
    h = replay.h + by_rows(lambda some: layer.post_attention_layernorm(output(some)), rows)
    dense = round_mlp(f"{path}.mlp", layer.mlp, layer.pre_feedforward_layernorm(h), work)
    router, proj = layer.router, layer.router.proj
    router.proj = kept = Inputs(proj)
    mx.eval(router(h))
    router.proj = proj
    work.weight(f"{path}.router.proj", proj, second_moment(kept.rows))
    chosen, x = router(h), layer.pre_feedforward_layernorm_2(h)
    round_experts(f"{path}.experts", layer.experts, (x, *chosen), work)
    sparse = by_rows(layer.experts, x, *chosen)
    both = layer.post_feedforward_layernorm_1(dense) + layer.post_feedforward_layernorm_2(sparse)
    replay.h = (h + layer.post_feedforward_layernorm(both)) * replay.factors(*scalars)
    mx.eval(replay.h)


def second_moment(rows: mx.array) -> mx.array:
    """[I, I], the sum of x x^T over rows [N, I]."""
    moment = rows.T @ rows
    mx.eval(moment)
    return moment


def round_mlp(path: str, mlp: MLP | SelfConditioning, rows: mx.array, work: LayerRounding) -> mx.array:
    """Round a GeGLU's three maps on its inputs [N, H]; returns its outputs [N, H]."""
    moment = second_moment(rows)
    for name in ("gate_proj", "up_proj"):
        work.weight(f"{path}.{name}", mlp[name], moment)
    inner = by_rows(lambda some: geglu(mlp.gate_proj(some), mlp.up_proj(some)), rows)
    work.weight(f"{path}.down_proj", mlp.down_proj, second_moment(inner))
    return by_rows(mlp.down_proj, inner)


def round_experts(path: str, experts: nn.Module, rows: tuple[mx.array, ...], work: LayerRounding) -> None:
    """Round the experts, some at a time, each on the positions that chose it, which count by the square of its share.

    An expert that fewer positions chose than it has inputs is rounded on some of all positions as well.

    Args:
        path: of the module.
        experts: its weights are replaced.
        rows: [N, H] inputs, [N, K] experts and [N, K] their shares.
        work: takes the result.
    """
    x, chosen, shares = rows
    up, down = experts.gate_up_proj, experts.down_proj
    how = [work.choose(f"{path}.{name}_proj", one.weight.shape[-1]) for name, one in (("gate_up", up), ("down", down))]
    chosen, shares = np.asarray(chosen), np.asarray(shares.astype(mx.float32))
    count, width = up.weight.shape[0], x.shape[-1]
    step = max(1, EXPERT_BYTES // (4 * 4 * width * width))
    some = x[mx.array(np.linspace(0, len(x) - 1, min(len(x), SHARED_ROWS)).astype(np.int32))]
    made: list[list[Rounded]] = [[], []]
    losses = np.zeros((2, 3))
    few = np.zeros(2, int)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        found = [_chosen_by(expert, x, chosen, shares, some) for expert in range(part.start, part.stop)]
        for i, (one, quantization) in enumerate(zip((up, down), how)):
            weight = one.weight[part]
            pairs = found if i == 0 else [
                tuple(geglu(*mx.split(r @ w.T, 2, axis=-1)) for r in own[:2]) + own[2:]
                for own, w in zip(found, up.weight[part])
            ]
            if quantization is None:
                continue
            size = weight.shape[-1]
            moments = mx.stack([_moment(own, share, everything, size) for own, everything, share in pairs])
            few[i] += sum(own.shape[0] < size for own, _, _ in pairs)
            made[i].append(gptq(weight, moments, quantization, work.dtype))
            new = values(made[i][-1], quantization)
            losses[i] += _losses(weight, plain(weight, quantization, work.dtype), new, moments)
            one.weight[part] = new
            mx.eval(made[i][-1], one.weight)
    for i, name in enumerate(("gate_up_proj", "down_proj")):
        if how[i] is not None:
            work.rounded[f"{path}.{name}"] = Rounded(*(mx.concatenate(part) for part in zip(*made[i])))
            own = losses[i]
            work.modules.append(Module(f"{path}.{name}", own[1] / own[0], own[2] / own[0], int(few[i])))


def _chosen_by(
    expert: int, x: mx.array, chosen: np.ndarray, shares: np.ndarray, some: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(inputs of an expert [n, H], some of all inputs, its shares [n])."""
    where, place = np.nonzero(chosen == expert)
    return x[mx.array(where.astype(np.int32))], some, mx.array(shares[where, place])


def _moment(own: mx.array, share: mx.array, everything: mx.array, size: int) -> mx.array:
    """The second moment [I, I] of an expert's inputs, with some of all positions' where there are few."""
    weighted = own * share[:, None]
    moment = weighted.T @ weighted
    missing = max(size - own.shape[0], 0)
    if missing:
        mean = (share * share).mean() if own.shape[0] else 1.0
        moment = moment + (everything.T @ everything) * (mean * missing / everything.shape[0])
    return moment


def plain(weight: mx.array, quantization: Quantization, dtype: mx.Dtype) -> mx.array:
    """The values of the nearest codes."""
    made = mx.quantize(weight.astype(dtype), **quantization.as_dict)
    return values(Rounded(*made), quantization)


def values(made: Rounded, quantization: Quantization) -> mx.array:
    """The float32 values that a quantized weight stands for."""
    scales, biases = (one.astype(mx.float32) for one in made[1:])
    return mx.dequantize(made.weight, scales, biases, **quantization.as_dict)


def _losses(weight: mx.array, plain: mx.array, made: mx.array, moment: mx.array) -> list[float]:
    """Squared outputs, and their squared errors with the nearest codes and as rounded."""
    return [float(((one @ moment) * one).sum()) for one in (weight, plain - weight, made - weight)]


class Inputs(nn.Module):
    """Keeps the rows that a map gets, and hands them on to it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module, self.rows = module, mx.zeros(0)

    def __call__(self, x: mx.array) -> mx.array:
        self.rows = x
        return self._module(x)
