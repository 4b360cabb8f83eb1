"""`mlx-dgemma tune`: a thin layer over `tune()`. Heavy modules are imported when it runs."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...distributed.watched import Watched, watched
from ...errors import DgemmaError, count, human
from ..common import ModelChoice, model_options, number_option
from ..terminal import Terminal

if TYPE_CHECKING:
    from ...engine import Engine
    from ...tune.run import Progress


VARIANTS = ("google", "nemo", "megatron", "megatron-reweighted", "megatron-loo", "megatron-reweighted-loo")
TARGETS = ("attention", "mlp", "experts", "router", "self-conditioning")
OPTIMIZERS = ("adamw", "muon")


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Use the values in a YAML file as defaults of the other options.

    Raises:
        DgemmaError: the file is not YAML, not a mapping, or names an unknown option.
    """
    if path is None:
        return
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DgemmaError(f"{path} is not valid YAML ({' '.join(str(error).split())}); fix it.") from None
    if not isinstance(content, dict):
        raise DgemmaError(f"{path} holds no names with values; write lines such as rank: 16.")
    known = {one.name: one for one in ctx.command.params if one.name != "config"}
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    if "keep" in values:
        values["recompute"] = not values.pop("keep")
    for name, value in values.items():
        if name not in known:
            raise DgemmaError(f"{path} sets {name}, which is no option of tune; see mlx-dgemma tune --help.")
        values[name] = _check_value(path, known[name], value)
    if "model" in values and os.environ.get("MLX_DGEMMA_MODEL"):
        raise DgemmaError(f"{path} sets model, and so does $MLX_DGEMMA_MODEL; unset one of them.")
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _check_value(path: str, param: click.Parameter, value: Any) -> Any:
    """Return a value if it has the option's type. Nothing is converted or rounded.

    Raises:
        DgemmaError: it has another type.
    """
    if param.multiple:
        value = [value] if isinstance(value, str) else value
        is_valid, expected = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of words"
    elif getattr(param, "is_flag", False):
        is_valid, expected = isinstance(value, bool), "true or false"
    elif isinstance(param.type, click.IntRange):
        is_valid, expected = type(value) is int, "a whole number"
    elif isinstance(param.type, click.FloatRange):
        is_valid, expected = type(value) in (int, float), "a number (YAML reads 1e-4 as a word: write 1.0e-4)"
    else:
        is_valid, expected = isinstance(value, str), "a text"
    if not is_valid:
        raise DgemmaError(f"{path} sets {param.name} to {value!r}; it should be {expected}.")
    return value


@click.command("tune")
@click.argument("data")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False), is_eager=True, expose_value=False, callback=read_config,
    metavar="FILE.yaml", help="Read options from a file with lines such as rank: 16. The command line has priority.",
)  # fmt: skip
@model_options
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default="adapter", show_default=True,
    help="Folder to create, with the adapter, the run's state, log.csv and curves.png.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the run that was saved in --output, with its options.")
@click.option(
    "--kind",
    type=click.Choice(["lora", "dora", "full"]),
    default="lora",
    show_default=True,
    help="Train an adapter, or all weights.",
)
@click.option(
    "--targets", type=click.Choice(TARGETS), multiple=True, default=("attention", "mlp"), show_default=True,
    help="Modules to adapt; repeatable. The router is frozen unless it is named.",
)  # fmt: skip
@number_option("--layers", 1, "Train only the last N layers.", "all")
@number_option("--rank", 1, "Rank of the adapter.", "16")
@number_option("--alpha", 0.0, "The adapter's output is multiplied by alpha / rank.", "32")
@number_option("--dropout", 0.0, "Dropout probability of the adapter's input.", "0")
@click.option("--variant", type=click.Choice(VARIANTS), default="google", show_default=True, help="Training objective.")
@number_option("--encoder-weight", 0.0, "Weight of the encoder's next-token loss.", "1")
@number_option("--self-conditioning", 0.0, "Share of samples that are conditioned on a first pass.", "0.5")
@number_option("--noise-min", 0.0, "Lowest noise level; 0.2 skips nearly clean canvases.", "the variant's")
@number_option("--fill", 0, "Token id that pads the canvas after an answer.", "what the checkpoint generates there")
@number_option("--steps", 1, "Number of weight updates; a resumed run keeps its number.", "1000")
@number_option("--batch-size", 1, "Samples in a batch.", "4")
@number_option("--accumulate", 1, "Batches for each weight update.", "1")
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True,
    help="Muon learns more from the same samples, at learning rates several times higher.",
)  # fmt: skip
@number_option(
    "--learning-rate", 0.0, "Peak learning rate, after a linear warm-up and before a cosine decay.", "0.00015"
)
@number_option("--final", 0.0, "Final learning rate as a share of the peak.", "0.1")
@number_option("--warmup", 0, "Number of warm-up steps.", "a twentieth of the steps")
@number_option("--weight-decay", 0.0, "Weight decay, multiplied by the learning rate.", "0.0001")
@number_option("--clip", 0.0, "Maximum gradient norm; 0 disables clipping.", "1")
@click.option(
    "--recompute/--keep",
    default=True,
    show_default=True,
    help="Recompute activations in the backward pass to save memory, or keep them.",
)
@click.option(
    "--turns",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Answers of a chat to train on.",
)
@number_option("--max-length", 1, "Maximum tokens of a sample.", "the context")
@click.option("--skip-long", is_flag=True, help="Skip longer samples instead of refusing them.")
@number_option("--save-every", 1, "Steps between saves.", "100")
@number_option("--validate-every", 0, "Steps between validations on valid.jsonl; 0 disables them.", "100")
@number_option("--validate", 1, "Maximum samples for a validation.", "64")
@number_option("--generate", 0, "Answers generated for a validation.", "8")
@number_option("--seed", 0, "Seed of initial weights, noise and sample order.", "0")
def tune(data: str, model: ModelChoice, resume: bool, **options: Any) -> None:
    """Fine-tune with LoRA, DoRA, or all weights.

    DATA is a folder with train.jsonl and, for validation, valid.jsonl; one .jsonl file; or the id of a data set on
    the Hub. Each line is an object with messages (and tools, thinking), with prompt and completion, or with text. The
    objective is block diffusion: random tokens replace tokens of a canvas, and the model learns to restore them.
    Ctrl-C saves and stops; --resume continues with exactly the same results. Under mlx.launch every process takes its
    share of each batch.

    \b
    mlx-dgemma tune data --model FOLDER --output adapter
    mlx-dgemma tune data --model FOLDER --output adapter --resume
    mlx-dgemma generate --model FOLDER --adapter adapter "..."
    """
    if model.compute_dtype is not None:
        raise click.UsageError(
            "--compute-dtype is for answers, and gradients need the model's own dtype; leave it out."
        )
    if model.kv_bits is not None:
        raise click.UsageError("--kv-bits is for answers, and training does not quantize the prefix; leave it out.")
    with first_rank_speaks(watched()) as terminal:
        _tune(data, model, resume, options, terminal)


