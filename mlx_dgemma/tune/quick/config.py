"""The settings of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...errors import OptionError
from ..config import TrainerConfig

# What did best on the demo: bench/RESULTS.md has what was tried.
METHOD = TrainerConfig(rank=64, alpha=64.0, learning_rate=5e-4, steps=800, accumulate=4)
TEACHERS = ("exact", "default", "causal")


@dataclass(frozen=True)
class DistillConfig:
    """What is answered, which answers are learned, and how.

    Attributes:
        prompts: a file with one prompt a line, see `prompts.read_prompts`.
        output: the folder to make.
        rounds: how often the states are recorded anew, each time by the model as far as it is trained.
        teacher: what gives the answers: diffusion in "exact" or "default" mode, or "causal", token by token, the first
            answer by the most probable tokens and the others drawn.
        best_of: answers to each prompt, each with a seed of its own.
        agree: how many of them must be equal for a prompt to be learned; other prompts only keep the model as it is.
        reteach: answer anew in every round by the model as far as it is trained, instead of once by the frozen one.
        open_weight: weight of prompts whose answers differ and yet are sound, see `states.soundness`: each state learns
            what its own trajectory comes to. 0 keeps the model as it is on them.
        by: field of the records that names a prompt's family, or None.
        family_agreement: share of a family's prompts that must agree for any of them to be learned.
        states: denoising steps of a canvas whose states are recorded, counted from the first.
        certainty: weight of the entropy at positions that are right.
        divergence: weight of the divergence from the frozen model.
        clean: share of samples that are nearly clean canvases, on which the model is kept as it is.
        batch_size: samples of a step.
        answer_batch: prompts that are answered together.
        held_back: prompts that are not trained on, for the report.
        max_tokens: longest answer; None for the checkpoint's.
        save_every: steps between saves.
    """

    prompts: str
    output: Path
    rounds: int = 2
    teacher: str = "causal"
    best_of: int = 2
    agree: int = 2
    reteach: bool = False
    open_weight: float = 0.5
    by: str | None = None
    family_agreement: float = 0.5
    states: int = 6
    certainty: float = 0.25
    divergence: float = 1.0
    clean: float = 0.25
    batch_size: int = 16
    answer_batch: int = 16
    held_back: int = 64
    max_tokens: int | None = None
    save_every: int = 100

    def __post_init__(self):
        for name in ("rounds", "best_of", "agree", "states", "batch_size", "answer_batch", "save_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it should be at least 1.")
        for name in ("certainty", "divergence", "open_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}; it should be at least 0.")
        for name in ("clean", "family_agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it should be from 0 to 1.")
        if self.held_back < 0:
            raise OptionError(f"held_back is {self.held_back}; it should be at least 0.")
        if self.agree > self.best_of:
            raise OptionError(
                f"agree is {self.agree}, but best_of is {self.best_of}; no more answers can agree than there are."
            )
        if self.teacher not in TEACHERS:
            raise OptionError(f"teacher is {self.teacher!r}; it should be one of {', '.join(TEACHERS)}.")
        if self.output == Path():
            raise OptionError("output is empty; give the folder to make.")
