"""A whole fine-tuning run: read the data, train, validate, save, and write an adapter or a checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..adapters import deltas, peft
from ..adapters.fuse import write_checkpoint
from ..checkpoint.folder import Checkpoint, Settings
from ..checkpoint.foreign import own_quantization
from ..checkpoint.together import digest_of
from ..distributed.agreement import check_equal, is_any, together
from ..distributed.group import ALONE, Group
from ..engine import Engine
from ..errors import CircumstanceError, DataError, MemoryLimitError, OptionError, count
from ..files import check_name, sweep_folder, told_errors
from ..model import device
from ..model.layers import Layer
from ..prompt.images import open_file
from .batches import Batches
from .config import RunConfig, TrainerConfig
from .curves import MetricsLog, draw_curves
from .data import Example, find, load
from .evaluate import evaluate
from .memory import training_need
from .objective import Objective, draw_noise, loss
from .trainer import StepMetrics, Trainer, flatten

GIB = 2**30


@dataclass(frozen=True)
class Progress:
    """The state of a run after a step.

    Attributes:
        step: number of steps done.
        steps: number of steps in total.
        metrics: of this step.
        seconds: duration of the run so far, earlier parts of a resumed run included.
        peak_bytes: peak memory so far.
        valid_loss: loss on the validation data, if this step had a validation.
        valid_right: share of generated answers that are right, if this step had a validation.
        sample: the first generated answer and the expected one, if this step had a validation.
    """

    step: int
    steps: int
    metrics: StepMetrics
    seconds: float
    peak_bytes: int
    valid_loss: float | None = None
    valid_right: float | None = None
    sample: tuple[str, str] | None = None


def tune(
    engine: Engine,
    trainer_config: TrainerConfig,
    run_config: RunConfig,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    ignore_memory: bool = False,
    group: Group = ALONE,
) -> Iterator[Progress]:
    """Train step by step. Whenever this generator ends, `run_config.output` contains the last save.

    Of a group each rank computes its share of every batch, and rank 0 alone writes. All ranks need the same data.

    Args:
        engine: a loaded checkpoint; its model is changed.
        trainer_config: what is trained, and how.
        run_config: data, objective, and when to save and validate.
        resume: continue the run that was saved in the output folder.
        stop: called after every step; if it returns True, the run is saved and ends.
        say: called with a line about the data and the memory that is needed.
        ignore_memory: start even if the memory does not seem to be enough.
        group: the ranks; `engine` holds the whole model on each.

    Raises:
        OptionError, DataError, PromptError, MemoryLimitError: most of them before the first step.
        CircumstanceError: another rank has failed, or has other data or another checkpoint.
        DgemmaError: a file cannot be written; what was saved before is kept.
    """
    check_before(run_config, resume, group)
    run = together(group, lambda: _read(engine, trainer_config, run_config, group))
    trainer = run.trainer
    check_equal(group, run.compared)
    try:
        together(group, lambda: run.begin(resume, say, ignore_memory))
        trainer.share_state()
        if resume and trainer.step == trainer_config.steps:
            run.save()  # the earlier run may have ended between writing two files
        yield from run.steps(stop)
    finally:
        trainer.close()


def check_before(run_config: RunConfig, resume: bool = False, group: Group = ALONE) -> None:
    """Check what needs no model: the objective, the folder to make, and that the data are there.

    Raises:
        OptionError: the name of the folder is not UTF-8, or it holds something else, or the ranks do not divide the
            batch.
        DataError: there are no such data.
    """
    output, size = run_config.output, run_config.batch_size
    _ = run_config.objective
    if size % group.size:
        raise OptionError(f"batch_size is {size}, which {group.size} ranks do not divide; give a multiple of theirs.")

    def check() -> None:
        find(run_config.data, ("train",))
        if group.rank == 0:
            check_name(output)
            sweep_folder(output)
            if not resume and output.exists() and any(output.iterdir()):
                raise CircumstanceError(
                    f"{output} is not empty; give another --output, or continue its run with --resume."
                )

    together(group, check)


def _read(engine: Engine, trainer_config: TrainerConfig, run_config: RunConfig, group: Group) -> _Run:
    """Read the data, and prepare the model."""
    objective = run_config.objective
    if engine.model.compute_dtype != engine.model.dtype:
        raise OptionError(
            "compute_dtype is float16, but gradients need the range of the model's own dtype; "
            "train without --compute-dtype (compute_dtype)."
        )
    check_trainable(engine.checkpoint, trainer_config, run_config.fill)
    splits = load(engine, run_config.data, run_config.turns, run_config.max_length, run_config.skip_long)
    train, valid = splits["train"], splits["valid"]
    if not train:
        raise DataError(f"{run_config.data} has no training samples; put some into train.jsonl.")
    seed, fill = trainer_config.seed, run_config.fill
    if fill is None:
        fill = infer_fill_token(engine, train, objective, seed)
    return _Run(
        engine,
        Trainer(engine.model, trainer_config, objective, group),
        run_config,
        train,
        valid,
        Batches(engine, train, fill, objective.fill, seed),
        Batches(engine, valid, fill, objective.fill, seed),
        {
            "model": model_digest(engine.checkpoint),
            "dtype": str(engine.model.dtype),
            "data": data_digest(train),
            "batch_size": run_config.batch_size,
            "objective": vars(objective),
            "fill": fill,
            "ranks": group.size,
        },
    )


def check_trainable(settings: Settings | Checkpoint, trainer_config: TrainerConfig, fill: int | None) -> None:
    """Check what a checkpoint's small files decide.

    Raises:
        OptionError: the checkpoint has not so many layers or no such token, or cannot be trained so.
    """
    text, kind = settings.config.text, trainer_config.kind
    if kind == "full" and own_quantization(settings.raw_config):
        raise OptionError("kind is full, but the checkpoint is quantized; use lora, or an unquantized checkpoint.")
    if kind == "dora" and "experts" in trainer_config.targets:
        raise OptionError("DoRA does not support experts; leave experts out of --targets, or use lora.")
    if trainer_config.layers is not None and trainer_config.layers > text.num_hidden_layers:
        raise OptionError(f"layers is {trainer_config.layers}; the model has {text.num_hidden_layers}.")
    if fill is not None and not 0 <= fill < text.vocab_size:
        raise OptionError(f"fill is {fill}; it should be a token id below {text.vocab_size}.")


def infer_fill_token(engine: Engine, examples: Sequence[Example], objective: Objective, seed: int) -> int:
    """The token that the checkpoint expects after an answer: the end or padding token with the lowest loss there."""
    length = engine.config.canvas_length
    chosen = [i for i, one in enumerate(examples) if all(len(target.answer) % length for target in one.targets)][:4]
    candidates = list(dict.fromkeys([*engine.options.end_tokens, engine.tokenizer.pad_token_id or 0]))
    if not chosen:
        return candidates[0]
    losses: dict[int, Any] = {}
    for token in candidates:
        batch = Batches(engine, examples, token, True, seed).batch(chosen, chosen)
        noise = draw_noise(batch, objective, engine.config.text.vocab_size, mx.random.key(seed))
        losses[token] = loss(engine.model, batch, noise, replace(objective, encoder_weight=0.0)).canvas.item()
    return min(losses, key=losses.__getitem__)


@dataclass(frozen=True)
class _Run:
    """The parts of a run.

    Attributes:
        engine: with the model.
        trainer: of the model.
        config: data, objective and schedule.
        train, valid: the examples.
        batches, valid_batches: made of them.
        properties: what must be the same when the run is resumed.
    """

    engine: Engine
    trainer: Trainer
    config: RunConfig
    train: Sequence[Example]
    valid: Sequence[Example]
    batches: Batches
    valid_batches: Batches
    properties: dict[str, Any]

    @property
    def compared(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        config = {**vars(self.config), **vars(self.trainer.config)}
        del config["data"], config["output"], config["fill"]
        return {
            "fill token": self.properties["fill"],
            "training data": self.properties["data"],
            "validation data": data_digest(self.valid),
            "checkpoint": digest_of(self.engine.checkpoint)[:16],
            "dtype": self.properties["dtype"],
            "options": json.dumps(config),
        }

    def begin(self, resume: bool, say: Callable[[str], None], ignore_memory: bool) -> None:
        """Load the state, or make the folder and the first state; of a group rank 0 does that. Check the memory."""
        output, is_writer = self.config.output, self.trainer.group.rank == 0
        if resume and is_writer:
            self.trainer.resume(output, self.properties)
        self.check_memory(say, ignore_memory)
        if is_writer:
            with told_errors(output):
                output.mkdir(parents=True, exist_ok=True)
            if not resume:
                self.save_state()  # so that --resume works from the very start

    def check_memory(self, say: Callable[[str], None], ignore_memory: bool) -> None:
        """Tell what will be trained and how much memory it needs.

        Raises:
            MemoryLimitError: the machine does not have enough memory.
        """
        engine, trainer = self.engine, self.trainer
        rows = self.config.batch_size // trainer.group.size
        longest = max(len(target.prompt) + len(target.answer) for example in self.train for target in example.targets)
        weights = sum(a.nbytes for a in flatten(engine.model.parameters()).values())
        processes = trainer.process_count(rows, longest)
        need = training_need(
            engine.checkpoint, trainer.config, rows, longest, trainer.trainable, weights, processes
        ).total
        available = device.available()
        each = f" on each of {trainer.group.size} ranks" if trainer.group.size > 1 else ""
        say(
            f"Training {trainer.trainable:,} weights on {count(len(self.train), 'sample')}, validating on "
            f"{len(self.valid)}; canvases are filled with "
            f"{engine.tokenizer.convert_ids_to_tokens(self.properties['fill'])} after an answer. "
            f"At most about {need / GIB:.2f} GiB of memory is needed{each}, {available / GIB:.1f} GiB is available."
        )
        if need > available and not ignore_memory:
            raise MemoryLimitError(
                f"Training needs about {need / GIB:.1f} GiB of memory, but this machine has {available / GIB:.1f} GiB; "
                "lower --batch-size or --max-length, or try it anyway with --ignore-memory."
            )

    def steps(self, stop: Callable[[], bool]) -> Iterator[Progress]:
        """Train to the last step, or until `stop` returns True."""
        trainer, config, group = self.trainer, self.config, self.trainer.group
        log = together(group, lambda: MetricsLog(config.output / "log.csv", trainer.step) if group.rank == 0 else None)
        earlier = (log.rows[-1]["seconds"] or 0.0) if log and log.rows else 0.0
        mx.reset_peak_memory()
        start, peak = time.perf_counter(), 0
        while trainer.step < trainer.config.steps:
            metrics = trainer.update(self._next_batches())
            peak = max(peak, trainer.peak_bytes)  # generating answers resets MLX's peak
            last, stopping = trainer.step == trainer.config.steps, is_any(group, stop())
            regular = config.validate_every and (last or trainer.step % config.validate_every == 0)
            validating = bool(self.valid and regular and not stopping)
            saving = last or stopping or validating or trainer.step % config.save_every == 0
            seconds = earlier + time.perf_counter() - start
            # Before the state, so that a run that is killed and resumed has a row for each step.
            if log:
                log.add(
                    step=trainer.step, seconds=round(seconds, 3), learning_rate=metrics.learning_rate,
                    loss=metrics.total, **metrics.parts, norm=metrics.norm, peak_bytes=peak,
                )  # fmt: skip
            if saving:
                self.save()
            validation = self.validate() if validating else {}
            ending = last or stopping or (validating and is_any(group, stop()))
            if saving and log:
                seconds = earlier + time.perf_counter() - start
                scores = {name: validation.get(name) for name in ("valid_loss", "valid_right")}
                log.complete(seconds=round(seconds, 3), **scores)
                draw_curves(log.rows, config.output / "curves.png")
            yield Progress(trainer.step, trainer.config.steps, metrics, seconds, peak, **validation)
            if ending:
                return

    def _next_batches(self) -> list[Any]:
        size, accumulate = self.config.batch_size, self.trainer.config.accumulate
        first = self.trainer.step * accumulate * size
        return [self.batches.sample(range(at, at + size)) for at in range(first, first + accumulate * size, size)]

    def validate(self) -> dict[str, Any]:
        """The loss on validation data, always with the same noise, and the share of generated answers that are right.

        Of a group rank 0 alone generates answers.

        Returns:
            The fields `valid_loss`, `valid_right` and `sample` of `Progress`.
        """
        trainer, config = self.trainer, self.config
        limit, size = min(len(self.valid), config.validate), config.batch_size
        losses = []
        for start in range(0, limit, size):
            numbers = list(range(start, min(start + size, limit)))
            total = trainer.validation_loss(self.valid_batches.batch(numbers, numbers), start)[0]
            losses += [total.item()] * len(numbers)
        result: dict[str, Any] = {"valid_loss": float(np.mean(losses))}
        asked = [example for example in self.valid if example.chat][: config.generate]
        if asked and trainer.group.rank == 0:
            with generating(trainer):
                outcome = evaluate(self.engine, asked, batch_size=size, seed=trainer.config.seed)
            first = outcome.answers[0]
            result |= {"valid_right": outcome.share, "sample": (first.text, first.expected)}
        return result

    def save(self) -> None:
        """Write the adapter, or with full training the checkpoint, and the state. Each file is replaced atomically.

        Of a group rank 0 writes. All go on from what it wrote, so that a resumed run does the same.
        """
        self.trainer.share_state()
        together(self.trainer.group, self._write)

    def _write(self) -> None:
        if self.trainer.group.rank:
            return
        model, checkpoint, output = self.trainer.model, self.engine.checkpoint, self.config.output
        if self.trainer.config.kind == "full":
            write_checkpoint(model, checkpoint, output / "model")
        else:
            peft.write(deltas.extract_adapter(model), output, str(checkpoint.path))
        self.save_state()

    def save_state(self) -> None:
        """Write the state, with all options of the run, so that it can be resumed without naming them again."""
        options = {**vars(self.config), "fill": self.properties["fill"]}
        del options["data"], options["output"]
        self.trainer.save(self.config.output, self.properties, options)


@contextmanager
def generating(trainer: Trainer) -> Iterator[None]:
    """Prepare the model for generation, and for training again at the end: no dropout, no gradient checkpointing."""
    model, apply = trainer.model, trainer.model._apply
    model.eval()
    model._apply = Layer.__call__
    try:
        yield
    finally:
        model.train()
        model._apply = apply


def data_digest(examples: Sequence[Example]) -> str:
    """A digest of the training data by content: prompts and answers as token ids, and the bytes of image files."""

    @cache
    def content(source: str) -> str:
        _, file = open_file(source)
        with file:
            return hashlib.sha256(file.read()).hexdigest()

    digest = hashlib.sha256()
    for example in examples:
        told = [[target.prompt, target.answer, [content(one) for one in target.images]] for target in example.targets]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()[:16]


def model_digest(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint: its configuration, and the names, dtypes and shapes of its tensors."""
    tensors = sorted((name, info.dtype, info.shape) for name, info in checkpoint.tensors.items())
    text = json.dumps([checkpoint.raw_config, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
