"""`mlx-dgemma evaluate --against`: modes beside an autoregressive model. Heavy modules are imported when it runs."""

from __future__ import annotations

import gc
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ...errors import CircumstanceError, count
from ...files import atomic_file
from ..common import ModelChoice
from ..output import created
from ..terminal import Terminal

if TYPE_CHECKING:
    from ...prompt.opened import Opened
    from ...tune.compare import Contestant, Reply


def compare(
    path: Path,
    against: str | None,
    html: Path | None,
    output: Path | None,
    as_json: bool,
    alone: bool,
    metric: str,
    model: ModelChoice,
    terminal: Terminal,
    options: dict[str, Any],
) -> None:
    """Answer the examples of a file by each and print what came of it.

    Args:
        path: of the data.
        against: folder or Hub id of the other model.
        html, output: where the page goes, and all answers, one example a line.
        as_json: print one JSON object instead of the table.
        alone: whether something was asked for that only an evaluation without another model knows.
        metric: as `evaluate` takes it.
        model, terminal: of this project; for output.
        options: that the user gave.

    Raises:
        click.UsageError: options that cannot be together.
        CircumstanceError: the page is there already.
    """
    against = _checked(against, html, alone)
    opened = opened_for(options, metric, model, terminal)
    options.pop("batch_size", None)  # times are of answers that are alone
    seed, chosen = options.pop("seed", 0), options.pop("mode", None)
    with warnings.catch_warnings(record=True) as caught, created(output) as file:
        warnings.simplefilter("always", UserWarning)
        engine = model.load(terminal, opened)
        try:
            from ...tune.compare import MODES, answer_by_peer, answer_in_modes, questions
            from ...tune.data import read

            examples = read(engine, path)
            modes = (chosen,) if chosen else MODES
            total, done = (len(modes) + 1) * len(examples), 0

            def watch(name: str, reply: Reply) -> None:
                nonlocal done
                done += 1
                terminal.draw([], f"answer {done} of {total}, {name}")

            found = answer_in_modes(engine, examples, metric, modes, seed, watch, **options)
            tokenizer, most = engine.tokenizer, options.get("max_tokens") or engine.options.max_tokens
            del engine  # memory has to hold one model, not two
            gc.collect()
            temperature = options.get("temperature") or 0.0
            found.append(answer_by_peer(against, examples, metric, tokenizer, most, temperature, seed, watch))
        finally:
            terminal.erase()
        asked = questions(examples)
        if file:
            _write_answers(file, found, asked)
    for message in dict.fromkeys(f"Warning: {warning.message}" for warning in caught):
        terminal.warn(message)
    if html is not None:
        title = f"{model.name or 'The demo'} and {against} on {path.name}, {count(len(asked), 'example')}"
        _write_page(html, title, found, asked)
    terminal.say(_as_json(found) if as_json else _table(found))


def opened_for(options: dict[str, Any], metric: str, model: ModelChoice, terminal: Terminal) -> Opened:
    """The checkpoint without its weights, once options and metric are known to be right.

    Raises:
        OptionError: an option is out of bounds, or there is no such metric.
    """
    from ...tune.evaluate import scorer_of

    scorer_of(metric, ())
    opened = model.open(terminal)
    opened.options.override(**{name: value for name, value in options.items() if name not in ("batch_size", "seed")})
    return opened


def _write_page(html: Path, title: str, found: list[Contestant], asked: list[tuple[str, str, str]]) -> None:
    from ...tune.page import page

    with atomic_file(html) as draft:
        draft.write_text(page(title, found, asked), encoding="utf-8")


def _checked(against: str | None, html: Path | None, alone: bool) -> str:
    """The other model's name, once it is known to be right, and that the options can be together."""
    if against is None:
        raise click.UsageError("--html is of a comparison; give --against, or leave it out.")
    if alone:
        raise click.UsageError("--bound and --by are not of a comparison; leave them out, or leave out --against.")
    if html is not None and html.exists():
        raise CircumstanceError(f"{html} exists already; give another name, or remove it.")
    from ...checkpoint.find import find

    find(against)
    return against


def _write_answers(file: TextIO, found: list[Contestant], asked: list[tuple[str, str, str]]) -> None:
    for i, (where, question, expected) in enumerate(asked):
        answers = {one.name: asdict(one.replies[i]) for one in found}
        line = {"where": where, "question": question, "expected": expected, "answers": answers}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _as_json(found: list[Contestant]) -> str:
    return json.dumps({one.name: one.figures() for one in found}, ensure_ascii=False) + "\n"


def _table(found: list[Contestant]) -> str:
    from ...tune.page import HEAD, rows

    body = [list(HEAD), *rows(found)]
    widths = [max(map(len, column)) for column in zip(*body)]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in body]
    return "\n".join(line.rstrip() for line in lines) + "\n"