def _tune(data: str, model: ModelChoice, resume: bool, options: dict[str, Any], terminal: Terminal) -> None:
    from ...checkpoint.together import open_together
    from ...distributed.agreement import together
    from ...distributed.group import init
    from ...tune.config import RunConfig, TrainerConfig
    from ...tune.run import check_before, check_trainable, tune
    from ...tune.trainer import saved_options

    group = init()
    if resume:
        source = click.get_current_context().get_parameter_source
        earlier = saved_options(options["output"], group)
        options |= {n: value for n, value in earlier.items() if source(n) in (None, ParameterSource.DEFAULT)}
    chosen = {name: value for name, value in options.items() if value is not None}
    method = TrainerConfig(**{one.name: chosen[one.name] for one in fields(TrainerConfig) if one.name in chosen})
    plan = RunConfig(data, **{one.name: chosen[one.name] for one in fields(RunConfig) if one.name in chosen})
    check_before(plan, resume, group)
    if group.size > 1:  # a rank without the checkpoint gets rank 0's
        model = replace(model, name=str(open_together(model.name, group).path))

    def load() -> Engine:
        opened = model.open(terminal)
        check_trainable(opened.settings, method, plan.fill)
        return model.load(terminal, opened, whole=True)

    engine = together(group, load)
    with warnings.catch_warnings(record=True) as caught, stop_on_interrupt(terminal) as interrupts:
        warnings.simplefilter("always", UserWarning)
        terminal.draw([], f"reading {data}")
        last = None
        try:
            for last in tune(
                engine, method, plan, resume, lambda: bool(interrupts), terminal.warn, model.ignore_memory, group
            ):
                for warning in caught:
                    terminal.warn(f"Warning: {warning.message}")
                caught.clear()
                _print_progress(last, terminal)
        finally:
            terminal.erase()
    if last is None:
        terminal.warn(f"{plan.output} is done already: {count(method.steps, 'step')}.")
        return
    where = plan.output / "model" if method.kind == "full" else plan.output
    terminal.warn(
        f"{count(last.step, 'step')} in {last.seconds:.0f} s, peak {human(last.peak_bytes)}; saved in {where}."
    )
    if last.step < last.steps:
        terminal.warn(f"Stopped before step {last.steps}; --resume goes on.")
        click.get_current_context().exit(130)


def _print_progress(progress: Progress, terminal: Terminal) -> None:
    """Draw a progress bar on a terminal. Print a line for each validation and, without a terminal, every tenth step."""
    metrics = progress.metrics
    line = f"step {progress.step} of {progress.steps}, loss {metrics.total:.4f} (canvas {metrics.parts['canvas']:.4f})"
    if progress.valid_loss is not None:
        line += f", validation {progress.valid_loss:.4f}"
        if progress.valid_right is not None:
            line += f", {100 * progress.valid_right:.0f} % of the answers right"
    left = progress.seconds / progress.step * (progress.steps - progress.step)
    line += f", {progress.seconds / progress.step:.2f} s a step, {left / 60:.0f} min left"
    done = int(20 * progress.step / progress.steps)
    if progress.valid_loss is not None or (not terminal.hints and progress.step % 10 == 0):
        terminal.warn(line)
        if progress.sample:
            terminal.warn("  answered: {!r:.80}, expected: {!r:.80}".format(*progress.sample))
    terminal.draw([], f"[{'#' * done}{'.' * (20 - done)}] {line}")


@contextmanager
def first_rank_speaks(rank: Watched | None) -> Iterator[Terminal]:
    """The terminal, which is silent on all ranks but the first. That tells their errors, and they end with it."""
    if rank is None or rank.place.rank == 0:
        yield Terminal()
        return
    with rank.failing(), open(os.devnull, "w", encoding="utf-8") as nothing, suppress(click.exceptions.Exit):
        yield Terminal(nothing, nothing)
    rank.wait()


@contextmanager
def stop_on_interrupt(terminal: Terminal) -> Iterator[list[bool]]:
    """A list that the first Ctrl-C fills, so that the step can finish. The second Ctrl-C interrupts at once."""
    interrupts: list[bool] = []

    def on_interrupt(number: int, frame: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)
        terminal.warn("Stopping after this step, and saving; Ctrl-C again leaves at once.")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
