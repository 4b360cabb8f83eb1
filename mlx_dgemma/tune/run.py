"""A whole fine-tuning run: data in, steps, validation, saves, and an adapter or a checkpoint out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..adapters import deltas, peft
from ..checkpoint.folder import Checkpoint
from ..checkpoint.memory import Need, prefix_bytes
from ..engine import Engine
from ..errors import DataError, MemoryLimitError, OptionError, count
from ..model import device
from ..model.layers import Layer
from .batches import Batches
from .curves import Log, draw
from .data import Example, load
from .evaluate import evaluate
from .objective import LOGITS, VARIANTS, Objective, loss
from .objective import draw as draw_noise
from .trainer import Method, Told, Trainer, flat

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a run does besides `Method`.

    Attributes:
        data: a folder with train.jsonl, a .jsonl file, or the id of a data set on the Hub.
        output: the folder to make.
        variant: of the objective, a name in `VARIANTS`.
        encoder_weight: of the encoder's loss; None: the variant's.
        self_conditioning: probability of the first pass; None: the variant's.
        noise_min: least t; None: the variant's.
        batch_size: samples of a batch.
        turns: "last" or "all" of a chat's answers are learnt.
        max_length: tokens that a sample may have; None: the context.
        skip_long: leave longer ones out instead of refusing them.
        fill: token behind an answer in its last canvas; None: what the checkpoint itself puts there, see `habit`.
        save_every: steps.
        validate_every: steps; 0: never.
        validate: samples of a validation at most.
        generate: answers to validation data that are generated and marked each time, at most.
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
            raise OptionError("output is empty; name a folder to make.")

    @property
    def objective(self) -> Objective:
        """The variant with what was changed of it.

        Raises:
            OptionError: there is no such variant.
        """
        if self.variant not in VARIANTS:
            raise OptionError(f"There is no objective {self.variant!r}; take one of {', '.join(VARIANTS)}.")
        names = ("encoder_weight", "self_conditioning", "noise_min")
        return replace(VARIANTS[self.variant], **{n: v for n in names if (v := getattr(self, n)) is not None})


@dataclass(frozen=True)
class Progress:
    """Where a run is, told after every step; the validation's figures after those that had one."""

    step: int
    steps: int
    told: Told
    seconds: float
    peak_bytes: int
    valid_loss: float | None = None
    valid_right: float | None = None
    sample: tuple[str, str] | None = None  # the first generated answer and the expected one


def need(
    checkpoint: Checkpoint, method: Method, batch: int, prefix: int, trained: int, weights: int, parts: int = 1
) -> Need:
    """Estimate a run's peak: weights, the prefixes' KV, and all else; a bound of what was measured (bench/RESULTS.md).

    Args:
        checkpoint: of the model.
        method: of the run.
        batch: samples of a batch.
        prefix: tokens of the longest sample before its canvas.
        trained: number of weights that are trained.
        weights: bytes of all weights.
        parts: processes that share a batch, each with weights of its own.
    """
    copies = parts if parts > 1 else 0
    text, canvas = checkpoint.config.text, checkpoint.config.canvas_length
    positions = batch * (prefix + 2 * canvas)  # of the encoder over prefix and canvas, and of the decoder
    # gradients, both moments, and what the optimizer makes anew; in a process of its own weights and gradients
    state = 4 * (4 + 2 * copies) * trained
    layers = text.num_hidden_layers
    inner = 4 * (text.intermediate_size + text.num_attention_heads * max(text.kv_shape("full_attention")[1], 64))
    experts = text.top_k_experts * (3 * text.moe_intermediate_size + 2 * text.hidden_size)
    scores = batch * text.num_attention_heads * (prefix + canvas) ** 2
    within = 6 * (positions * (inner + experts + 12 * text.hidden_size) + 2 * scores)
    kept = (2 if method.recompute else 0) * 4 * positions * text.hidden_size * layers
    workspace = state + kept + within * (1 if method.recompute else layers)
    workspace += 6 * min(parts * LOGITS, 4 * positions * text.vocab_size)
    return Need((1 + copies) * weights, 4 * prefix_bytes(checkpoint.config, prefix + 2 * canvas, 4, batch), workspace)


