"""`mlx-dgemma choose`: a thin layer over `choose()`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import click

from ..errors import count, human
from ..prompt.messages import messages_of
from .common import adapter_option, files_option, load_engine, media_options, model_options, number, read_prompt, utf8
from .terminal import Terminal


@click.command("choose")
@click.argument("prompt", required=False)
@click.argument("labels", nargs=-1)
@files_option
@click.option("--range", "span", type=int, nargs=2, metavar="LOW HIGH", help="The labels are these numbers, both too.")
@click.option("--bool", "truth", is_flag=True, help="The labels are true and false; yes and no count as them.")
@click.option("--ask", "asked", metavar="NAME=A,B", multiple=True, help="A named question with labels; repeatable.")
@click.option("--answer", metavar="TEMPLATE", help='What the answer begins with: "It is {}.", or slots by name.')
@click.option("--calibrate", is_flag=True, help="Divide by what the labels get where nothing is asked.")
@click.option("--system", metavar="TEXT", help="System message.")
@number("--seed", 0, "Of the canvas's noise.", "0")
@media_options
@number("--prefill-chunk", 1, "Prompt tokens encoded at once.", "512, or 1024 of a prompt beyond 4096")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_options
@adapter_option
def choose(
    prompt: str | None,
    labels: tuple[str, ...],
    files: tuple[str, ...],
    span: tuple[int, int] | None,
    truth: bool,
    asked: tuple[str, ...],
    answer: str | None,
    calibrate: bool,
    system: str | None,
    seed: int | None,
    images: tuple[str, ...],
    video: str | None,
    verbose: bool,
    as_json: bool,
    model: str | None,
    dtype: str | None,
    ignore_memory: bool,
    adapter: str | None,
    **options: Any,
) -> None:
    """Tell how probable each label is as the answer.

    One denoising step tells. The first argument is the prompt, - for stdin, and the others are labels. Files or
    piped stdin come before the prompt, as with generate. A label a line is printed, the most probable first, with a
    tab and its probability; with --ask, the question's name and a tab come before. --json prints
    {probabilities, stats}.

    \b
    mlx-dgemma choose "Which is larger, 51 or 23?" 51 23
    mlx-dgemma choose --image photo.jpg "What color is the shape?" red green blue
    mlx-dgemma choose "How old is Anna? She was born 31 years ago." --range 0 99
    mlx-dgemma choose "What is in the image?" --image photo.jpg --answer "A {color} {shape}." \\
        --ask color=red,blue --ask shape=circle,square
    """
    from ..tasks.choose import choose as choose_

    if [*files, *images, prompt].count("-") > 1:
        raise click.UsageError("- is given twice, but stdin can be read once.")
    sources = [sys.stdin.buffer.read() if one == "-" else one for one in images]
    piped = prompt == "-" or ("-" not in images and not sys.stdin.isatty())
    text = read_prompt(None if prompt == "-" else prompt, files, piped)
    wanted = _labels(labels, span, truth, asked)
    messages = messages_of(text, utf8(system, "--system"), sources, video)
    terminal = Terminal()
    engine = load_engine(model, dtype, ignore_memory, terminal, adapter)
    given = {name: value for name, value in options.items() if value is not None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        choice = choose_(
            engine.model,
            engine.builder,
            messages,
            wanted,
            answer=utf8(answer, "--answer"),
            seed=seed or 0,
            calibrate=calibrate,
            **given,
        )
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        terminal.warn(f"Warning: {message}")
    told = f"{count(choice.prompt_tokens, 'prompt token')}, {choice.seconds:.2f} s"
    (terminal.warn if verbose else terminal.hint)(f"{told}, {human(choice.peak_memory_bytes)} peak")
    terminal.say(_as_json(choice) if as_json else _lines(choice.probabilities))


def _labels(labels: tuple[str, ...], span: tuple[int, int] | None, truth: bool, asked: tuple[str, ...]) -> Any:
    """The one of four ways to give labels that was taken.

    Raises:
        click.UsageError: none was, several were, or a question has no name or is given twice.
    """
    if sum(map(bool, (labels, span, truth, asked))) != 1:
        raise click.UsageError("Give the labels in one way: as arguments, with --range, with --bool or with --ask.")
    if span and span[0] > span[1]:
        raise click.UsageError(f"--range is {span[0]} {span[1]}; give the lower number first.")
    if not asked:
        return range(span[0], span[1] + 1) if span else bool if truth else [utf8(one, "A label") for one in labels]
    questions: dict[str, list[str]] = {}
    for one in asked:
        name, equals, rest = (utf8(one, "--ask") or "").partition("=")
        if not equals or name in questions:
            why = "is given twice; join its labels" if equals else "has no labels; write NAME=label,label"
            raise click.UsageError(f"--ask {name} {why}.")
        questions[name] = [label.strip() for label in rest.split(",")]
    return questions


def _lines(found: dict[Any, Any], before: str = "") -> str:
    """A label a line with its probability, the most probable first."""
    if found and all(isinstance(one, dict) for one in found.values()):
        return "".join(_lines(one, f"{name}\t") for name, one in found.items())
    ordered = sorted(found.items(), key=lambda one: -one[1])
    return "".join(f"{before}{_key(label)}\t{probability:.4f}\n" for label, probability in ordered)


def _key(label: Any) -> str:
    """A label as JSON writes keys."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _as_json(choice: Any) -> str:
    from dataclasses import asdict

    stats = asdict(choice)
    return json.dumps({"probabilities": stats.pop("probabilities"), "stats": stats}, ensure_ascii=False) + "\n"
