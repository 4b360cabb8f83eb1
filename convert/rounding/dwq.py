"""Distilled weight quantization: scales and biases trained towards what the source predicts; the codes stay.

The idea is that of mlx-lm's DWQ. Here the states are those that the sampler visits, and prefixes are encoded by the
quantized model itself, so that what the encoder gets wrong is learned as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_dgemma.checkpoint.build import suit_device, unpacked
from mlx_dgemma.model.device import on_cpu
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.upstream import QuantizedSwitchLinear, SwitchLinear

from ..search.replay import Passage, embed, logits
from ..search.trajectories import Trajectory
from .targets import divergence, read_targets

BITS = 8  # modules with as many have little to gain
HELD_BACK = 8  # one of so many trajectories judges the result
EPOCHS = 3
TOGETHER = 4  # trajectories whose mean gradient makes a step: Adam moves every value, whatever it takes for noise
RATE = 1e-3  # of Adam, in shares of a scale
Values = dict[str, list[mx.array]]  # {module path: changes of its scales and biases, in scales}


@dataclass(frozen=True)
class Tuned:
    """What training came to.

    Attributes:
        before, after: mean KL(source || quantized) in nats over states that were not trained on.
        steps: trained.
        kept: whether the result is better, and was kept.
        scales: {module path: (scales, biases)} in the dtype that stores them.
    """

    before: float
    after: float
    steps: int
    kept: bool
    scales: dict[str, tuple[mx.array, mx.array]]


class Unpacked(nn.Module):
    """A quantized linear map that is unpacked in every pass: the CPU multiplies packed weights slowly."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.weight, self.scales, self.biases = module.weight, module.scales, module.biases
        self.how = {"group_size": module.group_size, "bits": module.bits}
        self._experts = isinstance(module, QuantizedSwitchLinear)

    def __call__(self, x: mx.array, indices: mx.array | None = None, sorted_indices: bool = False) -> mx.array:
        """As the map that it stands for."""
        weight = mx.dequantize(self.weight, self.scales, self.biases, **self.how).swapaxes(-1, -2)
        if indices is None:
            return x @ weight
        return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)


def tune(
    model: DiffusionGemma,
    trajectories: Sequence[Trajectory],
    targets: Path,
    dtype: mx.Dtype,
    epochs: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Train the scales and biases of a quantized model's affine modules below 8 bits.

    Args:
        model: the quantized model; its scales are changed.
        trajectories: states of the source; one of `HELD_BACK` judges the result.
        targets: folder of the source's predictions.
        dtype: in which scales and biases are stored.
        epochs: how often each trajectory is trained on.
        seed: of their order.
        progress: called with the steps done and in total.
    """
    modules = _tuned_modules(model)
    base = {path: [one.scales.astype(mx.float32), one.biases.astype(mx.float32)] for path, one in modules.items()}
    judged = list(range(0, len(trajectories), HELD_BACK))
    trained = [i for i in range(len(trajectories)) if i not in judged] or judged
    total = epochs * -(-len(trained) // TOGETHER)
    changes: Values = {path: [mx.zeros_like(one) for one in pair] for path, pair in base.items()}

    def put(values: Values) -> None:
        for path, module in modules.items():
            stored = _stored(base[path], values[path], dtype)
            module.scales, module.biases = (one.astype(model.dtype) for one in stored)

    def loss(values: Values, index: int) -> mx.array:
        put(values)
        return _loss(model, trajectories[index], read_targets(targets, index))

    def judge(values: Values) -> float:
        found = [float(loss(values, i)) for i in judged]
        return float(np.average(found, weights=[trajectories[i].canvases.size for i in judged]))

    before = judge(changes)
    adam = optimizers.Adam(optimizers.cosine_decay(RATE, max(total, 2)), betas=[0.9, 0.99], bias_correction=True)
    order = np.random.default_rng(seed)
    gradient = mx.value_and_grad(loss)
    queue: list[int] = []
    for done in range(total):
        if not queue:
            queue = order.permutation(trained).tolist()
        some, queue = queue[:TOGETHER], queue[TOGETHER:]
        mean: Any = None
        for index in some:
            _, slopes = gradient(changes, index)
            mean = slopes if mean is None else tree_map(mx.add, mean, slopes)
            mx.eval(mean)
        share = 1 / len(some)
        changes = adam.apply_gradients(tree_map(lambda one, share=share: one * share, mean), changes)
        mx.eval(changes, adam.state)
        if progress:
            progress(done + 1, total)
    after = judge(changes)
    kept = after < before
    best = changes if kept else tree_map(mx.zeros_like, changes)
    put(best)
    found = {path: (one.scales.astype(dtype), one.biases.astype(dtype)) for path, one in modules.items()}
    mx.eval(found)
    return Tuned(before, after, total, kept, found)


def training_bytes(model: DiffusionGemma) -> int:
    """Bytes that the values under training take beside the model: base, changes, gradients and Adam's two moments."""
    return sum(5 * 4 * (one.scales.size + one.biases.size) for one in _tuned_modules(model).values())


def unpack_for_training(model: DiffusionGemma) -> None:
    """On the CPU, unpack quantized modules for good, and those that are trained anew in every pass."""
    if not on_cpu():
        return
    trained = _tuned_modules(model)
    found: list[tuple[str, nn.Module]] = []
    for path, one in model.named_modules():
        if path in trained:
            found.append((path, Unpacked(one)))
        elif isinstance(one, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)):
            experts = isinstance(one, QuantizedSwitchLinear)
            kind = nn.Embedding if isinstance(one, nn.QuantizedEmbedding) else nn.Linear
            new = SwitchLinear(1, 1, 1, False) if experts else kind(1, 1)
            new.pop("bias", None)
            new.weight = unpacked(one)
            found.append((path, new))
    model.update_modules(tree_unflatten(found))
    suit_device(model)


def _tuned_modules(model: DiffusionGemma) -> dict[str, Any]:
    found = {}
    for path, one in model.named_modules():
        how = getattr(one, "how", None) or {"bits": getattr(one, "bits", BITS)}
        if "scales" in one and how["bits"] < BITS and _affine(one) and not isinstance(one, nn.QuantizedEmbedding):
            found[path] = one
    return found


def _affine(module: nn.Module) -> bool:
    return getattr(module, "mode", "affine") == "affine"


def _stored(base: list[mx.array], change: list[mx.array], dtype: mx.Dtype) -> list[mx.array]:
    """Scales and biases as they are stored, float32; their gradient is that of the changes."""
    scale, bias = base[0] * (1 + change[0]), base[1] + base[0] * change[1]
    return [one + mx.stop_gradient(one.astype(dtype).astype(mx.float32) - one) for one in (scale, bias)]


def _loss(model: DiffusionGemma, trajectory: Trajectory, target: tuple[mx.array, mx.array]) -> mx.array:
    """Mean KL(source || model) over the positions of a trajectory's states."""
    text, hidden = model.config.text, embed(model, trajectory)
    encoder = model.model.encoder.language_model.layers
    for kind, layer, own in zip(text.layer_types, model.model.decoder.layers, encoder):
        hidden = Passage(text, kind)(layer, hidden, (own.layer_scalar, layer.layer_scalar))
    total, start = mx.array(0.0), 0
    for part in logits(model, hidden, trajectory):
        stop = start + part.shape[0]
        total = total + divergence(target[0][start:stop], target[1][start:stop], part).sum()
        start = stop
    return total / start