def tune(
    engine: Engine,
    method: Method,
    plan: Plan,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    ignore_memory: bool = False,
) -> Iterator[Progress]:
    """Train, step by step; `plan.output` holds the last save whenever this ends.

    Args:
        engine: a loaded checkpoint; its model is changed.
        method: what is trained, and how.
        plan: data, objective, and when to save and to validate.
        resume: go on with the run whose state lies in the output.
        stop: asked after every step; when true, the run is saved and ends.
        say: takes sentences about what was found and decided.
        ignore_memory: begin even what does not seem to fit.

    Raises:
        OptionError, DataError, PromptError, MemoryLimitError: as soon as they are seen, most before the first step.
    """
    objective, output = plan.objective, plan.output
    if not resume and output.exists() and any(output.iterdir()):
        raise OptionError(f"{output} is not empty; give another --output, or go on with --resume.")
    if method.kind == "full" and engine.checkpoint.quantization:
        raise OptionError("kind is full, but the checkpoint is quantized; take lora, or a checkpoint of floats.")
    splits = load(engine, plan.data, plan.turns, plan.max_length, plan.skip_long)
    train, valid = splits["train"], splits["valid"]
    if not train:
        raise DataError(f"{plan.data} has no sample to train on; put some into train.jsonl.")
    fill = habit(engine, train, objective, method.seed) if plan.fill is None else plan.fill
    if not 0 <= fill < engine.config.text.vocab_size:
        raise OptionError(f"fill is {fill}; it should be a token id below {engine.config.text.vocab_size}.")
    batches = Batches(engine, train, fill, objective.fill, method.seed)
    checks = Batches(engine, valid, fill, objective.fill, method.seed) if valid else None
    trainer = Trainer(engine.model, method, objective)
    about = {
        "model": fingerprint(engine.checkpoint),
        "dtype": str(engine.model.dtype),
        "data": digest(train),
        "batch_size": plan.batch_size,
        "objective": vars(objective),
        "fill": fill,
    }
    try:
        if resume:
            trainer.resume(output, about)
        longest = max(len(target.prompt) + len(target.answer) for example in train for target in example.targets)
        weights = sum(a.nbytes for a in flat(engine.model.parameters()).values())
        parts = trainer.parts(plan.batch_size, longest)
        needed = need(engine.checkpoint, method, plan.batch_size, longest, trainer.trainable, weights, parts)
        say(
            f"Canvases are filled with {engine.tokenizer.convert_ids_to_tokens(fill)} behind an answer; "
            f"{count(len(train), 'sample')} to train on, {len(valid)} to validate; "
            f"{trainer.trainable:,} weights are trained; "
            f"about {needed.total / GIB:.2f} GiB of memory at most, of {device.available() / GIB:.1f}."
        )
        have = device.available()
        if needed.total > have and not ignore_memory:
            raise MemoryLimitError(
                f"Training needs about {needed.total / GIB:.1f} GiB and this machine gives {have / GIB:.1f}; "
                "lower --batch-size or --max-length, or try anyway with --ignore-memory."
            )
        output.mkdir(parents=True, exist_ok=True)
        if not resume:
            trainer.save(output, about)  # whatever happens, --resume finds something
        elif trainer.step == method.steps:
            save(engine, trainer, output, about)  # the end may have come between two files
        yield from _steps(
            engine, trainer, plan, batches, checks, valid, Log(output / "log.csv", trainer.step), about, stop
        )
    finally:
        trainer.done()


def habit(engine: Engine, examples: Sequence[Example], objective: Objective, seed: int) -> int:
    """The token that a checkpoint itself puts behind an answer: an end token or padding, whichever it expects most."""
    length = engine.config.canvas_length
    room = [i for i, one in enumerate(examples) if all(len(target.answer) % length for target in one.targets)][:4]
    candidates = list(dict.fromkeys([*engine.options.end_tokens, engine.tokenizer.pad_token_id or 0]))
    if not room:
        return candidates[0]
    lost: dict[int, Any] = {}
    for token in candidates:
        batch = Batches(engine, examples, token, True, seed).batch(room, room)
        noise = draw_noise(batch, objective, engine.config.text.vocab_size, mx.random.key(seed))
        lost[token] = loss(engine.model, batch, noise, replace(objective, encoder_weight=0.0)).canvas.item()
    return min(lost, key=lost.__getitem__)


