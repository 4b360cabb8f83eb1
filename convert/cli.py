"""The command `convert`: a thin layer over `convert()`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mlx_dgemma.errors import DgemmaError, human

from . import recipes

if TYPE_CHECKING:
    from .conversion import Report

EPILOG = f"""Recipes: {", ".join(recipes.RECIPES)}. The number is the bits of the experts, which hold nine tenths
of the weights; the rest of the text stack is stored at 8 bit, and the vision tower keeps its floats."""


@click.command("convert", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", required=False)
@click.option("--hf-path", help="Checkpoint to convert: a folder or a Hub id (the argument SOURCE says the same).")
@click.option("--mlx-path", default="mlx_model", show_default=True, help="Folder to make; it must not exist.")
@click.option("-q", "--quantize", is_flag=True, help=f"Quantize by the default recipe, {recipes.DEFAULT}.")
@click.option("--recipe", metavar="NAME", help="Quantize by a named recipe (see below).")
@click.option("--q-bits", type=int, help="With -q: bits of the experts; the rest stays at 8 bit.")
@click.option("--q-group-size", type=int, help="With -q: group size of the experts.")
@click.option("--q-mode", type=click.Choice(list(recipes.MODES)), help="With -q: quantization mode of the experts.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Cast the floats; default: keep them."
)
@click.option("--verify", is_flag=True, help="Compare the logits of source and result, and look for NaN weights.")
@click.option("--upload-repo", metavar="ID", help="Upload the result to this Hub id.")
def command(source: str | None, hf_path: str | None, mlx_path: str, quantize: bool, recipe: str | None, **options: Any):
    """Convert a DiffusionGemma checkpoint to MLX, quantized or not.

    Memory stays below 1 GB (--verify needs a few layers in float32), and a result appears only when it is whole.
    """
    if (source and hf_path) or not (origin := source or hf_path):
        raise click.UsageError("Give one checkpoint: --hf-path or the argument SOURCE.")
    experts = {key: options.pop(f"q_{key}") for key in ("bits", "group_size", "mode")}
    given = [f"--q-{key.replace('_', '-')}" for key, value in experts.items() if value is not None]
    if given and recipe:
        raise click.UsageError(f"--recipe and {given[0]} exclude each other.")
    if given and not quantize:
        raise click.UsageError(f"{given[0]} needs -q.")
    try:
        chosen: Any = recipe or (recipes.DEFAULT if quantize else None)
        chosen = recipes.custom(**experts) if given else chosen and recipes.named(chosen)
        from .conversion import convert

        with stoppable(), bar("Converting") as progress:
            report = convert(origin, mlx_path, chosen, progress=progress, **options)
    except DgemmaError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("Interrupted; nothing was left behind.", err=True)
        raise click.exceptions.Exit(130) from None
    _tell(report)


@contextmanager
def stoppable():
    """A polite kill unwinds like an error, so that the half-made folder goes."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def bar(label: str):
    """A progress callback that draws a bar on a terminal, and None in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    shown: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if shown is None:
            shown = click.progressbar(length=total, label=label, file=sys.stderr, update_min_steps=total // 500)
            shown.__enter__()
        shown.update(done - shown.pos)

    try:
        yield progress
    finally:
        if shown is not None:
            shown.__exit__(None, None, None)


def _tell(report: Report) -> None:
    """Print what was done."""
    click.echo(f"{report.source} -> {report.target}")
    if report.unchanged:
        click.echo(
            f"{report.source} is already an MLX checkpoint at {report.bits_per_weight:.2f} bits per weight: "
            "weights are copied unchanged."
        )
    for part, how in report.quantized.items():
        click.echo(f"  {part.replace('_', '-'):18} {how}")
    rest = "the rest" if report.quantized else "all weights"
    click.echo(f"  {rest:18} {report.dtype}")
    for path, how in _by_kind(report.regrouped).items():
        click.echo(f"  {path}: {how}, as the recipe's groups do not divide its input")
    for path in _by_kind(dict.fromkeys(report.unquantized, "")):
        click.echo(f"  {path}: left in {report.dtype}, as no group size divides its input")
    size = human(report.nbytes)
    click.echo(f"{report.bits_per_weight:.2f} bits per weight, {size}, {report.seconds:.1f} s.")
    if not report.quantized:
        click.echo("Nothing is quantized; -q quantizes.")
    for name in report.nonfinite:
        click.echo(f"Warning: {name} holds NaN or infinity.", err=True)
    if found := report.verification:
        click.echo(
            f"Logits against the source's, over {found.positions} positions: "
            + (
                "equal bit for bit."
                if found.equal
                else f"largest difference {found.max_difference:.3g}, "
                f"mean KL {found.mean_kl:.3g} nats, same best token at {found.argmax_agreement:.1%}."
            )
        )
    if report.url:
        click.echo(f"Uploaded to {report.url}.")


def _by_kind(paths: dict[str, str]) -> dict[str, str]:
    """The paths of all layers as one."""
    return {re.sub(r"\.\d+\.", ".*.", path): how for path, how in paths.items()}
