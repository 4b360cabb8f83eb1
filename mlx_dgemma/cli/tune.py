"""`mlx-dgemma tune`: a thin layer over `tune()`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OptionError, count, human
from .common import load_engine, model_options, number
from .terminal import Terminal

if TYPE_CHECKING:
    from ..tune.run import Progress


VARIANTS = ("google", "nemo", "megatron", "megatron-reweighted", "megatron-loo", "megatron-reweighted-loo")
TARGETS = ("attention", "mlp", "experts", "router", "self-conditioning")
OPTIMIZERS = ("adamw", "muon")


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Take a YAML file's values as defaults of the other options.

    Raises:
        OptionError: no YAML, no mapping, or a name that no option has.
    """
    if path is None:
        return
    import yaml

    try:
        held = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no YAML ({' '.join(str(error).split())}); mend it.") from None
    if not isinstance(held, dict):
        raise OptionError(f"{path} holds no names with values; write lines such as rank: 16.")
    known = {one.name: one for one in ctx.command.params if one.name != "config"}
    values = {str(name).replace("-", "_"): value for name, value in held.items()}
    if "keep" in values:
        values["recompute"] = not values.pop("keep")
    for name, value in values.items():
        if name not in known:
            raise OptionError(f"{path} sets {name}, which is no option of tune; see mlx-dgemma tune --help.")
        values[name] = _checked(path, known[name], value)
    if "model" in values and os.environ.get("MLX_DGEMMA_MODEL"):
        raise OptionError(f"{path} sets model, and so does $MLX_DGEMMA_MODEL; unset one of them.")
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _checked(path: str, param: click.Parameter, value: Any) -> Any:
    """A value of a kind that the option takes; nothing is rounded or guessed.

    Raises:
        OptionError: it is of another kind.
    """
    if param.multiple:
        value = [value] if isinstance(value, str) else value
        fits, wanted = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of words"
    elif getattr(param, "is_flag", False):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(param.type, click.IntRange):
        fits, wanted = type(value) is int, "a whole number"
    elif isinstance(param.type, click.FloatRange):
        fits, wanted = type(value) in (int, float), "a number (YAML reads 1e-4 as a word: write 1.0e-4)"
    else:
        fits, wanted = isinstance(value, str), "a text"
    if not fits:
        raise OptionError(f"{path} sets {param.name} to {value!r}; it should be {wanted}.")
    return value


@click.command("tune")
@click.argument("data")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False), is_eager=True, expose_value=False, callback=read_config,
    metavar="FILE.yaml", help="Read options from there, as rank: 16; what is given here counts more.",
)  # fmt: skip
@model_options
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default="adapter", show_default=True,
    help="Folder to make: the adapter, the run's state, log.csv and curves.png.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on where the run in --output was saved.")
