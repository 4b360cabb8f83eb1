"""`mlx-dgemma calibrate`: a thin layer over `calibrate()`. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ...errors import count
from ..common import ModelChoice, adapter_option, model_options, number_option
from ..terminal import Terminal

if TYPE_CHECKING:
    from ...tune.quick.calibrate import Fitted, Tried


@click.command("calibrate")
@click.argument("prompts")
@model_options
@adapter_option
@number_option("--agreement", 0.0, "Share of the answers that must stay as they are.", "0.98")
@number_option("--batch-size", 1, "Prompts answered together.", "8")
@number_option("--max-tokens", 1, "Maximum length of an answer.")
@number_option("--seed", 0, "Seed of the first answer; the others take the following seeds.", "0")
@click.option("--dry-run", is_flag=True, help="Print the table and save nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all settings that were tried.")
def calibrate(
    prompts: str,
    model: ModelChoice,
    agreement: float | None,
    batch_size: int | None,
    max_tokens: int | None,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fit the stop rules of the default mode on your own prompts.

    PROMPTS is a file with one prompt a line, or .jsonl with prompt or messages (and tools, thinking) in every line.
    Every prompt is answered by --exact, and by runs that go on as long as that does. The quickest setting that leaves
    the stated share of the answers as they are is saved as calibration.json beside the adapter, or else the checkpoint.
    Loading takes it from there; an option that is given has priority, and --exact and --fast stay as they are.

    \b
    mlx-dgemma calibrate prompts.txt --model FOLDER
    mlx-dgemma calibrate prompts.txt --model FOLDER --adapter quick --agreement 0.95
    """
    terminal = Terminal()
    from ...checkpoint.calibration import writable_folder, write_calibration
    from ...tune.quick.calibrate import calibrate as calibrate_
    from ...tune.quick.prompts import read_prompts

    opened = model.open(terminal)
    if not dry_run and model.adapter is None:
        writable_folder(opened.settings.path)  # before the weights are read
    questions = read_prompts(opened, prompts)
    engine = model.load(terminal, opened)
    folder = None if dry_run else writable_folder(engine.adapter or engine.checkpoint.path)
    chosen = {"agreement": agreement, "batch_size": batch_size, "max_tokens": max_tokens, "seed": seed}
    given = {name: value for name, value in chosen.items() if value is not None}

    def watch(done: int, of: int) -> None:
        terminal.draw([], f"answer {done} of {of}")

    try:
        fitted = calibrate_(engine, questions, watch=watch, **given)  # type: ignore[arg-type]
    finally:
        terminal.erase()
    terminal.say((json.dumps(asdict(fitted)) if as_json else _table(fitted)) + "\n")
    if folder:
        terminal.warn(f"Saved as {write_calibration(folder, fitted.calibration)}.")


def _table(fitted: Fitted) -> str:
    """The settings that no other one beats, exact mode, and the check of the chosen one."""
    rows = [["", "entropy-bound", "certainty-threshold", "patience", "agreement", "positions"]]
    rows += [_row("chosen" if one == fitted.chosen else "", one) for one in fitted.front]
    if fitted.chosen not in fitted.front:
        rows.append(_row("chosen", fitted.chosen))
    rows.append(["exact", "", "", "", "", f"{fitted.exact_positions:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    checked = fitted.checked
    lines.append(
        f"{count(fitted.prompts, 'prompt')}; with other seeds {100 * checked.agreement:.1f} % of the answers are those "
        f"of exact (of exact's own {100 * fitted.self_agreement:.1f} %), at {checked.positions:.0f} positions."
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, one: Tried) -> list[str]:
    rule = one.rule
    settings = [f"{one.entropy_bound:g}", f"{rule.certainty_threshold:g}", str(rule.patience)]
    return [name, *settings, f"{100 * one.agreement:.1f} %", f"{one.positions:.0f}"]
