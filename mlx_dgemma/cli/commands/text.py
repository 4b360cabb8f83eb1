"""`mlx-dgemma infill`, `continue` and `edit`: change an existing text. Heavy modules are imported when they run."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
from itertools import count as numbers
from pathlib import Path
from typing import Any

import click

from ...errors import DgemmaError, OptionError, PromptError
from ..calls.answers import print_details, stream_answer
from ..calls.texts import decode_argument, decode_utf8
from ..common import (
    ModelChoice,
    adapter_option,
    explicit_options,
    find_task,
    model_options,
    number_option,
    sampler_options,
    server_option,
)
from ..options.kinds import NumberRange
from ..output import Output, output_options, replace_file, why_not_replaced
from ..stdin import read_stdin
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
@output_options
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
    output: Output,
    verbose: bool,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Fill a hole in a text without changing the rest.

    The hole is a mark in FILE (- for stdin), a position in FILE, or the place between two files. stdin is read only
    where - stands for it. The fill is printed unchanged; a line break is added only if stdout is a terminal.

    \b
    mlx-dgemma infill notes.txt                        # the hole is marked <HOLE>
    mlx-dgemma infill --model FOLDER app.py --at 12:5 --prompt "A script that sorts a file."
    mlx-dgemma infill --prefix-file a --suffix-file b --whole --output c
    """

    terminal, options = Terminal(), explicit_options(options)
    output.check()
    prefix, suffix = _split_at_hole(file, prefix_file, suffix_file, at, mark, terminal)
    asked = decode_argument(prompt, "--prompt")
    engine, stream = find_task(model, terminal, "infill", prefix, suffix, prompt=asked, **options)
    answer = stream_answer(engine, stream, terminal, silent=True)
    if answer.result is None:
        ctx.exit(130)
    if verbose:
        options.pop("length", None)
        print_details(engine, answer.result, options, terminal)
    text = answer.result.text
    if as_json:
        whole_text = {"whole": prefix + text + suffix} if whole else {}
        output.write(json.dumps({**answer.as_dict(), **whole_text}, ensure_ascii=False) + "\n", terminal)
    else:
        _write(prefix + text + suffix if whole else text, output, terminal)


