"""The command `convert`, a thin layer over `convert()`. MLX is only imported when it runs."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dgemma.errors import DgemmaError, count, human

from . import recipes
from .rounding.methods import METHODS, NEAREST

if TYPE_CHECKING:
    from .report import Report
    from .rounding.run import Rounding

EPILOG = f"""Recipes: {", ".join(recipes.RECIPES)}. The number is the bits per weight of the experts, which hold nine
tenths of the weights. The rest of the text model is stored at 8 bits, and the vision tower stays in floats."""


@click.command("convert", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", required=False)
@click.option(
    "--hf-path",
    help="What to convert: a folder, a Hub id, a GGUF file, or one on the Hub such as owner/name:Q4_K_M (same as the "
    "argument SOURCE).",
)
@click.option("--mlx-path", default="mlx_model", show_default=True, help="Folder to make; it must not exist yet.")
@click.option("-q", "--quantize", is_flag=True, help=f"Quantize with the default recipe, {recipes.DEFAULT}.")
@click.option("--recipe", metavar="NAME", help="Quantize with this recipe (see below), or with a plan's file.")
@click.option("--target-size", metavar="SIZE", help="Search the widths of all modules for this size, such as 11.5GB.")
@click.option("--target-bits", type=float, metavar="BITS", help="The same in bits a weight, everything counted.")
@click.option(
    "--prompts", metavar="FILE", help="With a target or a rounding: prompts of your own, one a line, or .jsonl."
)
@click.option(
    "--search-path",
    metavar="FOLDER",
    help="With a target: where the search keeps its files and its report; default: beside the result, with .search.",
)
@click.option("--q-bits", type=int, help="With -q: bits per weight of the experts; the rest stays at 8 bits.")
@click.option("--q-group-size", type=int, help="With -q: group size of the experts.")
@click.option("--q-mode", type=click.Choice(list(recipes.MODES)), help="With -q: quantization mode of the experts.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of float weights; default: unchanged.",
)
@click.option(
    "--verify", is_flag=True, help="Compare the logits of source and result; look for NaN or infinite weights."
)
@click.option(
    "--rounding",
    type=click.Choice(list(METHODS)),
    default=NEAREST,
    show_default=True,
    help=f"How codes and scales are chosen: {'; '.join(': '.join(one) for one in METHODS.items())}.",
)
@click.option("--upload-repo", metavar="ID", help="Upload the result to this Hub repository.")
def convert(source: str | None, hf_path: str | None, mlx_path: str, quantize: bool, recipe: str | None, **options: Any):
    """Convert a DiffusionGemma checkpoint to MLX, quantized or not.

    Memory use stays below 1 GB (--verify needs a few layers in float32, --rounding tells what it needs). The folder
    only appears when it is complete.

    \b
    mlx-dgemma convert -q google/diffusiongemma-26B-A4B-it --mlx-path FOLDER
    mlx-dgemma convert --recipe 6bit FOLDER --mlx-path ANOTHER --verify
    mlx-dgemma convert --recipe 3bit --rounding gptq FOLDER --mlx-path BETTER
    mlx-dgemma convert --target-size 11.5GB FOLDER --mlx-path SMALL
    """
    if (source and hf_path) or not (origin := source or hf_path):
        raise click.UsageError("Give one checkpoint: --hf-path or the argument SOURCE.")
    target = {key: options.pop(key) for key in ("target_size", "target_bits", "prompts", "search_path")}
    searched = _checked_target(target, quantize, recipe, options["rounding"])
    experts = {key: options.pop(f"q_{key}") for key in ("bits", "group_size", "mode")}
    given = [f"--q-{key.replace('_', '-')}" for key, value in experts.items() if value is not None]
    if given and searched:
        raise click.UsageError(f"{given[0]} and a target cannot be combined.")
    if given and recipe:
        raise click.UsageError(f"--recipe and {given[0]} cannot be combined.")
    if given and not quantize:
        raise click.UsageError(f"{given[0]} needs -q.")
    try:
        chosen = _searched(origin, mlx_path, target) if searched else _chosen(recipe, quantize, given, experts)
        from .conversion import convert as convert_

        of_rounding = None if options["rounding"] == NEAREST else target["prompts"]
        with sigterm_exits(), progress_bar("Converting") as progress:
            report = convert_(
                origin, mlx_path, chosen, progress=progress, stage=_say_progress, prompts=of_rounding, **options
            )
    except DgemmaError as error:
        if error.exit_code == 2:
            raise click.UsageError(
                re.sub(r"^(recipe|rounding|target-size|q-[a-z-]+)(?= is )", r"--\1", str(error))
            ) from None
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo(
            "Interrupted; no files were left behind" + (", but the search's own." if searched else "."), err=True
        )
        raise click.exceptions.Exit(130) from None
    _print_report(report)


def _checked_target(target: dict[str, Any], quantize: bool, recipe: str | None, rounding: str) -> bool:
    """Whether widths are to be searched; options that contradict each other are refused."""
    given = [f"--{key.replace('_', '-')}" for key in target if target[key] is not None]
    both = target["target_size"] is not None, target["target_bits"] is not None
    if all(both):
        raise click.UsageError("--target-size and --target-bits cannot be combined.")
    if given and not any(both) and (given != ["--prompts"] or rounding == NEAREST):
        needed = (
            "--target-size, --target-bits or --rounding" if given == ["--prompts"] else "--target-size or --target-bits"
        )
        raise click.UsageError(f"{given[0]} needs {needed}.")
    if any(both) and (quantize or recipe):
        raise click.UsageError(f"{given[0]} and {'--recipe' if recipe else '-q'} cannot be combined.")
    if both[1] and not target["target_bits"] > 0:
        raise click.UsageError(f"--target-bits is {target['target_bits']}; it should be above 0, such as 3.6.")
    return any(both)


def _chosen(recipe: str | None, quantize: bool, given: list[str], experts: dict[str, Any]) -> Any:
    """The recipe that the options name, or None."""
    if given:
        return recipes.custom_recipe(**experts)
    if recipe and recipe.endswith(".json"):
        from .search import plan

        return plan.load(Path(recipe))
    name = recipe or (recipes.DEFAULT if quantize else None)
    return name and recipes.recipe_named(name)


def _searched(origin: str, mlx_path: str, target: dict[str, Any]) -> Any:
    """Search a plan, and say what was found and where its report lies."""
    from mlx_dgemma.files import require_absent

    from .search.search import search, size_of
    from .sources.opened import find_source, open_source

    size = None if target["target_size"] is None else size_of(target["target_size"])
    result = require_absent(mlx_path, "--mlx-path")
    folder = Path(target["search_path"] or f"{result}.search").expanduser()
    with open_source(find_source(origin)) as source, sigterm_exits():
        found = search(source, folder, size, target["target_bits"], target["prompts"], progress=_say_progress)
    click.echo(
        f"Plan of {human(found.nbytes)}, {found.bits_per_weight:.2f} bits per weight: KL {found.divergence:.3g} nats a "
        f"position, same top token at {found.agreement:.1%}; at most {human(found.peak)} of arrays, "
        f"{found.seconds:.0f} s. Its report is {folder / 'report.md'}."
    )
    if found.doubt:
        click.echo(found.doubt, err=True)
    return found.plan


def _say_progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{what}: {done} of {total}", err=True, nl=done == total)


@contextmanager
def sigterm_exits():
    """Turn SIGTERM into SystemExit, so that clean-up code removes the unfinished folder."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def progress_bar(label: str):
    """Yield a progress callback that draws a bar on stderr; None if stderr is not a terminal."""
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