@click.option(
    "--kind",
    type=click.Choice(["lora", "dora", "full"]),
    default="lora",
    show_default=True,
    help="An adapter, or all weights.",
)
@click.option(
    "--targets", type=click.Choice(TARGETS), multiple=True, default=("attention", "mlp"), show_default=True,
    help="What is adapted; repeatable. The router is frozen unless it is named.",
)  # fmt: skip
@number("--layers", 1, "Layers that are trained, from the last one.", "all")
@number("--rank", 1, "Rank of the change: more can learn more.", "16")
@number("--alpha", 0.0, "The change is multiplied by alpha / rank.", "32")
@number("--dropout", 0.0, "Of the change's input.", "0")
@click.option("--variant", type=click.Choice(VARIANTS), default="google", show_default=True, help="The objective.")
@number("--encoder-weight", 0.0, "Of the encoder's next-token loss.", "1")
@number("--self-conditioning", 0.0, "How often a first pass conditions the canvas.", "0.5")
@number("--noise-min", 0.0, "Least probability of replacing a token; 0.2 skips nearly clean canvases.", "the variant's")
@number("--fill", 0, "Token that fills the canvas behind an answer.", "what the checkpoint puts there")
@number("--steps", 1, "Updates of the weights; a run that is resumed keeps its number.", "1000")
@number("--batch-size", 1, "Samples of a batch.", "4")
@number("--accumulate", 1, "Batches of a step.", "1")
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True,
    help="Muon learns more from as many samples; its rates are several times greater.",
)  # fmt: skip
@number("--learning-rate", 0.0, "Highest; it rises first, and falls along a cosine.", "0.00015")
@number("--final", 0.0, "Share of the learning rate that is left in the end.", "0.1")
@number("--warmup", 0, "Steps in which the learning rate rises.", "a twentieth of the steps")
@number("--weight-decay", 0.0, "Of the weights, times the learning rate.", "0.0001")
@number("--clip", 0.0, "Norm of the gradients at most; 0: any.", "1")
@click.option(
    "--recompute/--keep", default=True, show_default=True, help="Compute layers again for the gradient: less memory."
)
@click.option(
    "--turns",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Which answers of a chat are learnt.",
)
@number("--max-length", 1, "Tokens of a sample at most.", "the context")
@click.option("--skip-long", is_flag=True, help="Leave longer samples out instead of refusing them.")
@number("--save-every", 1, "Steps between saves.", "100")
@number("--validate-every", 0, "Steps between validations, where there is valid.jsonl; 0: never.", "100")
@number("--validate", 1, "Samples of a validation at most.", "64")
@number("--generate", 0, "Answers generated in a validation.", "8")
@number("--seed", 0, "Of weights, noise and order.", "0")
def tune(data: str, model: str | None, dtype: str | None, ignore_memory: bool, resume: bool, **options: Any) -> None:
    """Fine-tune on answers: LoRA, DoRA, or all weights.

    DATA is a folder with train.jsonl and, to validate, valid.jsonl; one .jsonl file; or the id of a data set on the
    Hub. Each line is an object with messages (and tools, thinking), with prompt and completion, or with text. The
    objective is block diffusion's own: tokens of a canvas are replaced by random ones and asked back. Ctrl-C saves
    and ends; --resume goes on, exactly.

    \b
    mlx-dgemma tune data --model mlx_model --output adapter
    mlx-dgemma tune data --config tune.yaml --resume
    mlx-dgemma generate --model mlx_model --adapter adapter "..."
    """
    terminal = Terminal()
    engine = load_engine(model, dtype, ignore_memory, terminal)
    from ..tune.config import RunConfig, TrainerConfig
    from ..tune.run import tune

    given = {name: value for name, value in options.items() if value is not None}
    method = TrainerConfig(**{one.name: given[one.name] for one in fields(TrainerConfig) if one.name in given})
    plan = RunConfig(data, **{one.name: given[one.name] for one in fields(RunConfig) if one.name in given})
    with warnings.catch_warnings(record=True) as caught, _asked_to_stop(terminal) as asked:
        warnings.simplefilter("always", UserWarning)
        terminal.draw([], f"reading {data}")
        last = None
        try:
            for last in tune(engine, method, plan, resume, lambda: bool(asked), terminal.warn, ignore_memory):
                for warning in caught:
                    terminal.warn(f"Warning: {warning.message}")
                caught.clear()
                _tell(last, terminal)
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


def _tell(at: Progress, terminal: Terminal) -> None:
    """A line for every validation, for every tenth step where nobody watches, and a bar where somebody does."""
    line = f"step {at.step} of {at.steps}, loss {at.metrics.total:.4f} (canvas {at.metrics.canvas:.4f})"
    if at.valid_loss is not None:
        line += f", validation {at.valid_loss:.4f}"
        if at.valid_right is not None:
            line += f", {100 * at.valid_right:.0f} % of the answers right"
    left = at.seconds / at.step * (at.steps - at.step)
    line += f", {at.seconds / at.step:.2f} s a step, {left / 60:.0f} min left"
    done = int(20 * at.step / at.steps)
    if at.valid_loss is not None or (not terminal.hints and at.step % 10 == 0):
        terminal.warn(line)
        if at.sample:
            terminal.warn("  answered: {!r:.80}, expected: {!r:.80}".format(*at.sample))
    terminal.draw([], f"[{'#' * done}{'.' * (20 - done)}] {line}")


@contextmanager
def _asked_to_stop(terminal: Terminal) -> Iterator[list[bool]]:
    """A list that Ctrl-C puts something into, so that a step is never cut; the second time it interrupts."""
    asked: list[bool] = []

    def hear(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        terminal.warn("Stopping after this step, and saving; Ctrl-C again leaves at once.")

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
