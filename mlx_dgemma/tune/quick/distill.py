"""A whole distillation: answer, choose, record, train, measure; in rounds, and resumed exactly."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...adapters import deltas, peft
from ...engine import Engine
from ...errors import DataError, MemoryLimitError, OptionError, count, human
from ...files import atomic_file, check_name, sweep_folder, told_errors
from ...model import device
from ..config import TrainerConfig
from ..curves import MetricsLog, draw_curves
from ..memory import training_need
from ..run import generating, model_digest
from ..trainer import StepMetrics, Trainer, flatten
from .answers import Answer, answer_together, fill_token, trusted, vote
from .config import DistillConfig
from .held_back import HeldBack, Measured
from .loss import Distillation, StateBatches
from .prompts import Question, read_prompts
from .states import Canvas, States, load, record

GIB = 2**30
COLUMNS = (
    "step", "seconds", "learning_rate", "loss", *Distillation.parts, "norm", "agreement", "positions", "peak_bytes",
)  # fmt: skip
REPORT = "report.json"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: "expecting", "measuring", "answering", "recording" or "training".
        round: from 1; 0 before the first.
        done: answers, canvases or steps done in this stage; of training in all rounds.
        of: how many there are.
        seconds: duration of this stage so far; of training that of the run.
        metrics: of the last step of training.
        measured: the held-back prompts, after a measurement.
    """

    stage: str
    round: int
    done: int
    of: int
    seconds: float
    metrics: StepMetrics | None = None
    measured: Measured | None = None


def distill(
    engine: Engine,
    trainer_config: TrainerConfig,
    config: DistillConfig,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
    ignore_memory: bool = False,
) -> Iterator[Progress]:
    """Train an adapter that makes the model say early what it says late.

    Args:
        engine: a loaded checkpoint without an adapter; its model is changed.
        trainer_config: how the adapter is trained; its steps are those of all rounds.
        config: the prompts, and what becomes of them.
        resume: continue the run in the output folder; answers and states that are complete there are used again.
        stop: called after every batch of answers and every step; if it returns True, the run is saved and ends.
        say: called with lines about the prompts, the memory that is needed, and what is learned.
        ignore_memory: start even if the memory does not seem to be enough.

    Raises:
        OptionError, DataError, MemoryLimitError: most of them before the first answer.
        DgemmaError: a file cannot be written; what was saved before is kept.
    """
    output = config.output
    if trainer_config.kind != "lora":
        raise OptionError(f"kind is {trainer_config.kind!r}; a distillation trains a lora.")
    if engine.model.compute_dtype != engine.model.dtype:
        raise OptionError(
            "compute_dtype is float16, but gradients need the range of the model's own dtype; "
            "train without --compute-dtype (compute_dtype)."
        )
    if config.rounds > trainer_config.steps:
        raise OptionError(f"rounds is {config.rounds}; it should be at most the {trainer_config.steps} steps.")
    check_name(output)
    sweep_folder(output)
    if not resume and output.exists() and any(output.iterdir()):
        raise OptionError(f"{output} is not empty; give another --output, or continue its run with --resume.")
    questions = read_prompts(engine, config.prompts, config.by)
    order = np.random.default_rng([trainer_config.seed, 3]).permutation(len(questions))
    shuffled = [questions[i] for i in order]
    held_back, used = shuffled[: config.held_back], shuffled[config.held_back :]
    if not used:
        raise DataError(
            f"{config.prompts} has {count(len(questions), 'prompt')}, and {config.held_back} are held back; "
            "give more prompts, or a smaller --held-back."
        )
    trainers: list[Trainer] = []
    objective = Distillation(config.certainty, config.divergence)
    deltas.add_denoising_adapter(
        engine.model, lambda: trainers.append(Trainer(engine.model, trainer_config, objective))
    )
    run = _Run(engine, trainers[0], config, used, HeldBack(held_back, trainer_config.seed), stop, say)
    try:
        if resume:
            run.trainer.resume(output, run.properties)
            run.held_back.load(output)
        run.check_memory(ignore_memory)
        with told_errors(output):
            output.mkdir(parents=True, exist_ok=True)
        if not resume:
            run.save_state()
        yield from run.whole()
    finally:
        run.trainer.close()


