"""`mlx-dgemma evaluate`: a thin layer over `evaluate()`. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import count
from ...tune.data import SPLITS, find, read
from ..calls.texts import decode_argument
from ..common import ModelChoice, adapter_option, explicit_options, model_options, number_option, sampler_options
from ..output import created
from ..terminal import Terminal
from .compare import compare, opened_for

if TYPE_CHECKING:
    from ...engine import Engine
    from ...tune.data import Example
    from ...tune.evaluate import Evaluation, ScoredAnswer, ScoreSummary
    from ...tune.likelihood import Bound


@click.command("evaluate", epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("data")
@click.option("--split", type=click.Choice(SPLITS), show_default="test, else valid", help="File of the folder to use.")
@click.option(
    "--metric",
    default="exact",
    show_default=True,
    metavar="NAME",
    help="exact, contains, regex, or your own FILE.py:FUNCTION.",
)
@click.option("--by", metavar="FIELD", show_default="task", help="Record field to group scores by.")
@number_option("--batch-size", 1, "Answers generated together.", "8")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Write each answer to this file, one a line.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@number_option("--bound", 1, "Also bound the expected answers' likelihood, with N noise draws for each canvas.", "off")
@click.option("--against", metavar="PATH_OR_ID", help="Compare modes with this autoregressive model.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="With --against: write the comparison and all answers as a page.",
)
@model_options
@adapter_option
@number_option("--seed", 0, "Seed of the first answer; the others take the following seeds.", "0")
@number_option("--max-tokens", 1, "Maximum length of an answer.")
@number_option("--image-tokens", 1, "Maximum tokens of a picture: 70, 140, 280, 560 or 1120.")
@click.option("--exact", is_flag=True, default=None, help="Use the stopping rule of Transformers: slower, more memory.")
@sampler_options
def evaluate(
    data: str,
    split: str | None,
    metric: str,
    by: str | None,
    output: Path | None,
    as_json: bool,
    bound: int | None,
    against: str | None,
    html: Path | None,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Score the model's answers against the expected answers of a data set.

    DATA is a folder with test.jsonl or valid.jsonl, one .jsonl file, or the id of a data set on the Hub. Each line is
    an object with messages (and tools, thinking), or with prompt and completion; its last answer is the expected one.
    The metric exact requires the same text, contains the expected text within the answer, and regex an answer that
    matches the expected text as a whole. Tool calls must have the same names and arguments. A function gets the
    record and the answer's text, and returns a boolean or a number from 0 to 1. The accuracy has a 95 % Wilson
    interval. --bound prints an upper bound of the negative log-likelihood of the expected answers, in nats per token.
    --against answers each question alone, in every mode or that of --mode, and by an autoregressive model of mlx-lm or
    mlx-vlm. It prints right answers, times and memory. Token by token the temperature is 0 unless it is given.

    \b
    mlx-dgemma evaluate data --model FOLDER
    mlx-dgemma evaluate data/valid.jsonl --metric contains --output answers.jsonl
    mlx-dgemma evaluate questions.jsonl --metric marks.py:close --by topic --json
    mlx-dgemma evaluate data --model FOLDER --against mlx-community/gemma-4-26b-a4b-it-4bit --html compared.html
    """
    path, terminal, metric = _file(data, split), Terminal(), decode_argument(metric, "--metric") or ""
    given = explicit_options(options)
    if against or html:
        compare(path, against, html, output, as_json, bool(bound or by), metric, model, terminal, given)
        return
    with warnings.catch_warnings(record=True) as caught, created(output) as file:
        warnings.simplefilter("always", UserWarning)
        engine = model.load(terminal, opened_for(given, metric, model, terminal))
        terminal.draw([], f"reading {path.name}")
        try:
            examples = read(engine, path)
            from ...tune.evaluate import evaluate as evaluate_

            right = done = 0.0

            def watch(one: ScoredAnswer) -> None:
                nonlocal right, done
                right, done = right + one.score, done + 1
                terminal.draw([], f"answer {done:.0f} of {len(examples)}, {right:g} right")
                if file:
                    file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
                    file.flush()

            terminal.draw([], f"answering {count(len(examples), 'question')}")
            outcome = evaluate_(
                engine,
                examples,
                metric,
                by=by,
                watch=watch,
                **given,
            )
            likelihood = _bound(engine, examples, bound, options["seed"] or 0, terminal) if bound else None
        finally:
            terminal.erase()
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        terminal.warn(f"Warning: {message}")
    if outcome.cut:
        terminal.warn(f"Warning: {count(outcome.cut, 'answer')} reached the limit; --max-tokens N makes room for more.")
    terminal.say(_as_json(outcome, likelihood) if as_json else _table(outcome, likelihood))


def _file(data: str, split: str | None) -> Path:
    """The file of a data set that is used."""
    if split and Path(data).is_file():
        raise click.UsageError(f"--split {split} names a file of a folder, but {data} is a file; leave it out.")
    splits = (split,) if split else ("test", "valid")
    files = find(data, splits)
    return next(files[one] for one in splits if one in files)


def _bound(engine: Engine, examples: list[Example], draws: int, seed: int, terminal: Terminal) -> Bound:
    terminal.draw([], f"bounding the likelihood of {count(len(examples), 'answer')}")
    return engine.call(_compute_bound, engine, examples, draws, seed)


def _compute_bound(engine: Engine, examples: list[Example], draws: int, seed: int) -> Bound:
    from ...tune.likelihood import bound
    from ...tune.objective import VARIANTS
    from ...tune.run import infer_fill_token

    return bound(engine, examples, infer_fill_token(engine, examples, VARIANTS["google"], seed), draws, seed)


def _as_json(outcome: Evaluation, likelihood: Bound | None) -> str:
    values = {name: value for name, value in vars(outcome).items() if name not in ("answers", "groups")}
    values["groups"] = {name: asdict(score) for name, score in outcome.groups.items()}
    values["bound"] = asdict(likelihood) if likelihood else None
    return json.dumps(values, ensure_ascii=False) + "\n"


def _table(outcome: Evaluation, likelihood: Bound | None) -> str:
    """A table with a row for each group and one for all, then the time and the bound."""
    head = ["", "right", "of", "share", "95 %", "positions", "steps"]
    rows = [head, *([name, *_cells(score)] for name, score in outcome.groups.items()), ["all", *_cells(outcome)]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    lines.append(f"{count(outcome.of, 'answer')} in {outcome.seconds:.1f} s")
    if likelihood:
        error = "" if likelihood.error is None else f" (standard error {likelihood.error:.3f})"
        lines.append(f"at most {likelihood.nats:.3f} nats a token{error}")
    return "\n".join(lines) + "\n"


def _cells(score: ScoreSummary) -> list[str]:
    return [
        f"{score.right:g}",
        str(score.of),
        f"{100 * score.share:.1f} %",
        f"{100 * score.low:.1f} to {100 * score.high:.1f} %",
        f"{score.positions:.0f}",
        f"{score.steps:.1f}",
    ]
