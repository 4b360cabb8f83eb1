"""`mlx-dgemma infill` and `edit`: change an existing text. Heavy modules are imported when they run."""

from __future__ import annotations

import difflib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from ...errors import OptionError
from ...files import atomic_file
from ..common import (
    ModelChoice,
    adapter_option,
    decode_argument,
    decode_utf8,
    explicit_options,
    model_options,
    number_option,
    print_details,
    sampler_options,
    server_option,
    stream_answer,
)
from ..local import task_stream
from ..terminal import Terminal

MARK = "<HOLE>"
existing_file = click.Path(exists=True, dir_okay=False, allow_dash=True)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Print options and statistics to stderr.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("file", required=False, type=existing_file)
@click.option("--prefix-file", type=existing_file, help="File with the text before the hole, - for stdin.")
@click.option("--suffix-file", type=existing_file, help="File with the text after the hole, - for stdin.")
@click.option("--at", metavar="LINE:COLUMN", help="Position of the hole in FILE, both counted from 1.")
@click.option("--mark", metavar="TEXT", default=MARK, show_default=True, help="Text in FILE that marks the hole.")
@click.option("--prompt", metavar="TEXT", help="A prompt that the whole text answers.")
@number_option("--length", 1, "Length of the hole in tokens.", "the most likely one")
@click.option("--whole", is_flag=True, help="Print the whole text instead of the fill.")
@number_option("--seed", 0, "The same seed gives the same text.", "random")
@number_option("--max-tokens", 1, "Maximum length of the hole in tokens.")
@json_option
@verbose_option
@model_options
@adapter_option
@server_option
@sampler_options
@click.pass_context
def infill(
    ctx: click.Context,
    file: str | None,
    prefix_file: str | None,
    suffix_file: str | None,
    at: str | None,
    mark: str,
    prompt: str | None,
    whole: bool,
    as_json: bool,
    verbose: bool,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Fill a hole in a text without changing the rest.

    The hole is a mark in FILE (- for stdin), a position in FILE, or the place between two files. The fill is printed
    unchanged; a line break is added only if stdout is a terminal.

    \b
    mlx-dgemma infill notes.txt                        # the hole is marked <HOLE>
    mlx-dgemma infill --model FOLDER app.py --at 12:5 --prompt "A script that sorts a file."
    mlx-dgemma infill --prefix-file a --suffix-file b --whole > c
    """

    prefix, suffix = _split_at_hole(file, prefix_file, suffix_file, at, mark)
    options = explicit_options(options)
    terminal = Terminal()
    engine = model.find(terminal)
    stream = task_stream(engine, "infill", prefix, suffix, prompt=decode_argument(prompt, "--prompt"), **options)
    answer = stream_answer(engine, stream, terminal, silent=True)
    if answer.result is None:
        ctx.exit(130)
    if verbose:
        options.pop("length", None)
        print_details(engine, answer.result, options, terminal)
    text = answer.result.text
    if as_json:
        whole_text = {"whole": prefix + text + suffix} if whole else {}
        terminal.say(json.dumps({**answer.as_dict(), **whole_text}, ensure_ascii=False) + "\n")
        return
    shown = prefix + text + suffix if whole else text
    terminal.say(shown + ("\n" if sys.stdout.isatty() and not shown.endswith("\n") else ""))


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("instruction")
@click.argument("file", required=False, type=existing_file)
@click.option(
    "--strength",
    type=click.FloatRange(0, 1),
    metavar="X",
    show_default="0.5",
    help="Share of the text that is replaced by noise.",
)
@click.option("--diff", is_flag=True, help="Print a unified diff.")
@click.option("-i", "--in-place", is_flag=True, help="Write the text to FILE and the old one to FILE.bak.")
@number_option("--seed", 0, "The same seed gives the same text.", "random")
@number_option("--max-tokens", 1, "Maximum length of the text.", "twice the draft's, at least the checkpoint's")
@json_option
@verbose_option
@model_options
@adapter_option
@server_option
@sampler_options
@click.pass_context
def edit(
    ctx: click.Context,
    instruction: str,
    file: str | None,
    diff: bool,
    in_place: bool,
    as_json: bool,
    verbose: bool,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Rewrite a text according to an instruction.

    The text is FILE or stdin. The canvas starts from it, so most of what need not change is kept.

    \b
    mlx-dgemma edit --model FOLDER "make it formal" < draft.txt
    mlx-dgemma edit "Replace cat with dog" story.txt --diff
    mlx-dgemma edit --model FOLDER "fix the spelling" letter.txt --in-place
    """

    if in_place and (file is None or file == "-"):
        raise click.UsageError("--in-place needs a FILE to write to.")
    if in_place and (diff or as_json):
        raise click.UsageError("--in-place prints nothing; leave out --diff and --json.")
    if diff and as_json:
        raise click.UsageError("--diff and --json are two ways to print; give one.")
    if file is None and sys.stdin.isatty():
        raise click.UsageError("There is no text: name a file or give it on stdin.")
    draft, options = _read(file or "-"), explicit_options(options)
    terminal = Terminal()
    engine = model.find(terminal)
    stream = task_stream(engine, "edit", draft, decode_argument(instruction, "The instruction") or "", **options)
    answer = stream_answer(engine, stream, terminal, silent=True)
    if answer.result is None:
        ctx.exit(130)
    if verbose:
        options.pop("strength", None)
        print_details(engine, answer.result, options, terminal)
    text = answer.result.text
    if in_place:
        if answer.result.finish_reason == "length":
            raise OptionError(
                f"The text was cut at {len(answer.result.tokens)} tokens, so {file} stays as it is; raise --max-tokens."
            )
        _replace(Path(str(file)), text)
    elif as_json:
        terminal.say(json.dumps(answer.as_dict(), ensure_ascii=False) + "\n")
    elif diff:
        terminal.say(_diff(draft, text, file or "-"))
    else:
        terminal.say(text + ("\n" if sys.stdout.isatty() and not text.endswith("\n") else ""))


def _split_at_hole(
    file: str | None, prefix_file: str | None, suffix_file: str | None, at: str | None, mark: str
) -> tuple[str, str]:
    """The texts before and after the hole, from one file or two.

    Raises:
        click.UsageError: no text, or a text given in two ways.
        OptionError: no hole in the file, several, or a position outside it.
    """
    if (file is None) == (prefix_file is None and suffix_file is None):
        raise click.UsageError("Give the text in one way: as FILE, or with --prefix-file and --suffix-file.")
    if file is None:
        if prefix_file == suffix_file == "-":
            raise click.UsageError("- is given twice, but stdin can be read once.")
        return (_read(prefix_file) if prefix_file else "", _read(suffix_file) if suffix_file else "")
    text = _read(file)
    if at is None:
        if not mark:
            raise OptionError("--mark is empty; give the text that stands where the hole is.")
        if text.count(mark) != 1:
            raise OptionError(f"{file} has the mark {mark} {text.count(mark)} times; mark one hole, or use --at.")
        before, _, after = text.partition(mark)
        return before, after
    line, _, column = at.partition(":")
    lines = text.splitlines(keepends=True) or [""]
    if text.endswith("\n"):
        lines.append("")
    place = f"--at is {at!r}"
    if not (line.isdecimal() and column.isdecimal() and int(line) > 0 and int(column) > 0):
        raise OptionError(f"{place}; it should be LINE:COLUMN, both counted from 1.")
    row, col = int(line) - 1, int(column) - 1
    if row >= len(lines) or col > len(lines[row].rstrip("\r\n")):
        raise OptionError(f"{place}, but {file} has no such place; it has {len(lines)} lines.")
    offset = sum(map(len, lines[:row])) + col
    return text[:offset], text[offset:]


def _read(name: str) -> str:
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    return decode_utf8(data, "stdin" if name == "-" else name)


def _replace(path: Path, text: str) -> None:
    """Replace a file's text atomically, keep its permissions, and save the old content as PATH.bak."""
    path = path.resolve()
    with atomic_file(path) as draft:
        draft.write_bytes(text.encode())
        shutil.copymode(path, draft)
        shutil.copy2(path, path.with_name(path.name + ".bak"))


def _diff(old: str, new: str, name: str) -> str:
    """A unified diff. A last line without a line break is marked as in `diff`."""
    lines = difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)
