"""The weights of one layer rounded on the inputs that its modules get, one group of modules after the other.

What a module is rounded on is what the modules before it compute once they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.model.experts import Experts
from mlx_dgemma.model.functions import geglu
from mlx_dgemma.model.layers import MLP, Layer, SelfConditioning

from ..recipes import Quantization
from .gptq import DAMPINGS, Columns, Rounded, gptq, prepare
from .replay import Replay, by_rows

EXPERT_BYTES = 512 * 2**20  # of second moments and their factors at once
SHARED_ROWS = 512  # of all positions, for experts that few of them choose
RUN, RUNS = 64, 8  # of so many runs of positions that follow each other, one judges what the others made
Choose = Callable[[str], Quantization | None]


@dataclass(frozen=True)
class Module:
    """What was done with one weight.

    Attributes:
        path: of the module.
        nearest: squared error of the outputs with the nearest codes, as a share of the squared outputs; on positions
            that were kept apart.
        error: the same as it was rounded.
        few: experts that fewer positions chose than they have inputs, rounded on positions of others as well.
        kept: matrices that kept their nearest codes, since none of the others came closer on these positions.
    """

    path: str
    nearest: float
    error: float
    few: int = 0
    kept: int = 0


class Moments(NamedTuple):
    """Second moments of inputs, the sums of x x^T, [..., I, I] float32."""

    fitted: mx.array  # of the positions that weights are rounded on
    judged: mx.array  # of those that were kept apart

    @classmethod
    def of(cls, rows: mx.array) -> Moments:
        """Of rows [N, I] of all positions."""
        rows, apart = rows.astype(mx.float32), kept_apart(np.arange(rows.shape[0]))
        parts = [rows * mx.array(one[:, None].astype(np.float32)) for one in (~apart, apart)]
        found = cls(*(one.T @ one for one in parts))
        mx.eval(found)
        return found

    @property
    def columns(self) -> list[Columns]:
        """What `gptq` takes, by damping."""
        return [prepare(self.fitted, damping) for damping in DAMPINGS]


def kept_apart(positions: np.ndarray) -> np.ndarray:
    """Which positions judge, [N] bool: runs, because neighbours have much in common."""
    return positions // RUN % RUNS == RUNS - 1


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

    def weight(self, path: str, module: Any, moments: Moments, columns: Sequence[Columns] | None = None) -> None:
        """Round the weight [O, I] of a linear map by the second moments of its inputs.

        Maps of the same inputs share `columns`.
        """
        quantization = self.choose(path)
        if quantization is None:
            return
        if quantization.mode != "affine":
            module.weight = nearest(module.weight, quantization, self.dtype)
            return
        found = best(module.weight[None], Moments(*(one[None] for one in moments)), quantization, self.dtype, columns)
        self.keep(path, Rounded(*(one[0] for one in found.made)), found.squares, found.kept)
        module.weight = found.values[0]

    def keep(self, path: str, made: Rounded, squares: np.ndarray, kept: int, few: int = 0) -> None:
        """Keep a result; `squares` are the outputs', and those of both errors."""
        mx.eval(made)
        self.rounded[path] = made
        near, error = (squares[1:] / max(squares[0], 1e-30)).tolist()
        self.modules.append(Module(path, near, error, few, kept))


class Best(NamedTuple):
    """What matrices became."""

    made: Rounded  # [E, ...]
    values: mx.array  # [E, O, I] float32
    squares: np.ndarray  # [3], of the outputs where it is judged, and of the errors of nearest codes and of these
    kept: int  # matrices with their nearest codes


def best(
    weight: mx.array,
    moments: Moments,
    quantization: Quantization,
    dtype: mx.Dtype,
    columns: Sequence[Columns] | None = None,
) -> Best:
    """Round matrices [E, O, I] with every damping; each takes what errs least on the positions that were kept apart.

    The nearest codes are among the candidates.
    """
    weight = weight.astype(mx.float32)
    best_made = Rounded(*mx.quantize(weight.astype(dtype), **quantization.as_dict))
    whole = _squares(weight, moments.judged)
    near = least = _squares(values(best_made, quantization) - weight, moments.judged)
    kept = mx.ones(least.shape, mx.bool_)
    for one in columns or (prepare(moments.fitted, damping) for damping in DAMPINGS):
        made = gptq(weight, one, quantization, dtype)
        error = _squares(values(made, quantization) - weight, moments.judged)
        better = error < least
        best_made = Rounded(*(mx.where(better[:, None, None], new, old) for new, old in zip(made, best_made)))
        least, kept = mx.where(better, error, least), kept & ~better
        mx.eval(best_made, least, kept)
    squares = np.array([float(one.sum()) for one in (whole, near, least)])
    return Best(best_made, values(best_made, quantization), squares, int(kept.sum()))