@dataclass
class _Run:
    """The parts of a run."""

    engine: Engine
    trainer: Trainer
    config: DistillConfig
    questions: Sequence[Question]
    held_back: HeldBack
    stop: Callable[[], bool]
    say: Callable[[str], None]
    stopped: bool = False
    measured: list[Measured] = field(default_factory=list)  # after each round of this process

    @property
    def properties(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        digest = hashlib.sha256(json.dumps([one.tokens for one in self.questions]).encode()).hexdigest()[:16]
        own = {n: v for n, v in vars(self.config).items() if n not in ("prompts", "output", "save_every")}
        return {
            "model": model_digest(self.engine.checkpoint),
            "dtype": str(self.engine.model.dtype),
            "data": digest,
            **own,
        }

    @property
    def steps_a_round(self) -> int:
        return -(-self.trainer.config.steps // self.config.rounds)

    def check_memory(self, ignore_memory: bool) -> None:
        """Tell what will be trained and how much memory it needs.

        Raises:
            MemoryLimitError: the machine does not have enough memory.
        """
        engine, trainer, config = self.engine, self.trainer, self.config
        answer = config.max_tokens or engine.options.max_tokens
        longest = max(len(one.tokens) for one in self.questions) + answer
        weights = sum(a.nbytes for a in flatten(engine.model.parameters()).values())
        processes = trainer.process_count(config.batch_size, longest)
        need = training_need(
            engine.checkpoint, trainer.config, config.batch_size, longest, trainer.trainable, weights, processes
        ).total
        available = device.available()
        state = 2 * engine.config.canvas_length * engine.config.text.hidden_size
        self.say(
            f"Training {trainer.trainable:,} weights on {count(len(self.questions), 'prompt')}, "
            f"{len(self.held_back.questions)} held back. At most about {need / GIB:.2f} GiB of memory is needed, "
            f"{available / GIB:.1f} GiB is available. A round's states take at most about "
            f"{human(state * (config.states - 1) * len(self.questions))} of disk for answers of one canvas."
        )
        if need > available and not ignore_memory:
            raise MemoryLimitError(
                f"Training needs about {need / GIB:.1f} GiB of memory, but this machine has {available / GIB:.1f} GiB; "
                "lower --batch-size or --max-tokens, or try it anyway with --ignore-memory."
            )

    def whole(self) -> Iterator[Progress]:
        """All that is left to do."""
        yield from self._look_at_held_back()
        last = self.trainer.config.steps
        if self.trainer.step == last and not (self.config.output / REPORT).exists():
            yield from self._end_round()  # the earlier part ended between two files
        while not self.stopped and self.trainer.step < last:
            number = self.trainer.step // self.steps_a_round
            states = yield from self._states(number)
            if states is None:
                return
            yield from self._train(states, min((number + 1) * self.steps_a_round, last))
            if not self.stopped:
                yield from self._end_round()

    def _look_at_held_back(self) -> Iterator[Progress]:
        """What the frozen model answers to the held-back prompts."""
        held, config = self.held_back, self.config
        if held.before is not None or not held.questions:
            return
        if self.trainer.step:
            raise DataError(f"{config.output} has lost its held_back.json; start a new run without --resume.")
        started, total = time.perf_counter(), config.best_of * len(held.questions)
        with generating(self.trainer):
            for done in held.expect(self.engine, config.answer_batch, config.agree, config.best_of, self._teacher):
                yield Progress("expecting", 0, done, total, time.perf_counter() - started)
        held.before = yield from self._measure(0)
        held.save(config.output)

    def _teacher(self, take: int) -> dict[str, Any]:
        """Options of the answers of a take, from 0."""
        # Drafts leave the text as it is. They save passes, which cost a CPU little.
        by_tokens = "causal" if mx.default_device() == mx.cpu else "speculative"
        kind: dict[str, dict[str, Any]] = {
            "exact": {"exact": True}, "default": {}, "causal": {"mode": by_tokens, "temperature": min(take, 1)},
        }  # fmt: skip
        return {"max_tokens": self.config.max_tokens, **kind[self.config.teacher]}

    def _measure(self, number: int) -> Generator[Progress, None, Measured]:
        held, started = self.held_back, time.perf_counter()
        with generating(self.trainer):
            for one in held.measure(self.engine, self.config.answer_batch, max_tokens=self.config.max_tokens):
                if isinstance(one, Measured):
                    return one
                yield Progress("measuring", number, one, len(held.questions), time.perf_counter() - started)
        raise AssertionError("a measurement ends with its result")

    def _states(self, number: int) -> Generator[Progress, None, States | None]:
        """The states of a round; None if the run is to stop before they are complete."""
        folder, config = self.config.output / "rounds" / str(number + 1), self.config
        states = load(self.engine, folder)
        if states is None:
            if self.trainer.step != number * self.steps_a_round:
                raise DataError(f"{folder} has lost its states; start a new run without --resume.")
            with told_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with generating(self.trainer):
                canvases = yield from self._canvases(number)
                if canvases is None:
                    return None
                started, seed = time.perf_counter(), self.trainer.config.seed + number
                for done in record(self.engine, canvases, folder, config.states, config.answer_batch, seed):
                    yield Progress("recording", number + 1, done, len(canvases), time.perf_counter() - started)
                    if self._stopping():
                        return None
            states = load(self.engine, folder)
            assert states is not None
        learned = sum(canvas.weight > 0 for canvas in states.canvases)
        self.say(f"Round {number + 1}: {learned} of {len(states.canvases)} canvases are learned.")
        return states

    def _canvases(self, number: int) -> Generator[Progress, None, list[Canvas] | None]:
        """The canvases of the chosen answers; None if the run is to stop."""
        config, length = self.config, self.engine.config.canvas_length
        answers = yield from self._answers(number if config.reteach else 0)
        if answers is None:
            return None
        voted = [vote(takes) for takes in answers]
        families, counts = [one.family for one in self.questions], [votes for _, votes in voted]
        learned = trusted(families, counts, config.agree, config.family_agreement)
        agreed = sum(votes >= config.agree for votes in counts)
        self.say(f"{agreed} of {count(len(counts), 'prompt')} got the same answer {config.agree} times.")
        found, fill = [], 0
        if config.teacher == "causal":  # canvases of diffusion are full
            fill = fill_token(self.engine, self.questions[0], self.trainer.config.seed)
        for question, (best, votes), learn in zip(self.questions, voted, learned):
            tokens = best.tokens
            for at, block in zip(range(0, len(tokens), length), best.canvases(length, fill)):
                prefix = [*question.tokens, *tokens[:at]]
                own = min(len(tokens) - at, length)
                weight = 1.0 if learn else 0.0 if votes >= config.agree else config.open_weight
                open_ = not learn and weight > 0
                found.append(Canvas(question.where, best.text, prefix, block, own, weight, open_))
        return found

    def _answers(self, number: int) -> Generator[Progress, None, list[list[Answer]] | None]:
        """The answers of a round to every prompt; batches that are on disk are not answered again."""
        config, takes = self.config, self.config.best_of
        folder = config.output / "rounds" / str(number + 1)
        file, size = folder / "answers.jsonl", config.answer_batch
        answers: list[list[Answer]] = [[] for _ in self.questions]
        jobs = [(i, take) for take in range(takes) for i in range(len(self.questions))]
        known = _read_answers(file)
        whole = len(known) // size * size if len(known) < len(jobs) else len(jobs)  # batches as they were
        started = time.perf_counter()
        with told_errors(file):
            file.write_text("".join(known[:whole]), "utf-8")
        for (i, _), line in zip(jobs, known[:whole]):
            answers[i].append(_answer_of(file, line))
        for start in range(whole, len(jobs), size):
            some = jobs[start : start + size]
            seeds = [self.trainer.config.seed + ((number * takes + take + 1) << 32) + i for i, take in some]
            chosen, ways = [self.questions[i] for i, _ in some], [self._teacher(take) for _, take in some]
            made = answer_together(self.engine, chosen, seeds, ways=ways)
            for (i, _), answer in zip(some, made):
                answers[i].append(answer)
            with told_errors(file), file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(asdict(one)) + "\n" for one in made)
            yield Progress("answering", number + 1, start + len(some), len(jobs), time.perf_counter() - started)
            if self._stopping():
                return None
        return answers

    def _stopping(self) -> bool:
        self.stopped = self.stopped or self.stop()
        return self.stopped

    def _train(self, states: States, end: int) -> Iterator[Progress]:
        """Train until `end` steps are done, or until the run is to stop."""
        trainer, config = self.trainer, self.config
        number, batches = trainer.step // self.steps_a_round, StateBatches(states, config.clean, trainer.config.seed)
        log = MetricsLog(config.output / "log.csv", trainer.step, COLUMNS)
        earlier = (log.rows[-1]["seconds"] or 0.0) if log.rows else 0.0
        mx.reset_peak_memory()
        start, peak = time.perf_counter(), 0
        while trainer.step < end:
            size, accumulate = config.batch_size, trainer.config.accumulate
            first = trainer.step * accumulate * size
            numbers = [range(at, at + size) for at in range(first, first + accumulate * size, size)]
            metrics = trainer.update([batches.sample(some) for some in numbers])
            peak, seconds = max(peak, trainer.peak_bytes), earlier + time.perf_counter() - start
            log.add(
                step=trainer.step, seconds=round(seconds, 3), learning_rate=metrics.learning_rate, loss=metrics.total,
                **metrics.parts, norm=metrics.norm, peak_bytes=peak,
            )  # fmt: skip
            stopping = self._stopping()
            if stopping or trainer.step == end or trainer.step % config.save_every == 0:
                self.save()
                draw_curves(log.rows, config.output / "curves.png")
            yield Progress("training", number + 1, trainer.step, trainer.config.steps, seconds, metrics)
            if stopping:
                return

    def _end_round(self) -> Iterator[Progress]:
        """Measure what the round did, and write it down; after the last round that is the report."""
        trainer, config, held = self.trainer, self.config, self.held_back
        number, log = -(-trainer.step // self.steps_a_round), None
        if held.questions:
            after = yield from self._measure(number)
            self.measured.append(after)
            log = MetricsLog(config.output / "log.csv", trainer.step, COLUMNS)
            log.complete(agreement=after.agreement, positions=after.positions)
            yield Progress("measuring", number, after.prompts, after.prompts, 0.0, measured=after)
        if trainer.step == trainer.config.steps:
            told = {"before": held.before, "after": self.measured[-1] if self.measured else None}
            report = {name: asdict(one) if one else None for name, one in told.items()}
            with atomic_file(config.output / REPORT) as draft:
                draft.write_text(json.dumps(report, indent=2) + "\n", "utf-8")

    def save(self) -> None:
        """Write the adapter and the state. Each file is replaced atomically."""
        peft.write(deltas.extract_adapter(self.trainer.model), self.config.output, str(self.engine.checkpoint.path))
        self.save_state()

    def save_state(self) -> None:
        """Write the state, with all options of the run, so that it can be resumed without naming them again."""
        options = {n: v for n, v in vars(self.config).items() if n not in ("prompts", "output")}
        self.trainer.save(self.config.output, self.properties, options)


def _read_answers(file: Path) -> list[str]:
    """The whole lines of a file of answers; the last one may be cut short."""
    if not file.exists():
        return []
    content = file.read_text("utf-8")
    return content[: content.rfind("\n") + 1].splitlines(keepends=True)


def _answer_of(file: Path, line: str) -> Answer:
    try:
        answer = Answer(**json.loads(line))
        return replace(answer, blocks=tuple(map(tuple, answer.blocks)))
    except (ValueError, TypeError):
        raise DataError(f"{file} is broken; remove it, and --resume answers again.") from None