def _print_rounding(rounding: Rounding) -> None:
    """What was done for better rounding: by kind of module, the mean over layers."""
    click.echo(
        f"Rounded by {rounding.method}, on {count(rounding.positions, 'position')} of "
        f"{count(rounding.prompts, 'prompt')}; about {human(rounding.memory)} of memory."
    )
    for path, near, error, few in rounding.by_kind():
        rest = f", {count(few, 'expert')} with few positions of their own" if few else ""
        click.echo(f"  {path}: error of the outputs {error:.2g}, with the nearest codes {near:.2g}{rest}")
    if rounding.others:
        click.echo(f"  nearest codes: {', '.join(_merge_layers(dict.fromkeys(rounding.others, '')))}")


def _print_report(report: Report) -> None:
    """Print what was converted, and how."""
    click.echo(f"{report.source} -> {report.target}")
    if report.unchanged:
        click.echo(
            f"{report.source} is already an MLX checkpoint with {report.bits_per_weight:.2f} bits per weight: "
            "the weights are copied unchanged."
        )
    for part, how in report.quantized.items():
        click.echo(f"  {part.replace('_', '-'):18} {how}")
    rest = "the rest" if report.quantized else "all weights"
    click.echo(f"  {rest:18} {report.dtype}")
    for path, how in _merge_layers(report.regrouped).items():
        click.echo(f"  {path}: {how}, because the recipe's group size does not divide its input size")
    for path in _merge_layers(dict.fromkeys(report.unquantized, "")):
        click.echo(f"  {path}: kept in {report.dtype}, because no group size divides its input size")
    size = human(report.nbytes)
    click.echo(f"{report.bits_per_weight:.2f} bits per weight, {size}, {report.seconds:.1f} s.")
    if not report.quantized:
        click.echo("Nothing was quantized; use -q to quantize.")
    if report.rounding:
        _print_rounding(report.rounding)
    for note in report.notes:
        click.echo(note)
    for name in report.nonfinite:
        click.echo(f"Warning: {name} contains NaN or infinity.", err=True)
    if result := report.verification:
        difference = (
            f"largest difference {result.max_difference:.3g}, mean KL {result.mean_kl:.3g} nats, "
            f"same top token at {result.argmax_agreement:.1%}."
        )
        click.echo(
            f"Logits compared with the source's at {result.positions} positions: "
            + ("equal bit for bit." if result.equal else difference)
        )
    if report.url:
        click.echo(f"Uploaded to {report.url}.")


def _merge_layers(paths: dict[str, str]) -> dict[str, str]:
    """Merge the paths of all layers: `.0.` becomes `.*.`."""
    return {re.sub(r"\.\d+\.", ".*.", path): how for path, how in paths.items()}
