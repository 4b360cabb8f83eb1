"""The trainer: optimizer steps, and a state from which training resumes exactly."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.optimizers import AdamW, Muon, clip_grad_norm, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..adapters import deltas
from ..distributed.agreement import together
from ..distributed.group import ALONE, Group
from ..distributed.trees import share_tree, sum_tree
from ..errors import DataError, OptionError
from ..files import atomic_file
from ..model.device import on_cpu
from ..model.diffusion_gemma import DiffusionGemma
from ..model.layers import Layer
from .config import TrainerConfig
from .objective import Trainable, checkpointed_layer
from .workers import MAX_MODEL_BYTES, MIN_POSITIONS, GradientWorkers, loss_and_gradients

STATE = "state.safetensors"


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step.

    Attributes:
        total: the loss, in nats per token.
        parts: the losses that it is made of, by the objective's names.
        norm: global norm of the gradients before clipping.
        learning_rate: of this step.
    """

    total: float
    parts: dict[str, float]
    norm: float
    learning_rate: float


def usable_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flatten(tree: Any) -> dict[str, mx.array]:
    """{path: array} of a tree of parameters or optimizer states."""
    pairs: Any = tree_flatten(tree)
    return dict(pairs)


class _Muon(Muon):
    """Muon with AdamW's decoupled weight decay; MLX's Muon adds the decay to the gradient."""

    def __init__(self, rate: Callable[[mx.array], mx.array], momentum: float, decay: float):
        super().__init__(rate, momentum, weight_decay=0.0)
        self._decay = decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        return super().apply_single(gradient, parameter * (1 - self.learning_rate * self._decay), state)