def _squares(weight: mx.array, moment: mx.array) -> mx.array:
    """Squared outputs of matrices [E, O, I] for inputs of a second moment, [E]."""
    return ((weight @ moment) * weight).sum(axis=(-1, -2))


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
    moments = Moments.of(layer.input_layernorm(replay.h))
    columns = moments.columns
    for name in ("q_proj", "k_proj", "v_proj"):
        if name in attention:
            work.weight(f"{path}.self_attn.{name}", attention[name], moments, columns)
    output, attention.o_proj = attention.o_proj, nn.Identity()
    rows = replay.attend(index, lambda x, context: attention(layer.input_layernorm(x), context))
    attention.o_proj = output
    work.weight(f"{path}.self_attn.o_proj", output, Moments.of(rows))
    h = replay.h + by_rows(lambda some: layer.post_attention_layernorm(output(some)), rows)
    dense = round_mlp(f"{path}.mlp", layer.mlp, layer.pre_feedforward_layernorm(h), work)
    proj = router.proj
    router.proj = kept = Inputs(proj)
    mx.eval(router(h))
    router.proj = proj
    work.weight(f"{path}.router.proj", proj, Moments.of(kept.rows))
    chosen, x = router(h), layer.pre_feedforward_layernorm_2(h)
    round_experts(f"{path}.experts", layer.experts, (x, *chosen), work)
    sparse = by_rows(layer.experts, x, *chosen)
    both = layer.post_feedforward_layernorm_1(dense) + layer.post_feedforward_layernorm_2(sparse)
    replay.h = (h + layer.post_feedforward_layernorm(both)) * replay.factors(*scalars)
    mx.eval(replay.h)


def round_mlp(path: str, mlp: MLP | SelfConditioning, rows: mx.array, work: LayerRounding) -> mx.array:
    """Round a GeGLU's three maps on its inputs [N, H]; returns its outputs [N, H]."""
    moments = Moments.of(rows)
    columns = moments.columns
    for name in ("gate_proj", "up_proj"):
        work.weight(f"{path}.{name}", mlp[name], moments, columns)
    inner = by_rows(lambda some: geglu(mlp.gate_proj(some), mlp.up_proj(some)), rows)
    work.weight(f"{path}.down_proj", mlp.down_proj, Moments.of(inner))
    return by_rows(mlp.down_proj, inner)


@dataclass
class _Chosen:
    """The rows of one expert: [n, I] its inputs, [n] its shares of them, [n] whether one judges; and some of all.

    There is at least one row: a product of none ends the process on CUDA. Its share is 0 where nobody chose the expert.
    """

    own: mx.array
    shares: np.ndarray
    apart: np.ndarray
    others: mx.array

    def through(self, weight: mx.array) -> _Chosen:
        """The rows behind gate and up."""
        own, others = (geglu(*mx.split(rows @ weight.T, 2, axis=-1)) for rows in (self.own, self.others))
        return _Chosen(own, self.shares, self.apart, others)

    @property
    def few(self) -> bool:
        return int((self.shares > 0).sum()) < self.own.shape[1]

    def moments(self) -> Moments:
        """Rows weighed by the squares of their shares; where they are few, others fill them up."""
        found = []
        everyone = self.others.T @ self.others / self.others.shape[0]
        width = self.own.shape[1]
        for mask, wanted in ((~self.apart, width), (self.apart, width // RUNS)):
            shares = self.shares * mask
            weighed = self.own * mx.array(shares)[:, None]
            count = int((shares > 0).sum())
            share = float((shares * shares).sum()) / count if count else 1.0
            found.append(weighed.T @ weighed + everyone * (share * max(wanted - count, 0)))
        return Moments(*found)


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
    kept = dict.fromkeys(maps, 0)
    others = x[mx.array(np.linspace(0, len(x) - 1, min(len(x), SHARED_ROWS)).astype(np.int32))]
    count, step = maps["gate_up_proj"].weight.shape[0], max(1, EXPERT_BYTES // (24 * x.shape[-1] ** 2))
    for start in range(0, count, step):
        stop = min(start + step, count)
        found = []
        for expert in range(start, stop):
            where, place = np.nonzero(chosen == expert)
            own, where = (shares[where, place], where) if len(where) else (np.zeros(1, np.float32), np.zeros(1, int))
            found.append(_Chosen(x[mx.array(where.astype(np.int32))], own, kept_apart(where), others))
        for name, one in maps.items():
            weight, quantization = one.weight[start:stop], how[name]
            if name == "down_proj":
                found = [rows.through(w) for rows, w in zip(found, maps["gate_up_proj"].weight[start:stop])]
            if quantization is None:
                continue
            if quantization.mode == "affine":
                moments = Moments(*(mx.stack(list(some)) for some in zip(*(rows.moments() for rows in found))))
                became = best(weight, moments, quantization, work.dtype)
                made[name].append(became.made)
                few[name] += sum(rows.few for rows in found)
                kept[name] += became.kept
                squares[name] += became.squares
                one.weight[start:stop] = became.values
            else:
                one.weight[start:stop] = nearest(weight, quantization, work.dtype)
            mx.eval(one.weight)
        mx.clear_cache()
    for name, parts in made.items():
        if parts:
            whole = Rounded(*(mx.concatenate(list(part)) for part in zip(*parts)))
            work.keep(f"{path}.{name}", whole, squares[name], kept[name], few[name])


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
