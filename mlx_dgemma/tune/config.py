"""The settings of a fine-tuning run: what is trained and how, and everything around it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import OptionError
from .objective import VARIANTS, Objective

KINDS = ("lora", "dora", "full")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainerConfig:
    """What is trained, and how. The defaults are NVIDIA NeMo's for LoRA.

    Attributes:
        kind: "lora", "dora", or "full" to train all weights.
        targets: groups of modules to adapt, see `deltas.target_paths`. With "full" the router is frozen unless
            "router" is one of them; nothing else depends on it.
        layers: number of layers to train, counted from the last; None for all.
        rank: rank of the adapter.
        alpha: the adapter's product b @ a is scaled by alpha / rank.
        dropout: of the adapter's input.
        optimizer: "adamw", or "muon" (kellerjordan.github.io/posts/muon), which makes all singular values of a matrix's
            update about equal. It learns more from the same number of samples and needs a learning rate that is
            several times higher.
        learning_rate: the highest; it rises for `warmup` steps, then falls along a cosine to `final` times it.
        final: share of the learning rate that is left at the end.
        steps: number of optimizer steps.
        warmup: number of steps; None for a twentieth of `steps`.
        accumulate: batches per step.
        betas: of AdamW; the first one is also Muon's momentum.
        weight_decay: decoupled, multiplied by the learning rate. With float32 weights the references' 1e-4 hardly
            matters.
        clip: largest global norm of the gradients; 0 does not clip.
        seed: of initial weights, noise and order; below 2**31.
        recompute: gradient checkpointing, which saves memory and takes more time.
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
            raise OptionError(f"dropout is {self.dropout}, but recomputed layers would draw it again; add --keep.")
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
            raise OptionError(f"optimizer is muon, which only trains matrices, but {what} has other arrays; use adamw.")
        if self.kind == "full":
            for name in ("rank", "alpha", "dropout"):
                if getattr(self, name) != getattr(TrainerConfig, name):
                    raise OptionError(f"{name} is {getattr(self, name)}, but kind full has no {name}; leave it out.")
            if unexpected := sorted(set(self.targets) - {"attention", "mlp", "router"}):
                raise OptionError(f"kind is full, which trains all modules; leave the target {unexpected[0]} out.")


@dataclass(frozen=True)
class RunConfig:
    """The data, the objective and the schedule of a run.

    Attributes:
        data: a folder with train.jsonl, a .jsonl file, or the id of a data set on the Hub.
        output: the folder to make.
        variant: name of the objective, see `VARIANTS`.
        encoder_weight: weight of the encoder's loss; None for the variant's.
        self_conditioning: probability of a first pass; None for the variant's.
        noise_min: smallest t; None for the variant's.
        batch_size: samples per batch.
        turns: which answers of a chat are trained, "last" or "all".
        max_length: longest sample in tokens; None for the context length.
        skip_long: leave longer samples out instead of refusing them.
        fill: token that fills the rest of an answer's last canvas; None to infer it, see `run.infer_fill_token`.
        save_every: steps between saves.
        validate_every: steps between validations; 0 for none.
        validate: largest number of samples per validation.
        generate: largest number of answers to generate and score per validation.
    """

    data: str
    output: Path
    variant: str = "google"
    encoder_weight: float | None = None
    self_conditioning: float | None = None
    noise_min: float | None = None
    batch_size: int = 4
    turns: str = "last"
    max_length: int | None = None
    skip_long: bool = False
    fill: int | None = None
    save_every: int = 100
    validate_every: int = 100
    validate: int = 64
    generate: int = 8

    def __post_init__(self):
        for name, low in (
            ("batch_size", 1),
            ("save_every", 1),
            ("validate_every", 0),
            ("validate", 1),
            ("generate", 0),
        ):
            if getattr(self, name) < low:
                raise OptionError(f"{name} is {getattr(self, name)}; it should be at least {low}.")
        if self.self_conditioning is not None and not 0 <= self.self_conditioning <= 1:
            raise OptionError(f"self_conditioning is {self.self_conditioning}; it should be from 0 to 1.")
        if self.noise_min is not None and not 0 < self.noise_min < VARIANTS["google"].noise_max:
            raise OptionError(f"noise_min is {self.noise_min}; it should be above 0 and below 0.9999.")
        if self.output == Path():
            raise OptionError("output is empty; give the folder to make.")

    @property
    def objective(self) -> Objective:
        """The variant with the changes of this configuration.

        Raises:
            OptionError: there is no such variant.
        """
        if self.variant not in VARIANTS:
            raise OptionError(f"There is no objective {self.variant!r}; choose from {', '.join(VARIANTS)}.")
        names = ("encoder_weight", "self_conditioning", "noise_min")
        return replace(VARIANTS[self.variant], **{n: v for n in names if (v := getattr(self, n)) is not None})
