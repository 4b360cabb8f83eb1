"""Steps of training and their state, which goes on after a stop exactly where it was."""

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
from ..errors import DataError, OptionError
from ..model.device import on_cpu
from ..model.diffusion_gemma import DiffusionGemma
from ..model.layers import Layer
from .objective import Batch, Losses, Objective, draw, loss, recomputed, split
from .workers import MODEL, POSITIONS, Workers, differentiate

KINDS = ("lora", "dora", "full")
OPTIMIZERS = ("adamw", "muon")
STATE = "state.safetensors"


@dataclass(frozen=True)
class Method:
    """What is trained, and how; the defaults are NVIDIA NeMo's for LoRA.

    Attributes:
        kind: "lora", "dora", or "full" for the weights themselves, the router only where it is a target.
        targets: groups of modules, see `deltas.targets`; of "full" alone whether "router" is among them counts.
        layers: how many layers, from the last one; None: all.
        rank: of a and b.
        alpha: b @ a is multiplied by alpha / rank.
        dropout: of a LoRA's input.
        optimizer: "adamw", or "muon" (kellerjordan.github.io/posts/muon), which brings every matrix's update to
            singular values near 1: it learns more from as many samples, and its learning rates are several times
            greater.
        learning_rate: the highest; it rises over `warmup` steps and falls to `final` of it along a cosine.
        final: share of the learning rate that is left in the end.
        steps: of the optimizer.
        warmup: steps; None: a twentieth of `steps`.
        accumulate: batches a step.
        betas: AdamW's; the first one is Muon's momentum too.
        weight_decay: decoupled, times the learning rate: float32 hardly feels the references' 1e-4.
        clip: global norm that gradients are brought to at most; 0: any.
        seed: of weights, noise and order, below 2**31.
        recompute: compute layers again for the gradient: less memory, more time.
    """

    kind: str = "lora"
    targets: tuple[str, ...] = ("attention", "mlp")
    layers: int | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    optimizer: str = "adamw"
    learning_rate: float = 1.5e-4
    final: float = 0.1
    steps: int = 1000
    warmup: int | None = None
    accumulate: int = 1
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0
    seed: int = 0
    recompute: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise OptionError(f"kind is {self.kind!r}; it should be one of {', '.join(KINDS)}.")
        for name, low in (("rank", 1), ("steps", 1), ("accumulate", 1), ("clip", 0), ("weight_decay", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}; it should be at least {low}.")
        for name in ("alpha", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}; it should be above 0.")
        if not 0 <= self.final <= 1:
            raise OptionError(f"final is {self.final}; it should be from 0 to 1.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout is {self.dropout}; it should be at least 0 and below 1.")
        if self.dropout and self.recompute:
            raise OptionError(
                f"dropout is {self.dropout}, and layers computed again would draw another one; give --keep too."
            )
        if not 0 <= self.seed < 2**31:
            raise OptionError(f"seed is {self.seed}; it should be at least 0 and below 2147483648.")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise OptionError(f"warmup is {self.warmup}; it should be below the {self.steps} steps.")
        if not self.targets:
            raise OptionError("targets is empty; name at least one group.")
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(f"optimizer is {self.optimizer!r}; it should be one of {', '.join(OPTIMIZERS)}.")
        if self.optimizer == "muon" and (self.kind != "lora" or "experts" in self.targets):
            what = "the target experts" if self.kind == "lora" else f"kind {self.kind}"
            raise OptionError(f"optimizer is muon, which takes matrices alone, and {what} has others; take adamw.")
        if self.kind == "full":
            for name in ("rank", "alpha", "dropout"):
                if getattr(self, name) != getattr(Method, name):
                    raise OptionError(
                        f"{name} is {getattr(self, name)}, but kind is full, which knows none; leave it out."
                    )
            if strange := sorted(set(self.targets) - {"attention", "mlp", "router"}):
                raise OptionError(f"kind is full, which trains every part; leave the target {strange[0]} out.")


@dataclass(frozen=True)
class Told:
    """A step's figures: losses in nats a token, the gradients' norm before clipping, and the learning rate."""

    total: float
    canvas: float
    encoder: float
    norm: float
    learning_rate: float


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flat(tree: Any) -> dict[str, mx.array]:
    """{path: array} of a tree."""
    found: Any = tree_flatten(tree)
    return dict(found)


class _Muon(Muon):
    """Muon whose weight decay is AdamW's, decoupled; MLX's own is added to the gradient."""

    def __init__(self, rate: Callable[[mx.array], mx.array], momentum: float, decay: float):
        super().__init__(rate, momentum, weight_decay=0.0)
        self._decay = decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        return super().apply_single(gradient, parameter * (1 - self.learning_rate * self._decay), state)


class Trainer:
    """A model, what of it is trained, and an optimizer.

    Args:
        model: changed in place: an adapter is put in, everything else is frozen.
        method: what is trained, and how.
        objective: what is minimised.
    """

    def __init__(self, model: DiffusionGemma, method: Method, objective: Objective):
        self.model, self.method, self.objective = model, method, objective
        self.step = 0
        self._prepare()
        small = sum(a.nbytes for a in flat(model.parameters()).values()) <= MODEL
        # dropout draws from the state of one process
        self._cores = cores() if on_cpu() and small and not method.dropout else 1
        self._workers = Workers(model, objective)
        model.train()
        if method.recompute:
            model._apply = recomputed
        warmup = max(method.steps // 20, 1) if method.warmup is None else method.warmup
        peak, falling = method.learning_rate, max(method.steps - warmup, 1)
        rising = linear_schedule(peak / max(warmup, 1), peak, max(warmup, 1))
        rate = join_schedules([rising, cosine_decay(peak, falling, peak * method.final)], [warmup])
        self.optimizer: AdamW | Muon = (
            AdamW(rate, list(method.betas), 1e-8, method.weight_decay, bias_correction=True)
            if method.optimizer == "adamw"
            else _Muon(rate, method.betas[0], method.weight_decay)
        )
        self.optimizer.init(model.trainable_parameters())
        mx.eval(model.parameters(), self.optimizer.state)

    def done(self) -> None:
        """Leave the model as generation takes it; nothing is trained after."""
        self._workers.close()
        self.model.eval()
        self.model._apply = Layer.__call__

    def _prepare(self) -> None:
        model, method = self.model, self.method
        paths = deltas.targets(model, method.targets, method.layers)
        model.freeze()
        if method.kind != "full":
            key = mx.random.key(method.seed)
            deltas.start(
                model, paths, method.rank, method.alpha / method.rank, method.dropout, method.kind == "dora", key
            )
            return
        packed = next((path for path, one in model.named_modules() if "scales" in one), None)
        if packed:
            raise OptionError(f"kind is full, but {packed} is quantized; take lora, or a checkpoint of floats.")
        if model.dtype != mx.float32:
            raise OptionError("kind is full, and 16-bit weights would lose small changes; give --dtype float32.")
        decoder, chosen = model.model.decoder, method.layers or len(model.model.decoder.layers)
        for layer in decoder.layers[len(decoder.layers) - chosen :]:
            layer.unfreeze()
            if "router" not in method.targets:
                layer.router.freeze()
        if method.layers is None:
            for part in (decoder.embed_tokens, decoder.norm, decoder.self_conditioning):
                part.unfreeze()
            model.model.encoder.language_model.unfreeze()

    @property
    def trainable(self) -> int:
        """Number of weights that are trained."""
        return sum(a.size for a in flat(self.model.trainable_parameters()).values())

    def update(self, batches: Sequence[Batch]) -> Told:
        """One step of the optimizer over `accumulate` batches; the noise depends on the step's number alone."""
        sums: Any = None
        losses = []
        for i, batch in enumerate(batches):
            number = self.step * self.method.accumulate + i
            if self.method.dropout:  # mlx-lm's layers draw from MLX's own state
                mx.random.seed((self.method.seed << 32) + number)
            scalars, gradients = self._gradients(batch, number)
            sums = gradients if sums is None else tree_map(lambda a, b: a + b, sums, gradients)
            mx.eval(sums, scalars)
            losses.append([one.item() for one in scalars])
        count = len(batches)
        clipped, norm = clip_grad_norm(tree_map(lambda a: a / count, sums), self.method.clip or math.inf)
        total, canvas, encoder = (sum(column) / count for column in zip(*losses))
        if not math.isfinite(total + float(norm)):
            raise DataError(
                f"The loss is {total} and the gradients' norm {float(norm)} at step {self.step + 1}; "
                f"lower --learning-rate, which is {self.method.learning_rate}."
            )
        self.optimizer.update(self.model, clipped)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.step += 1
        return Told(total, canvas, encoder, float(norm), self.optimizer.learning_rate.item())

    def _gradients(self, batch: Batch, number: int) -> tuple[tuple[mx.array, ...], Any]:
        key = mx.random.key((self.method.seed << 32) + number)
        config, objective = self.model.config, self.objective
        noise = draw(batch, objective, config.text.vocab_size, key)
        count = self.parts(*batch.tokens.shape)
        if count == 1:
            return differentiate(self.model, objective, batch, noise)
        parts = split(batch, noise, objective, config.image_token_id, count)
        return self._workers.gradients(self.model.trainable_parameters(), parts)

    def parts(self, rows: int, prefix: int) -> int:
        """How many processes share a batch of rows and prefix tokens; the bits of its gradients depend on it."""
        if self._cores == 1 or rows * (prefix + self.model.config.canvas_length) < POSITIONS:
            return 1
        return min(self._cores, rows)

    @property
    def peak_bytes(self) -> int:
        """Memory that MLX held at most since its peak was reset, other processes included."""
        return mx.get_peak_memory() + self._workers.peak_bytes

    def measure(self, batch: Batch, number: int) -> Losses:
        """A batch's loss without learning from it, under noise that depends on `number` alone."""
        key = mx.random.key((1 << 63) + number)
        self.model.eval()
        losses = loss(
            self.model, batch, draw(batch, self.objective, self.model.config.text.vocab_size, key), self.objective
        )
        mx.eval(*losses)
        self.model.train()
        return losses

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write what `resume` needs into one file, which is replaced as a whole.

        Args:
            folder: where `STATE` goes.
            about: whatever must be the same for a run to go on, as JSON.
        """
        arrays = {f"weights.{name}": a for name, a in flat(self.model.trainable_parameters()).items()}
        arrays |= {f"optimizer.{name}": a for name, a in flat(self.optimizer.state).items()}
        told = {"step": str(self.step), "method": json.dumps(asdict(self.method)), "about": json.dumps(about)}
        beside = folder / f".{STATE}"
        mx.save_safetensors(str(beside.with_suffix(".part.safetensors")), arrays, told)
        os.replace(beside.with_suffix(".part.safetensors"), folder / STATE)

    def resume(self, folder: Path, about: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            DataError: there is none, it is broken, or it was saved by another run.
        """
        file = folder / STATE
        if not file.exists():
            raise DataError(f"{folder} holds no {STATE} to resume from; start anew without --resume.")
        try:
            loaded: Any = mx.load(str(file), return_metadata=True)
            arrays, told = loaded
            was = {"method": json.loads(told["method"]), "about": json.loads(told["about"])}
            step = int(told["step"])
        except (RuntimeError, KeyError, ValueError):
            raise DataError(f"{file} is broken; start anew without --resume.") from None
        now = json.loads(json.dumps({"method": asdict(self.method), "about": about}))
        for part in now:
            for name in now[part]:
                if was[part].get(name) != now[part][name]:
                    raise DataError(
                        f"{file} was trained with {name} {was[part].get(name)!r}, and now it is {now[part][name]!r}; "
                        "resume with the same, or start anew."
                    )
        weights = [(name.removeprefix("weights."), a) for name, a in arrays.items() if name.startswith("weights.")]
        state = [(name.removeprefix("optimizer."), a) for name, a in arrays.items() if name.startswith("optimizer.")]
        self.model.update(tree_unflatten(weights))
        self.optimizer.state = tree_unflatten(state)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.step = step
