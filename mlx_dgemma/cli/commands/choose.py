"""`mlx-dgemma choose`: a thin layer over `choose()`. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from ...errors import count, human
from ...prompt.messages import messages_of
from ..calls.texts import decode_argument
from ..common import (
    ModelChoice,
    adapter_option,
    files_option,
    media_options,
    model_options,
    number_option,
    server_option,
)
from ..output import Output, output_options
from ..stdin import read_prompt, read_stdin
from ..terminal import Terminal, told_warnings


@click.command("choose")
@click.argument("prompt", required=False)
@click.argument("labels", nargs=-1)
@files_option
@click.option(
    "--range", "span", type=int, nargs=2, metavar="LOW HIGH", help="The labels are the numbers from LOW to HIGH."
)
@click.option("--bool", "truth", is_flag=True, help="The labels are true and false; yes and no count as well.")
@click.option(
    "--ask", "questions", metavar="NAME=A,B", multiple=True, help="A named question with its labels; repeatable."
)
@click.option(
    "--answer", metavar="TEMPLATE", help='Text of the answer, such as "It is {}.", with a slot or with named slots.'
)
@click.option("--calibrate", is_flag=True, help="Divide by the labels' probabilities without a question.")
@click.option("--system", metavar="TEXT", help="System message.")
@number_option("--seed", 0, "Seed of the canvas's noise.", "0")
@media_options
@number_option("--prefill-chunk", 1, "Prompt tokens encoded at once.", "512; 1024 for prompts above 4096")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@output_options
@model_options
@adapter_option
@server_option
def choose(
    prompt: str | None,
    labels: tuple[str, ...],
    files: tuple[str, ...],
    span: tuple[int, int] | None,
    truth: bool,
    questions: tuple[str, ...],
    answer: str | None,
    calibrate: bool,
    system: str | None,
    seed: int | None,
    images: tuple[str, ...],
    video: str | None,
    verbose: bool,
    as_json: bool,
    output: Output,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Compute how probable each label is as the answer.

    This takes one denoising step. The first argument is the prompt, - for stdin, and the others are labels. Files or
    stdin come before the prompt; stdin is read by the same rule as in generate. Each label is printed on a line of its
    own with a tab and its probability, the most probable first. With --ask, a line begins with the question's name and
    a tab. --json prints {probabilities, stats}.

    \b
    mlx-dgemma choose "Which is larger, 51 or 23?" 51 23
    mlx-dgemma choose --image photo.jpg "What color is the shape?" red green blue
    mlx-dgemma choose --model FOLDER "How old is Anna? She was born 31 years ago." --range 0 99
    mlx-dgemma choose "What is in the image?" --image photo.jpg --answer "A {color} {shape}." \\
        --ask color=red,blue --ask shape=circle,square
    """
    if [*files, *images, prompt].count("-") > 1:
        raise click.UsageError("- is given twice, but stdin can be read once.")
    terminal = Terminal()
    output.check()
    targets = _parse_labels(labels, span, truth, questions)
    sources = [read_stdin(terminal) if one == "-" else one for one in images]
    text = read_prompt(prompt, files, terminal, taken="-" in images)
    messages = messages_of(text, decode_argument(system, "--system"), sources, video)
    for one in targets.values() if isinstance(targets, dict) else [targets]:
        if one is not bool and len(one) == 1:
            raise click.UsageError(f"The label {one[0]!r} stands alone, so it is always certain; give at least two.")
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"answer": decode_argument(answer, "--answer"), "seed": seed or 0, "calibrate": calibrate}
    with told_warnings(terminal):
        choice = _weigh(model, messages, targets, given, terminal)
    summary = f"{count(choice['prompt_tokens'], 'prompt token')}, {choice['seconds']:.2f} s"
    (terminal.warn if verbose else terminal.hint)(f"{summary}, {human(choice['peak_memory_bytes'])} peak")
    probabilities = choice.pop("probabilities")
    whole = {"probabilities": probabilities, "stats": choice}
    output.write(json.dumps(whole, ensure_ascii=False) + "\n" if as_json else _lines(probabilities), terminal)


def _weigh(
    model: ModelChoice, messages: list[dict[str, Any]], labels: Any, given: dict[str, Any], terminal: Terminal
) -> dict[str, Any]:
    """The fields of `tasks.choose.Choice`, read by a server or here."""
    if (remote := model.find(terminal)) is not None:
        return remote.choose(messages, labels, **given)
    from ...tasks.choose import ask, compute

    opened = model.open(terminal)
    asked = ask(opened.builder, messages, labels, **given)
    engine = model.load(terminal, opened)
    return asdict(engine.call(compute, engine.model, asked))


def _parse_labels(
    labels: tuple[str, ...], span: tuple[int, int] | None, truth: bool, questions: tuple[str, ...]
) -> Any:
    """The labels from the one of four ways that the user took.

    Raises:
        click.UsageError: no labels, labels in several ways, or a question without a name or given twice.
    """
    if sum(map(bool, (labels, span, truth, questions))) != 1:
        raise click.UsageError("Give the labels in one way: as arguments, with --range, with --bool or with --ask.")
    if span and span[0] > span[1]:
        raise click.UsageError(f"--range is {span[0]} {span[1]}; give the lower number first.")
    if not questions:
        return (
            range(span[0], span[1] + 1)
            if span
            else bool
            if truth
            else [decode_argument(one, "A label") for one in labels]
        )
    by_name: dict[str, list[str]] = {}
    for one in questions:
        name, equals, rest = (decode_argument(one, "--ask") or "").partition("=")
        if not equals or name in by_name:
            why = "is given twice; join its labels" if equals else "has no labels; write NAME=label,label"
            raise click.UsageError(f"--ask {name} {why}.")
        by_name[name] = [label.strip() for label in rest.split(",")]
    return by_name


def _lines(probabilities: dict[Any, Any], prefix: str = "") -> str:
    """A line for each label with its probability, the most probable first."""
    if probabilities and all(isinstance(one, dict) for one in probabilities.values()):
        return "".join(_lines(one, f"{name}\t") for name, one in probabilities.items())
    ordered = sorted(probabilities.items(), key=lambda one: -one[1])
    return "".join(f"{prefix}{_key(label)}\t{probability:.4f}\n" for label, probability in ordered)


def _key(label: Any) -> str:
    """A label as a JSON key."""
    return str(label).lower() if isinstance(label, bool) else str(label)
