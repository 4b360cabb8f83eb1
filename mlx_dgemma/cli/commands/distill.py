"""`mlx-dgemma distill`: a thin layer over `distill()`. Heavy modules are imported when it runs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...errors import count
from ..common import ModelChoice, model_options, number_option
from ..terminal import Terminal
from .tune import OPTIMIZERS, TARGETS, stop_on_interrupt

if TYPE_CHECKING:
    from ...tune.quick.distill import Progress
    from ...tune.quick.held_back import Measured

TEACHERS = ("exact", "default", "causal")


@click.command("distill")
@click.argument("prompts")
@model_options
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default="adapter", show_default=True,
    help="Folder to create, with the adapter, the run's state, answers and states, log.csv, curves.png and the report.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue the run that was saved in --output, with its options.")
@click.option(
    "--teacher", type=click.Choice(TEACHERS), default="causal", show_default=True,
    help="How the answers to learn from are made: by diffusion, or token by token.",
)  # fmt: skip
@number_option("--best-of", 1, "Answers to each prompt, with a seed each.", "2")
@number_option("--agree", 1, "Equal answers that it takes for a prompt to be learned.", "2")
@number_option("--open-weight", 0.0, "Weight of sound answers to prompts whose answers differ; 0 keeps them.", "0.5")
@click.option("--by", metavar="FIELD", help="Record field that names a prompt's family.")
@number_option("--family-agreement", 0.0, "Share of a family that must agree for any of it to be learned.", "0.5")
@number_option("--rounds", 1, "Rounds, each on states that the model visits as far as it is trained.", "2")
@click.option("--reteach", is_flag=True, help="Answer anew in every round, instead of once by the frozen model.")
@number_option("--states", 1, "Denoising steps of a canvas whose states are learned from, counted from the first.", "6")
@number_option("--certainty", 0.0, "Weight of the entropy where the most probable token is right.", "0.25")
@number_option("--divergence", 0.0, "Weight of the divergence from the frozen model.", "1")
@number_option("--clean", 0.0, "Share of samples that keep the model as it is on nearly clean canvases.", "0.25")
@number_option("--held-back", 0, "Prompts that are not trained on, for the report.", "64")
@number_option("--max-tokens", 1, "Maximum length of an answer.")
@number_option("--answer-batch", 1, "Prompts answered together.", "16")
@number_option("--steps", 1, "Number of weight updates in all rounds; a resumed run keeps its number.", "800")
@number_option("--batch-size", 1, "Samples in a batch.", "16")
@number_option("--accumulate", 1, "Batches for each weight update.", "4")
@click.option(
    "--targets", type=click.Choice(TARGETS), multiple=True, default=("attention", "mlp"), show_default=True,
    help="Modules to adapt; repeatable. The router is frozen unless it is named.",
)  # fmt: skip
@number_option("--layers", 1, "Train only the last N layers.", "all")
@number_option("--rank", 1, "Rank of the adapter.", "64")
@number_option("--alpha", 0.0, "The adapter's output is multiplied by alpha / rank.", "64")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True, help="As for tune.")
@number_option(
    "--learning-rate", 0.0, "Peak learning rate, after a linear warm-up and before a cosine decay.", "0.0005"
)
@number_option("--final", 0.0, "Final learning rate as a share of the peak.", "0.1")
@number_option("--warmup", 0, "Number of warm-up steps.", "a twentieth of the steps")
@click.option(
    "--recompute/--keep", default=True, show_default=True,
    help="Recompute activations in the backward pass to save memory, or keep them.",
)  # fmt: skip
@number_option("--save-every", 1, "Steps between saves.", "100")
@number_option("--seed", 0, "Seed of answers, initial weights, noise and sample order.", "0")
def distill(prompts: str, model: ModelChoice, resume: bool, **options: Any) -> None:
    """Train an adapter that makes the model say early what it says late.

    PROMPTS is a file with one prompt a line, or .jsonl with prompt or messages (and tools, thinking) in every line; it
    needs no answers. The model answers each prompt several times. Where its answers agree, a LoRA learns to give them
    from the states that the sampler visits in its first steps. Where they differ, sound ones are learned as the sampler
    comes to them. Everywhere else the model is held to what it says already. Only denoising changes: prompts are
    encoded, and text comes token by token, as without the adapter. Ctrl-C saves and stops; --resume continues with
    exactly the same results.

    \b
    mlx-dgemma distill prompts.txt --model FOLDER --output quick
    mlx-dgemma generate --model FOLDER --adapter quick "..."
    """
    terminal = Terminal()
    if model.kv_bits is not None:
        raise click.UsageError("--kv-bits is for answers, and training does not quantize the prefix; leave it out.")
    from ...tune.quick.config import METHOD, DistillConfig
    from ...tune.quick.distill import distill
    from ...tune.quick.prompts import read_prompts
    from ...tune.run import check_trainable
    from ...tune.trainer import saved_options

    if resume:
        source = click.get_current_context().get_parameter_source
        earlier = saved_options(options["output"])
        options |= {n: value for n, value in earlier.items() if source(n) in (None, ParameterSource.DEFAULT)}
    chosen = {name: value for name, value in options.items() if value is not None}
    method = replace(METHOD, **{one.name: chosen[one.name] for one in fields(METHOD) if one.name in chosen})
    plan = DistillConfig(prompts, **{one.name: chosen[one.name] for one in fields(DistillConfig) if one.name in chosen})
    opened = model.open(terminal)
    check_trainable(opened.settings, method, None)
    read_prompts(opened, plan.prompts, plan.by)  # before the weights are read
    engine = model.load(terminal, opened)
    last, trained, told = None, 0, set[tuple[str, int, int]]()
    with stop_on_interrupt(terminal) as interrupts:
        terminal.draw([], f"reading {prompts}")
        try:
            for last in distill(
                engine, method, plan, resume, lambda: bool(interrupts), terminal.warn, model.ignore_memory
            ):
                _print_progress(last, terminal, told)
                trained = last.done if last.stage == "training" else trained
        finally:
            terminal.erase()
    if last is None:
        terminal.warn(f"{plan.output} is done already: {count(method.steps, 'step')}.")
    elif interrupts:
        terminal.warn(f"Stopped while {last.stage}, before the end; --resume goes on.")
        click.get_current_context().exit(130)
    else:
        terminal.warn(f"{count(trained, 'step')}; saved in {plan.output}.")
        _print_report(plan.output, terminal)


def _print_progress(progress: Progress, terminal: Terminal, told: set[tuple[str, int, int]]) -> None:
    """Draw a progress bar on a terminal. Print each round's result and, without a terminal, every tenth of a stage."""
    share = progress.done / progress.of
    line = f"{progress.stage}, round {progress.round}: {progress.done} of {progress.of}"
    if progress.metrics:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in progress.metrics.parts.items())
        line = f"step {progress.done} of {progress.of}, round {progress.round}, loss {progress.metrics.total:.4f} "
        line += f"({parts})"
    if progress.measured:
        line = f"round {progress.round}: {_measured(progress.measured)}"
    elif progress.done:
        line += f", {progress.seconds / progress.done * (progress.of - progress.done) / 60:.1f} min left of this stage"
    tenth = progress.stage, progress.round, 10 * progress.done // progress.of
    if progress.measured or (not terminal.hints and tenth not in told):
        terminal.warn(line)
    told.add(tenth)
    terminal.draw([], f"[{'#' * int(20 * share)}{'.' * (20 - int(20 * share))}] {line}")


def _measured(one: Measured) -> str:
    return (
        f"{one.steps:.2f} steps and {one.positions:.0f} positions an answer, "
        f"{100 * one.agreement:.1f} % of {one.of} as expected"
    )


def _print_report(output: Path, terminal: Terminal) -> None:
    """The held-back prompts before and after, from the report."""
    import json

    from ...tune.quick.distill import REPORT
    from ...tune.quick.held_back import Measured

    report = json.loads((output / REPORT).read_text("utf-8"))
    for name, one in report.items():
        if one:
            terminal.warn(f"{name:7}{_measured(Measured(**one))}")