class Trainer:
    """Trains a model.

    Args:
        model: changed in place: an adapter is added and all other weights are frozen.
        config: what is trained, and how.
        objective: the loss.
        group: the ranks that share each batch; all of them call the same methods.

    Attributes:
        step: number of steps done.

    Raises:
        OptionError: the configuration does not fit the model.
    """

    def __init__(self, model: DiffusionGemma, config: TrainerConfig, objective: Trainable, group: Group = ALONE):
        if group.size > 1 and config.dropout:
            raise OptionError(
                f"dropout is {config.dropout}, but {group.size} ranks would draw another one than a single machine; "
                "leave it out."
            )
        self.model, self.config, self.objective, self.group = model, config, objective, group
        self.step = 0
        self._select_trainable()
        small = sum(a.nbytes for a in flatten(model.parameters()).values()) <= MAX_MODEL_BYTES
        # Dropout uses MLX's global random state, so it needs a single process. Ranks are processes themselves.
        self._cores = usable_cores() if on_cpu() and small and not config.dropout and group.size == 1 else 1
        self._workers = GradientWorkers(model, objective)
        model.train()
        if config.recompute:
            model._apply = checkpointed_layer
        self.optimizer = _optimizer(config)
        self.optimizer.init(model.trainable_parameters())
        mx.eval(model.parameters(), self.optimizer.state)

    def close(self) -> None:
        """End the worker processes and prepare the model for generation. No training is possible afterwards."""
        self._workers.close()
        self.model.eval()
        self.model._apply = Layer.__call__

    def _select_trainable(self) -> None:
        """Add the adapter, or unfreeze the weights that full training changes."""
        model, config = self.model, self.config
        paths = deltas.target_paths(model, config.targets, config.layers)
        model.freeze()
        if config.kind != "full":
            key = mx.random.key(config.seed)
            scale, dora = config.alpha / config.rank, config.kind == "dora"
            deltas.add_adapter(model, paths, config.rank, scale, config.dropout, dora, key)
            return
        quantized = next((path for path, module in model.named_modules() if "scales" in module), None)
        if quantized:
            raise OptionError(f"kind is full, but {quantized} is quantized; use lora, or an unquantized checkpoint.")
        if model.dtype != mx.float32:
            raise OptionError("kind is full, but small changes get lost in 16-bit weights; use --dtype float32.")
        decoder, count = model.model.decoder, config.layers or len(model.model.decoder.layers)
        for layer in decoder.layers[len(decoder.layers) - count :]:
            layer.unfreeze()
            if "router" not in config.targets:
                layer.router.freeze()
        if config.layers is None:
            for module in (decoder.embed_tokens, decoder.norm, decoder.self_conditioning):
                module.unfreeze()
            model.model.encoder.language_model.unfreeze()

    @property
    def trainable(self) -> int:
        """Number of trainable weights."""
        return sum(a.size for a in flatten(self.model.trainable_parameters()).values())

    def update(self, batches: Sequence[Any]) -> StepMetrics:
        """One optimizer step over `accumulate` batches. The noise only depends on the seed and the step's number.

        Raises:
            DataError: the loss or the gradients are not finite.
            MemoryLimitError, PromptError: see `GradientWorkers.gradients`.
        """
        config = self.config
        sums: Any = None
        losses = []
        for i, batch in enumerate(batches):
            number = self.step * config.accumulate + i
            if config.dropout:  # mlx-lm's layers use MLX's global random state
                mx.random.seed((config.seed << 32) + number)
            scalars, gradients = self._gradients(batch, number)
            sums = gradients if sums is None else tree_map(lambda a, b: a + b, sums, gradients)
            mx.eval(sums, scalars)
            losses.append(scalars)
        if self.group.size > 1:
            sums, losses = sum_tree(self.group, (sums, losses))
            mx.eval(sums, losses)
        count = len(batches)
        clipped, norm = clip_grad_norm(tree_map(lambda a: a / count, sums), config.clip or math.inf)
        total, *parts = (sum(column) / count for column in zip(*([scalar.item() for scalar in one] for one in losses)))
        if not math.isfinite(total + float(norm)):
            raise DataError(
                f"The loss is {total} and the norm of the gradients {float(norm)} at step {self.step + 1}; "
                f"lower --learning-rate, which is {config.learning_rate}."
            )
        self.optimizer.update(self.model, clipped)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.step += 1
        named = dict(zip(self.objective.parts, parts))
        return StepMetrics(total, named, float(norm), self.optimizer.learning_rate.item())

    def _gradients(self, batch: Any, number: int) -> tuple[tuple[mx.array, ...], Any]:
        """Losses and gradients of the batch with this number in the run; of several ranks, this one's share of them."""
        key = mx.random.key((self.config.seed << 32) + number)
        model, objective = self.model, self.objective
        noise = objective.draw(batch, model.config.text.vocab_size, key)
        count = self.process_count(*batch.tokens.shape)
        if max(count, self.group.size) == 1:
            return loss_and_gradients(model, objective, batch, noise)
        parts = objective.split(batch, noise, model.config.image_token_id, max(count, self.group.size))
        if self.group.size > 1:
            return loss_and_gradients(model, objective, *parts[self.group.rank])
        return self._workers.gradients(model.trainable_parameters(), parts)

    def process_count(self, rows: int, prefix: int) -> int:
        """How many processes share a batch of so many rows and prefix tokens. Gradients depend on it in their bits."""
        if self._cores == 1 or rows * (prefix + self.model.config.canvas_length) < MIN_POSITIONS:
            return 1
        return min(self._cores, rows)

    @property
    def peak_bytes(self) -> int:
        """MLX's peak memory since it was reset, worker processes included."""
        return mx.get_peak_memory() + self._workers.peak_bytes

    def validation_loss(self, batch: Any, number: int) -> tuple[mx.array, ...]:
        """The losses of a batch, the total first, without training on it. The noise only depends on `number`."""
        key = mx.random.key((1 << 63) + number)
        self.model.eval()
        noise = self.objective.draw(batch, self.model.config.text.vocab_size, key)
        losses = self._own_losses(batch, noise)
        mx.eval(losses)
        self.model.train()
        return losses

    def _own_losses(self, batch: Any, noise: Any) -> tuple[mx.array, ...]:
        """The losses of a batch, to which each rank adds those of its share."""
        group, model, objective = self.group, self.model, self.objective
        if group.size == 1:
            return objective.loss(model, batch, noise, (1.0, 1.0))
        parts = objective.split(batch, noise, model.config.image_token_id, min(group.size, len(batch.tokens)))
        own: tuple[mx.array, ...] = (mx.array(0.0),) * (1 + len(objective.parts))
        if group.rank < len(parts):
            own = tuple(objective.loss(model, *parts[group.rank]))
        return sum_tree(group, own)

    def share_state(self) -> None:
        """Give all ranks rank 0's weights and optimizer: from files that it alone has, or after other roundings."""
        if self.group.size > 1:
            self.step = self.group.share(self.step)
            weights, state = share_tree(self.group, (self.model.trainable_parameters(), self.optimizer.state))
            self.model.update(weights)
            self.optimizer.state = state

    def save(self, folder: Path, run: dict[str, Any], options: dict[str, Any] | None = None) -> None:
        """Write the state that `resume` needs into one file, which is replaced atomically.

        Args:
            folder: where the file `STATE` is written.
            run: properties of the run, as JSON; they must be the same when it is resumed.
            options: the run's other options, as JSON, for `saved_options`; None for none.

        Raises:
            DgemmaError: the file cannot be written; the state before is kept.
        """
        arrays = {f"weights.{name}": a for name, a in flatten(self.model.trainable_parameters()).items()}
        arrays |= {f"optimizer.{name}": a for name, a in flatten(self.optimizer.state).items()}
        told = {"method": asdict(self.config), "about": run, "options": options or {}}
        metadata = {"step": str(self.step), **{name: json.dumps(value) for name, value in told.items()}}
        with atomic_file(folder / STATE) as draft:
            mx.save_safetensors(str(draft), arrays, metadata)

    def resume(self, folder: Path, run: dict[str, Any]) -> None:
        """Load a saved state.

        Raises:
            DataError: there is none, it is broken, or it belongs to a run with other settings.
        """
        file, (arrays, saved) = folder / STATE, _read_state(folder)
        current = json.loads(json.dumps({"method": asdict(self.config), "about": run}))
        for part, settings in current.items():
            for name, value in settings.items():
                if saved[part].get(name) != value:
                    raise DataError(
                        f"{file} was trained with {name} {saved[part].get(name)!r}, and now it is {value!r}; "
                        "resume with the same value, or start a new run."
                    )
        self.model.update(tree_unflatten(_with_prefix(arrays, "weights.")))
        self.optimizer.state = tree_unflatten(_with_prefix(arrays, "optimizer."))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.step = saved["step"]


