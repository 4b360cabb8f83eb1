"""What each width of each module costs: the divergence of the outputs that its rounding causes.

To second order, KL(p || p + change) of the outputs is half the mean square of the change of the logits along random
directions whose covariance is the Fisher information, diag(p) - p p^T. So one backward pass for each of a few
directions gives, at the output of every linear map, a gradient that weighs that map's own error. A width then takes one
product of the rounding errors with the map's inputs, and no pass to the end of the stack.

Gradients and errors are taken of both modes: of the canvases, and of the prefix, which a candidate encodes by itself.
Errors of different rows are taken to be independent. One layer is in memory at a time: forward in order, then back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import atomic_file

from ..recipes import Quantization, part_of, width_name
from . import replay
from .candidate import rounded
from .replay import Hidden
from .shelf import LAYERS, Shelf
from .taps import Seen, calls, pulled_back, tapped
from .trajectories import Trajectory
from .widths import ALL, allowed

SAMPLES = 4  # random directions of each position
HELD = 4096  # positions whose inputs and gradients are held before they are measured
PIECE_BYTES = 256 * 2**20  # of an expert tensor in float32 that is rounded at once
EMBEDDING, CONDITIONING = "model.decoder.embed_tokens", "model.decoder.self_conditioning"
COSTS = "costs.json"
Progress = Callable[[int, int], None]


@dataclass
class Costs:
    """What is known so far.

    Attributes:
        modules: {path: {width: nats, a mean over positions}}.
        experts: {path: {width: [E] the share of each expert}}.
        rows: {path: [E] rows of the trajectories that each expert saw}.
        layers: layers that are left, counted from the first.
    """

    modules: dict[str, dict[str, float]] = field(default_factory=dict)
    experts: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    layers: int | None = None


class Sensitivity:
    """Measures the costs of a source's modules over trajectories.

    Args:
        shelf: the source's weights.
        trajectories: of the source.
        folder: of files between the steps; a run that was interrupted goes on from what lies there.
        widths: to try.
        samples: random directions of each position.
        seed: of the draws.
    """

    def __init__(
        self,
        shelf: Shelf,
        trajectories: Sequence[Trajectory],
        folder: Path,
        widths: Sequence[Quantization] = ALL,
        samples: int = SAMPLES,
        seed: int = 0,
    ):
        self.shelf, self.trajectories, self.folder = shelf, trajectories, folder
        self.widths, self.samples, self.seed = widths, samples, seed
        self.positions = sum(one.canvases.size for one in trajectories)
        self.depth = len(shelf.config.text.layer_types)

    def run(self, progress: Progress | None = None) -> Costs:
        """Measure what is not known yet.

        Args:
            progress: called with the passes of layers done and in total.
        """
        done, total = 0, 2 * self.depth + 2

        def tell() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, total)

        costs = known_costs(self.folder)
        for _ in self._forward():
            tell()
        if costs.layers is None:
            self._head(costs)
            self._keep(costs, self.depth)
        tell()
        assert costs.layers is not None
        for _ in range(self.depth - costs.layers):
            tell()
        while costs.layers:
            self._layer(costs, costs.layers - 1)
            self._keep(costs, costs.layers - 1)
            tell()
        if CONDITIONING + ".down_proj" not in costs.modules:
            self._inputs(costs)
            self._keep(costs, 0)
        tell()
        return costs

    def outputs(self) -> list[Hidden]:
        """The source's outputs of the last layer, after `run`."""
        return self._read(f"inputs-{self.depth:02}", len(self.trajectories))

    def _forward(self) -> Iterator[None]:
        """Write every layer's inputs."""
        model = self.shelf.trunk()
        have = next((i for i in reversed(range(self.depth + 1)) if self._file(f"inputs-{i:02}").exists()), None)
        if have is None:
            states = [replay.embed(model, one) for one in self.trajectories]
            mx.eval(states)
            self._write("inputs-00", states)
            have = 0
        else:
            states = self._read(f"inputs-{have:02}", len(self.trajectories))
        for _ in range(have):
            yield
        for i in range(have, self.depth):
            layer, passage = self.shelf.layer(i), replay.Passage(self.shelf.config.text, self._kind(i))
            for j, one in enumerate(states):
                states[j] = passage(layer, one, self.shelf.scalars(i))
                mx.eval(states[j])
            self._write(f"inputs-{i + 1:02}", states)
            yield

    def _head(self, costs: Costs) -> None:
        """The embedding as head, whose divergences are exact, and the gradients that go back from it."""
        model, states = self.shelf.trunk(), self.outputs()
        table, key = model.model.decoder.embed_tokens, mx.random.key(self.seed)
        gradients = []
        for one, hidden in zip(self.trajectories, states):
            key, own = mx.random.split(key)
            gradients += self._head_gradients(hidden, one, own)
        self._write(self._place(self.depth), gradients)
        found: dict[str, float] = {}
        for width in allowed(EMBEDDING, table.weight.shape, self.widths):
            other = nn.Embedding(1, 1)
            other.weight = rounded(table.weight, width, self.shelf.stored)
            mx.eval(other.weight)
            total = 0.0
            for one, hidden in zip(self.trajectories, states):
                pairs = zip(replay.logits(model, hidden, one), replay.logits(model, hidden, one, other))
                total += sum(float(replay.kl(p, q).sum()) for p, q in pairs)
            found[width_name(width)] = total / self.positions
            del other
            mx.clear_cache()
        costs.modules[EMBEDDING] = found

    def _head_gradients(self, hidden: Hidden, one: Trajectory, key: mx.array) -> list[Hidden]:
        """For each direction the gradient of the logits along it with respect to the last layer's outputs."""
        model = self.shelf.trunk()
        flat = hidden[1].reshape(-1, hidden[1].shape[-1])
        warm = np.repeat(one.temperatures, one.canvases.shape[1])[:, None]
        size = max(replay.positions_at_once(model) // 2, 1)
        parts: list[list[mx.array]] = [[] for _ in range(self.samples)]
        for start in range(0, flat.shape[0], size):
            t = mx.array(warm[start : start + size])

            def towards(x: mx.array, direction: mx.array, t: mx.array = t) -> mx.array:
                return (model.logits(model.model.decoder.norm(x)[None])[0] / t * direction).sum()

            x = flat[start : start + size]
            p = mx.softmax(model.logits(model.model.decoder.norm(x)[None])[0] / t, axis=-1)
            for k in range(self.samples):
                key, own = mx.random.split(key)
                parts[k].append(mx.grad(towards)(x, fisher_direction(p, own)))
                mx.eval(parts[k][-1])
        none = mx.zeros_like(hidden[0])
        return [(none, mx.concatenate(part).reshape(hidden[1].shape)) for part in parts]

    def _layer(self, costs: Costs, index: int) -> None:
        """The maps of a layer, and the gradients in front of it."""
        layer, passage = self.shelf.layer(index), replay.Passage(self.shelf.config.text, self._kind(index))
        prefix = f"{LAYERS}{index}."
        names = [name for name, _ in layer.named_modules() if part_of(prefix + name)]
        inputs = self._read(f"inputs-{index:02}", len(self.trajectories))
        scalars = self.shelf.scalars(index)
        back = self._backward(
            costs,
            layer,
            prefix,
            names,
            lambda a, b: passage(layer, (a, b), scalars),
            inputs,
            self._gradients(index + 1),
        )
        self._write(self._place(index), back)

    def _inputs(self, costs: Costs) -> None:
        """Self-conditioning, and the embedding as input of both modes."""
        model = self.shelf.trunk()
        decoder, scale = model.model.decoder, model.head.embed_scale
        conditioning = [mx.array(one.conditioning).astype(model.dtype) for one in self.trajectories]
        rows = [
            tuple(
                decoder.embed_tokens(mx.array(t)).astype(model.dtype) * scale for t in (one.prefix[None], one.canvases)
            )
            for one in self.trajectories
        ]
        prefix, names = f"{CONDITIONING}.", ["gate_proj", "up_proj", "down_proj"]
        turn = iter(np.repeat(np.arange(len(conditioning)), self.samples + 1).tolist())

        def conditioned(a: mx.array, b: mx.array) -> Hidden:
            return a, decoder.self_conditioning(b, conditioning[next(turn)])

        flat = self._backward(costs, decoder.self_conditioning, prefix, names, conditioned, rows, self._gradients(0))
        gradients = [flat[i : i + self.samples] for i in range(0, len(flat), self.samples)]
        for width in allowed(EMBEDDING, decoder.embed_tokens.weight.shape, self.widths):
            error = rounded(decoder.embed_tokens.weight, width, self.shelf.stored) - decoder.embed_tokens.weight
            total = 0.0
            for j, one in enumerate(self.trajectories):
                seen = [(error[mx.array(t)] * scale).astype(mx.float32) for t in (one.prefix[None], one.canvases)]
                total += _sum(_weighed(d, g) for k in gradients[j] for d, g in zip(seen, k))
            costs.modules[EMBEDDING][width_name(width)] += total / (2 * self.samples * self.positions)
            del error
            mx.clear_cache()

    def _backward(
        self,
        costs: Costs,
        module: nn.Module,
        prefix: str,
        names: list[str],
        function: Callable[..., Hidden],
        inputs: Sequence[Hidden],
        gradients: Sequence[Sequence[Hidden]],
    ) -> list[Hidden]:
        """Measure these maps of a module; returns the gradients of its inputs, draw by draw of each trajectory."""
        before: list[Hidden] = []
        kept: dict[str, list[tuple[Seen, list[mx.array]]]] = {name: [] for name in names}
        weights, held = {name: one.weight for name, one in module.named_modules() if name in names}, 0
        for number, (hidden, some) in enumerate(zip(inputs, gradients), 1):
            with tapped(module, names) as taps:
                seen = calls(taps, partial(function, *hidden))
                weighed: list[dict[str, list[mx.array]]] = []
                for cotangents in some:
                    found, back = pulled_back(taps, seen, function, hidden, cotangents)
                    before.append((back[0], back[1]))
                    weighed.append(found)
            for name in names:
                for i, call in enumerate(seen[name]):
                    kept[name].append(_flat(call, [one[name][i] for one in weighed], self.shelf.stored))
                    mx.eval(kept[name][-1][0].x, kept[name][-1][1])
            held += sum(one.shape[0] * one.shape[1] for one in hidden)
            del seen, weighed, found
            mx.clear_cache()
            if held >= HELD or number == len(inputs):
                for name, weight in weights.items():
                    self._measure(costs, prefix + name, weight, kept[name])
                    kept[name].clear()
                    mx.clear_cache()
                held = 0
        return before

    def _measure(self, costs: Costs, path: str, weight: mx.array, kept: Sequence[tuple[Seen, list[mx.array]]]) -> None:
        """Add what some trajectories tell of the costs of a map's widths."""
        scale = 1 / (2 * self.samples * self.positions)
        own = costs.modules.setdefault(path, {})
        if weight.ndim == 2:
            for width in allowed(path, weight.shape, self.widths):
                error = (rounded(weight, width, self.shelf.stored) - weight).astype(mx.float32)
                total = 0.0
                for seen, some in kept:
                    given = seen.x.astype(mx.float32) @ error.T
                    total += _sum(_weighed(given, g) for g in some)
                own[width_name(width)] = own.get(width_name(width), 0.0) + scale * total
        else:
            shares = {width_name(one): np.zeros(len(weight)) for one in allowed(path, weight.shape, self.widths)}
            size = max(PIECE_BYTES // (4 * weight[0].size), 1)
            owners = [np.asarray(seen.indices) for seen, _ in kept]
            for start in range(0, len(weight), size):
                piece = weight[start : start + size]
                places = [np.flatnonzero((one >= start) & (one < start + size)) for one in owners]
                for width in allowed(path, weight.shape, self.widths):
                    name = width_name(width)
                    error = (rounded(piece, width, self.shelf.stored) - piece).astype(mx.float32)
                    for (seen, some), where, owner in zip(kept, places, owners):
                        if len(where):
                            shares[name] += _of_experts(error, seen, some, where, owner, start, len(weight))
                    del error
                mx.clear_cache()
            count = np.bincount(np.concatenate(owners), minlength=len(weight))
            costs.rows[path] = (count + costs.rows.get(path, 0)).tolist()
            shared = costs.experts.setdefault(path, {})
            for name, one in shares.items():
                own[name] = own.get(name, 0.0) + scale * float(one.sum())
                shared[name] = (scale * one + shared.get(name, 0.0)).tolist()

    def _kind(self, index: int) -> str:
        return self.shelf.config.text.layer_types[index]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, states: Sequence[Hidden]) -> None:
        arrays = {f"{i}.{part}": one[part] for i, one in enumerate(states) for part in (0, 1)}
        with atomic_file(self._file(name), flush=False) as draft:
            mx.save_safetensors(str(draft), arrays)

    def _read(self, name: str, count: int) -> list[Hidden]:
        arrays = mx.load(str(self._file(name)))
        assert isinstance(arrays, dict)
        return [(arrays[f"{i}.0"], arrays[f"{i}.1"]) for i in range(count)]

    def _place(self, layers: int) -> str:
        """The file of the gradients with respect to what so many layers give."""
        return f"gradients-{layers:02}"

    def _gradients(self, layers: int) -> list[list[Hidden]]:
        """[trajectory][draw]."""
        flat = self._read(self._place(layers), len(self.trajectories) * self.samples)
        return [flat[i : i + self.samples] for i in range(0, len(flat), self.samples)]

    def _keep(self, costs: Costs, layers: int) -> None:
        """Write what is known; gradients that nothing asks for any more go."""
        costs.layers = layers
        with atomic_file(self.folder / COSTS) as draft:
            draft.write_text(json.dumps(asdict(costs)), encoding="utf-8")
        self._file(self._place(layers + 1)).unlink(missing_ok=True)


def known_costs(folder: Path) -> Costs:
    """What a search in this folder has measured so far.

    Raises:
        CheckpointError: its file is broken.
    """
    file = folder / COSTS
    if not file.exists():
        return Costs()
    try:
        return Costs(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise CheckpointError(f"{file} is broken; remove {folder}, so that the search begins again.") from None


def fisher_direction(p: mx.array, key: mx.array) -> mx.array:
    """Random directions with mean zero and covariance diag(p) - p p^T, one for each row.

    One-hot tokens drawn from p, less p, have that covariance too. But where the model is nearly certain, they show what
    it deems unlikely once in 1 / (1 - p) draws; these do so in every one.

    Args:
        p: [n, V] float32 probabilities.
        key: of the signs.

    Returns:
        [n, V] float32.
    """
    signed = mx.sqrt(p) * (2 * mx.random.bernoulli(0.5, p.shape, key) - 1)
    return signed - p * signed.sum(axis=-1, keepdims=True)


def _weighed(error: mx.array, gradient: mx.array) -> mx.array:
    """Squares of what each row's error changes: both [..., out] -> [...]."""
    changed = (error * gradient.astype(mx.float32)).sum(axis=-1)
    return changed * changed


def _sum(arrays: Iterable[mx.array]) -> float:
    return float(mx.stack([one.sum() for one in arrays]).sum())


def _flat(call: Seen, gradients: Sequence[mx.array], dtype: mx.Dtype) -> tuple[Seen, list[mx.array]]:
    """A call and its gradients row by row: of experts x [N, rows, in] with one expert an entry, else [N, in]."""
    if call.indices is None:
        x = call.x.reshape(-1, call.x.shape[-1])
        return Seen(x.astype(dtype), None, call.shape), [g.reshape(len(x), -1).astype(dtype) for g in gradients]
    shape = (*call.indices.shape, *call.x.shape[-2:])
    x, owners = mx.broadcast_to(call.x, shape).reshape(-1, *shape[-2:]), call.indices.flatten()
    flat = [g.reshape(len(x), shape[-2], -1).astype(dtype) for g in gradients]
    return Seen(x.astype(dtype), owners, call.shape), flat


def _of_experts(
    error: mx.array,
    seen: Seen,
    gradients: Sequence[mx.array],
    where: np.ndarray,
    owners: np.ndarray,
    start: int,
    experts: int,
) -> np.ndarray:
    """[E] float64: what the errors of some experts change, over all draws.

    Args:
        error: [n, out, in] of the experts from `start` on.
        seen, gradients: a call, from `_flat`.
        where: the entries of the call that belong to them.
        owners: [N] the expert of each entry.
        start: the first of them.
        experts: E.
    """
    rows = mx.array(where)
    x = seen.x[rows].astype(mx.float32)
    local = mx.array((owners[where] - start).astype(np.uint32))
    given = mx.gather_mm(x, error.swapaxes(-1, -2), rhs_indices=local, sorted_indices=bool((np.diff(where) >= 0).all()))
    total = np.zeros(len(where))
    for gradient in gradients:
        total += np.asarray(_weighed(given, gradient[rows]).sum(axis=-1), np.float64)
    return np.bincount(owners[where], weights=total, minlength=experts)
