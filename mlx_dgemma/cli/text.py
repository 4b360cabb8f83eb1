"""`mlx-dgemma infill` and `edit`: work on texts that are there. Nothing heavy is imported until they run."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import OptionError
from .common import (
    adapter_option,
    decode,
    given,
    listen,
    load_engine,
    model_options,
    number,
    sampler_options,
    tell,
    utf8,
)
from .terminal import Terminal

MARK = "<HOLE>"
existing = click.Path(exists=True, dir_okay=False, allow_dash=True)
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Tell on stderr the options in force, and statistics."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object when all is done.")


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("file", required=False, type=existing)
@click.option("--prefix-file", type=existing, help="The text before the hole, byte for byte.")
@click.option("--suffix-file", type=existing, help="The text behind it.")
@click.option("--at", metavar="LINE:COLUMN", help="Where FILE's hole is, both counted from 1.")
@click.option("--mark", metavar="TEXT", default=MARK, show_default=True, help="What stands in FILE where the hole is.")
@click.option("--prompt", metavar="TEXT", help="A request that the whole text answers.")
@number("--length", 1, "Tokens of the hole.", "likely lengths are tried")
@click.option("--whole", is_flag=True, help="Print the whole text, not the fill alone.")
@number("--seed", 0, "The same seed gives the same text.", "drawn")
@number("--max-tokens", 1, "Where a text without anything behind its hole is cut.")
@json_option
@verbose_option
@model_options
@adapter_option
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
    model: str | None,
    dtype: str | None,
    ignore_memory: bool,
    adapter: str | None,
    **options: Any,
) -> None:
    """Fill a hole in a text, which stays as it is.

    The hole is a mark in FILE (- for stdin), a place in it, or what lies between two files. The fill is printed
    as it is, without a line break behind it unless stdout is a terminal.

    \b
    mlx-dgemma infill notes.txt                        # the hole is marked <HOLE>
    mlx-dgemma infill app.py --at 12:5 --prompt "A script that sorts a file."
    mlx-dgemma infill --prefix-file a --suffix-file b --whole > c
    """

    from ..tasks import infill as infill_

    prefix, suffix = _around(file, prefix_file, suffix_file, at, mark)
    options = given(options)
    terminal = Terminal()
    engine = load_engine(model, dtype, ignore_memory, terminal, adapter)
    request = infill_.infill(engine.builder, prefix, suffix, prompt=utf8(prompt, "--prompt"), **options)
    heard = listen(engine, partial(engine.run, request), terminal, silent=True)
    if heard.result is None:
        ctx.exit(130)
    if verbose:
        tell(engine, heard.result, {name: value for name, value in options.items() if name != "length"}, terminal)
    text = heard.result.text
    if as_json:
        whole_text = {"whole": prefix + text + suffix} if whole else {}
        terminal.say(json.dumps({**heard.as_dict(), **whole_text}, ensure_ascii=False) + "\n")
        return
    shown = prefix + text + suffix if whole else text
    terminal.say(shown + ("\n" if sys.stdout.isatty() and not shown.endswith("\n") else ""))


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("instruction")
@click.argument("file", required=False, type=existing)
@click.option("--strength", type=click.FloatRange(0, 1), metavar="X", show_default="0.5", help="Share that is noised.")
@click.option("--diff", is_flag=True, help="Print a unified diff.")
@click.option("-i", "--in-place", is_flag=True, help="Write the text to FILE; the old one becomes FILE.bak.")
@number("--seed", 0, "The same seed gives the same text.", "drawn")
@number("--max-tokens", 1, "Where the text is cut.", "twice the draft's, at least the checkpoint's")
@json_option
@verbose_option
@model_options
@adapter_option
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
    model: str | None,
    dtype: str | None,
    ignore_memory: bool,
    adapter: str | None,
    **options: Any,
) -> None:
    """Rewrite a text as an instruction says.

    The text is FILE or stdin. It is what the canvas begins with, so what need not change mostly stays.

    \b
    mlx-dgemma edit "make it formal" < draft.txt
    mlx-dgemma edit "Replace cat with dog" story.txt --diff
    mlx-dgemma edit "fix the spelling" letter.txt --in-place
    """

    from ..tasks import edit as edit_

    if in_place and (file is None or file == "-"):
        raise click.UsageError("--in-place needs a FILE to write to.")
    if in_place and (diff or as_json):
        raise click.UsageError("--in-place prints nothing; leave out --diff and --json.")
    if diff and as_json:
        raise click.UsageError("--diff and --json are two ways to print; give one.")
    if file is None and sys.stdin.isatty():
        raise click.UsageError("There is no text: name a file or give it on stdin.")
    draft, options = _read(file or "-"), given(options)
    terminal = Terminal()
    engine = load_engine(model, dtype, ignore_memory, terminal, adapter)
    request = edit_.edit(engine.builder, draft, utf8(instruction, "The instruction") or "", **options)
    heard = listen(engine, partial(engine.run, request), terminal, silent=True)
    if heard.result is None:
        ctx.exit(130)
    if verbose:
        tell(engine, heard.result, {name: value for name, value in options.items() if name != "strength"}, terminal)
    text = heard.result.text + "\n" * (draft.endswith("\n") and not heard.result.text.endswith("\n"))
    if in_place:
        if heard.result.finish_reason == "length":
            raise OptionError(
                f"The text was cut at {len(heard.result.tokens)} tokens, so {file} stays as it is; raise --max-tokens."
            )
        _replace(Path(str(file)), text)
    elif as_json:
        terminal.say(json.dumps(heard.as_dict(), ensure_ascii=False) + "\n")
    elif diff:
        terminal.say(_diff(draft, text, file or "-"))
    else:
        terminal.say(text + ("" if text.endswith("\n") else "\n"))


def _around(
    file: str | None, prefix_file: str | None, suffix_file: str | None, at: str | None, mark: str
) -> tuple[str, str]:
    """The texts before and behind the hole, from one file or two.

    Raises:
        click.UsageError: no text, or two ways to give it.
        OptionError: no hole in the file, several, or a place that it does not have.
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
        before, _, behind = text.partition(mark)
        return before, behind
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
    return decode(data, "stdin" if name == "-" else name)


def _replace(path: Path, text: str) -> None:
    """Put a text in a file's place at once, with its permissions; what it held goes to a .bak beside it."""
    path = path.resolve()
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as new:
        try:
            new.write(text.encode())
            new.flush()
            os.fsync(new.fileno())
            shutil.copymode(path, new.name)
            shutil.copy2(path, path.with_name(path.name + ".bak"))
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise


def _diff(old: str, new: str, name: str) -> str:
    """A unified diff; a last line without an end is told as diff does."""
    lines = difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)