def saved_options(folder: Path, group: Group = ALONE) -> dict[str, Any]:
    """All options of the run that was saved in a folder, by the names of `TrainerConfig` and `RunConfig`.

    Of a group rank 0 alone has the folder.

    Raises:
        DataError: there is no state, or it is broken.
    """
    saved = together(group, lambda: _read_state(folder)[1] if group.rank == 0 else None)
    options = group.share({**saved["method"], **saved["options"]} if saved else None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _read_state(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The lazy arrays of a saved state, and what was told about it."""
    file = folder / STATE
    if not file.exists():
        raise DataError(f"{folder} has no {STATE} to resume from; start a new run without --resume.")
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
        arrays, metadata = loaded
        return arrays, {name: json.loads(metadata[name]) for name in ("step", "method", "about", "options")}
    except (RuntimeError, KeyError, ValueError):
        raise DataError(f"{file} is broken; start a new run without --resume.") from None


def _optimizer(config: TrainerConfig) -> AdamW | Muon:
    """The optimizer, with a learning rate that rises linearly and falls along a cosine."""
    warmup = max(config.steps // 20, 1) if config.warmup is None else config.warmup
    peak, falling = config.learning_rate, max(config.steps - warmup, 1)
    rising = linear_schedule(peak / max(warmup, 1), peak, max(warmup, 1))
    rate = join_schedules([rising, cosine_decay(peak, falling, peak * config.final)], [warmup])
    if config.optimizer == "adamw":
        return AdamW(rate, list(config.betas), 1e-8, config.weight_decay, bias_correction=True)
    return _Muon(rate, config.betas[0], config.weight_decay)


def _with_prefix(arrays: dict[str, mx.array], prefix: str) -> list[tuple[str, mx.array]]:
    """The arrays whose names start with a prefix, without it."""
    return [(name.removeprefix(prefix), array) for name, array in arrays.items() if name.startswith(prefix)]