@click.command("continue", epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("file", required=False, type=existing_file)
@click.option("--prompt", metavar="TEXT", help="A prompt that the whole text answers.")
@click.option("--whole", is_flag=True, help="Print the whole text instead of what is added.")
@number_option("--seed", 0, "The same seed gives the same text.", "random")
@number_option("--max-tokens", 1, "Maximum length of what is added.")
@json_option
@output_options
@verbose_option
@model_options
@adapter_option
@server_option
@sampler_options
@click.pass_context
def continue_text(
    ctx: click.Context,
    file: str | None,
    prompt: str | None,
    whole: bool,
    as_json: bool,
    output: Output,
    verbose: bool,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Go on with a text until it ends.

    The text is FILE; without one, or for -, it is stdin. It stays byte for byte. What is added comes token by token, as
    with --mode causal, unless another mode or an option of canvases is given. A line break is added only if stdout is a
    terminal.

    \b
    mlx-dgemma continue story.txt --max-tokens 100
    mlx-dgemma continue draft.md --prompt "A letter to a friend." --whole --output letter.md
    """

    terminal, options = Terminal(), explicit_options(options)
    output.check()
    name, asked = file or "-", decode_argument(prompt, "--prompt")
    text = _read(name, terminal)
    if not text.strip():
        raise PromptError(f"{'stdin' if name == '-' else name} is empty; there is nothing to continue.")
    engine, stream = find_task(model, terminal, "infill", text, "", prompt=asked, **_in_mode(options))
    printed = sys.stdout.isatty() and not (as_json or output.path)
    if printed and whole:
        terminal.say(text)
    answer = stream_answer(engine, stream, terminal, silent=not printed)
    if answer.result is None:
        ctx.exit(130)
    if verbose:
        print_details(engine, answer.result, options, terminal)
    if as_json:
        whole_text = {"whole": text + answer.result.text} if whole else {}
        output.write(json.dumps({**answer.as_dict(), **whole_text}, ensure_ascii=False) + "\n", terminal)
    else:
        done = text + answer.result.text if whole else answer.result.text
        output.write(done, terminal, said=printed, copied=done)


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("instruction")
@click.argument("file", required=False, type=existing_file)
@click.option(
    "--strength",
    type=NumberRange(0, 1),
    metavar="X",
    show_default="0.5",
    help="Share of the text that is replaced by noise.",
)
@click.option("--diff", is_flag=True, help="Print a unified diff.")
@click.option(
    "-i",
    "--in-place",
    is_flag=True,
    help="Write the text to FILE, and the old one to FILE.bak or, where that is taken, to FILE.bak.2 and so on.",
)
@number_option("--seed", 0, "The same seed gives the same text.", "random")
@number_option("--max-tokens", 1, "Maximum length of the text.", "twice the draft's, at least the checkpoint's")
@json_option
@output_options
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
    output: Output,
    verbose: bool,
    model: ModelChoice,
    **options: Any,
) -> None:
    """Rewrite a text according to an instruction.

    The text is FILE; without one, or for -, it is stdin. The canvas starts from it, so most of what need not change is
    kept. --in-place keeps every old text: no backup is overwritten. If the command fails or is interrupted, or the text
    is cut, empty or was changed by somebody else meanwhile, FILE stays as it is.

    \b
    mlx-dgemma edit --model FOLDER "make it formal" < draft.txt
    mlx-dgemma edit "Replace cat with dog" story.txt --diff
    mlx-dgemma edit --model FOLDER "fix the spelling" letter.txt --in-place
    """

    _check_edit(file, in_place, diff, as_json, output)
    terminal, options, said = (
        Terminal(),
        explicit_options(options),
        decode_argument(instruction, "The instruction") or "",
    )
    if not said.strip():
        raise click.UsageError("INSTRUCTION is empty; say what is to be done with the text.")
    output.check()
    draft = _read(file or "-", terminal)
    if not draft.strip():
        raise PromptError(f"{'stdin' if file in (None, '-') else file} is empty; there is nothing to edit.")
    engine, stream = find_task(model, terminal, "edit", draft, said, **options)
    answer = stream_answer(engine, stream, terminal, silent=True)
    if answer.result is None:
        ctx.exit(130)
    if verbose:
        options.pop("strength", None)
        print_details(engine, answer.result, options, terminal)
    text, target = answer.result.text, file if in_place else output.path
    if target and answer.result.finish_reason == "length":
        raise DgemmaError(
            f"The text was cut at {len(answer.result.tokens)} tokens, so {target} stays as it is; raise --max-tokens."
        )
    if in_place:
        _replace(Path(str(file)), draft, text, terminal)
        if output.copy:
            Output(copy=True).write(text, terminal, said=True, copied=text)
    elif as_json:
        output.write(json.dumps(answer.as_dict(), ensure_ascii=False) + "\n", terminal)
    elif diff:
        output.write(_diff(draft, text, file or "-"), terminal)
    else:
        _write(text, output, terminal)


def _in_mode(options: dict[str, Any]) -> dict[str, Any]:
    """The options with causal mode, unless one of them is of another mode."""
    from ...decoding.options import CANVAS_OPTIONS

    chosen = {"mode", "exact", "fast", *CANVAS_OPTIONS} & {
        name for name, value in options.items() if value not in (None, False)
    }
    return options if chosen else {**options, "mode": "causal"}


def _check_edit(file: str | None, in_place: bool, diff: bool, as_json: bool, output: Output) -> None:
    """Refuse options of edit that cannot be together.

    Raises:
        click.UsageError: naming them.
    """
    if in_place and file in (None, "-"):
        raise click.UsageError("--in-place needs a FILE to write to.")
    if in_place and (diff or as_json or output.path):
        raise click.UsageError("--in-place prints nothing; leave out --diff, --json and --output.")
    if diff and as_json:
        raise click.UsageError("--diff and --json are two ways to print; give one.")
    if in_place and (why := why_not_replaced(Path(str(file)))) is not None:
        raise click.UsageError(f"--in-place cannot write to {file}, since {why}; check its permissions.")
    if file is None and sys.stdin.isatty():
        raise click.UsageError("There is no text: name a file or give it on stdin.")


def _write(text: str, output: Output, terminal: Terminal) -> None:
    """Deliver a text unchanged; where it ends on a terminal, with a line break behind it."""
    ends = "\n" if output.path is None and sys.stdout.isatty() and not text.endswith("\n") else ""
    output.write(text + ends, terminal, copied=text)


def _split_at_hole(
    file: str | None, prefix_file: str | None, suffix_file: str | None, at: str | None, mark: str, terminal: Terminal
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
        before, behind = (_read(one, terminal) if one else "" for one in (prefix_file, suffix_file))
        return before, behind
    if at is not None and mark != MARK:
        raise click.UsageError("--at and --mark are two ways to say where the hole is; give one.")
    text = _read(str(file), terminal)
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


def _read(name: str, terminal: Terminal) -> str:
    data = read_stdin(terminal) if name == "-" else Path(name).read_bytes()
    return decode_utf8(data, "stdin" if name == "-" else name)


def _replace(path: Path, draft: str, text: str, terminal: Terminal) -> None:
    """Replace a file's text atomically, keep its permissions, and keep the old text under a name that is free.

    Raises:
        DgemmaError: the new text is empty, or the file is another than was read.
    """
    shown, path = path, path.resolve()
    if not text.strip():
        raise DgemmaError(f"The text is empty, so {shown} stays as it is; try another --seed.")
    if path.read_bytes() != draft.encode():
        raise DgemmaError(f"{shown} was changed while it was edited, so it stays as it is; run the command again.")
    if text == draft:
        terminal.hint(f"{shown} needs no change.")
        return
    backup = _back_up(path)
    try:
        replace_file(path, text.encode())
    except BaseException:
        backup.unlink()
        raise
    terminal.hint(f"The old text is in {backup.name}.")


def _back_up(path: Path) -> Path:
    """Give a file a second name that is free, PATH.bak or PATH.bak.2 and so on; it stays when PATH is replaced."""
    for number in numbers(1):
        backup = path.with_name(path.name + (".bak" if number == 1 else f".bak.{number}"))
        try:
            _name_twice(path, backup)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise DgemmaError(
                f"The backup {backup} cannot be written ({error.strerror}), so {path} stays as it is; mend that first."
            ) from None
    return backup


def _name_twice(path: Path, backup: Path) -> None:
    try:
        os.link(path, backup)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("rb") as old, backup.open("xb") as new:
            shutil.copyfileobj(old, new)
            os.fsync(new.fileno())
        shutil.copystat(path, backup)


def _diff(old: str, new: str, name: str) -> str:
    """A unified diff. A last line without a line break is marked as in `diff`."""
    lines = difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)