def _steps(
    engine: Engine,
    trainer: Trainer,
    plan: Plan,
    batches: Batches,
    checks: Batches | None,
    valid: Sequence[Example],
    log: Log,
    about: dict[str, Any],
    stop: Callable[[], bool],
) -> Iterator[Progress]:
    steps, size = trainer.method.steps, plan.batch_size
    before = (log.rows[-1]["seconds"] or 0.0) if log.rows else 0.0
    mx.reset_peak_memory()
    began, highest = time.perf_counter(), 0
    while trainer.step < steps:
        first = trainer.step * trainer.method.accumulate * size
        drawn = (
            batches.drawn(range(first + i * size, first + (i + 1) * size)) for i in range(trainer.method.accumulate)
        )
        told = trainer.update(list(drawn))
        highest = max(highest, trainer.peak_bytes)  # before a generation counts anew
        last, stopping = trainer.step == steps, stop()
        due = (
            bool(checks and plan.validate_every) and (last or trainer.step % plan.validate_every == 0) and not stopping
        )
        saved = last or stopping or due or trainer.step % plan.save_every == 0
        if saved:
            save(engine, trainer, plan.output, about)
        found = validate(engine, trainer, checks, valid, plan) if due and checks else {}
        ended = last or stopping or (due and stop())
        seconds = before + time.perf_counter() - began
        log.add(
            step=trainer.step, seconds=round(seconds, 3), learning_rate=told.learning_rate, loss=told.total,
            canvas=told.canvas, encoder=told.encoder, norm=told.norm, peak_bytes=highest,
            valid_loss=found.get("valid_loss"), valid_right=found.get("valid_right"),
        )  # fmt: skip
        if saved:
            draw(log.rows, plan.output / "curves.png")
        yield Progress(trainer.step, steps, told, seconds, highest, **found)
        if ended:
            return


def validate(engine: Engine, trainer: Trainer, checks: Batches, valid: Sequence[Example], plan: Plan) -> dict[str, Any]:
    """The loss on validation data, under the same noise every time, and the share of generated answers right."""
    most, size = min(len(valid), plan.validate), plan.batch_size
    losses = []
    for start in range(0, most, size):
        numbers = list(range(start, min(start + size, most)))
        losses += [trainer.measure(checks.batch(numbers, numbers), start).total.item()] * len(numbers)
    found: dict[str, Any] = {"valid_loss": float(np.mean(losses))}
    asked = [example for example in valid if example.chat][: plan.generate]
    if asked:
        with generating(trainer):
            marked = evaluate(engine, asked, batch_size=size, seed=trainer.method.seed)
        found |= {"valid_right": marked.share, "sample": (marked.answers[0].text, marked.answers[0].expected)}
    return found


@contextmanager
def generating(trainer: Trainer) -> Iterator[None]:
    """While it lasts, the model generates as a loaded one does: no dropout, nothing computed again."""
    model, apply = trainer.model, trainer.model._apply
    model.eval()
    model._apply = Layer.__call__
    try:
        yield
    finally:
        model.train()
        model._apply = apply


def save(engine: Engine, trainer: Trainer, output: Path, about: dict[str, Any]) -> None:
    """Write the adapter, or the checkpoint of full training, and the state; each file is replaced as a whole."""
    if trainer.method.kind == "full":
        from ..adapters.fuse import write_checkpoint

        write_checkpoint(engine.model, engine.checkpoint, output / "model")
    else:
        peft.write(deltas.taken(trainer.model), output, str(engine.checkpoint.path))
    trainer.save(output, about)


def digest(examples: Sequence[Example]) -> str:
    """What a run's data are told by."""
    held = hashlib.sha256()
    for example in examples:
        held.update(json.dumps([[t.prompt, t.answer, t.images] for t in example.targets]).encode())
    return held.hexdigest()[:16]


def fingerprint(checkpoint: Checkpoint) -> str:
    """What a run's model is told by: its configuration, and its tensors' names, dtypes and shapes."""
    tensors = sorted((name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())
    told = json.dumps([checkpoint.raw_config, tensors], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
