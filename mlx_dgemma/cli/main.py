"""The command group `mlx-dgemma`, and the commands generate, chat and info.

Only the requested text goes to stdout. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. Heavy
modules are imported inside the commands, so that --help is fast.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import DgemmaError, OptionError, PromptError
from ..prompt.messages import messages_of
from .common import (
    DEMO_NOTICE,
    ModelChoice,
    adapter_option,
    answer_options,
    decode_argument,
    decode_utf8,
    explicit_options,
    files_option,
    media_options,
    model_options,
    number_option,
    print_details,
    read_prompt,
    stream_answer,
)
from .terminal import Terminal

CHAT_HELP = """\
/image FILE    add a picture to the next line
/video FILE    add a video to the next line
/system TEXT   set the system message; without TEXT, remove it
/reset         start a new conversation
/help          show this help
/exit          leave; Ctrl-D does the same
A line that ends in \\ continues on the next line. Ctrl-C stops an answer."""


class Commands(click.Group):
    """Imports commands on demand, prints a `DgemmaError` as one sentence, and exits with 130 on Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of --help."""
        return "generate chat infill edit choose serve launch tune evaluate fuse info check convert".split()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        if cmd_name == "convert":
            from ..convert.cli import command

            return command
        if cmd_name in ("infill", "edit"):
            from . import text

            return getattr(text, cmd_name)
        if cmd_name == "choose":
            from .choose import choose

            return choose
        if cmd_name == "serve":
            from .serve import serve

            return serve
        if cmd_name == "launch":
            from .launch import launch

            return launch
        if cmd_name == "tune":
            from .tune import tune

            return tune
        if cmd_name == "evaluate":
            from .evaluate import evaluate

            return evaluate
        if cmd_name == "fuse":
            from .fuse import fuse

            return fuse
        if cmd_name == "check":
            from .check import check

            return check
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except DgemmaError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has gone; click exits quietly
                raise
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            terminal = Terminal()
            terminal.interrupted()
            terminal.hint("Interrupted.")
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-dgemma")
def main() -> None:
    """DiffusionGemma on MLX: text by block diffusion.

    Without --model, a bundled demo of 6.7 M parameters answers.

    \b
    mlx-dgemma generate "Write JSON for: Anna is 31 years old and lives in Oslo."
    cat log.txt | mlx-dgemma generate --model FOLDER "What failed?"
    mlx-dgemma chat --model FOLDER
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: the next open file would get its descriptor
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Regardless of the locale; names of files may hold bytes that are no text.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


@main.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("prompt", required=False)
@files_option
@media_options
@click.option(
    "--tools", metavar="FILE.json", type=click.Path(exists=True, dir_okay=False), help="Tools that the model may call."
)
@click.option("--schema", metavar="FILE.json|JSON", help="Constrain the answer to this JSON Schema.")
@click.option("--regex", metavar="PATTERN", help="Constrain the whole answer to this regular expression.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@model_options
@adapter_option
@answer_options
@click.pass_context
def generate(
    ctx: click.Context,
    prompt: str | None,
    files: tuple[str, ...],
    images: tuple[str, ...],
    video: str | None,
    tools: str | None,
    schema: str | None,
    regex: str | None,
    as_json: bool,
    verbose: bool,
    model: ModelChoice,
    system: str | None,
    **options: Any,
) -> None:
    """Answer one prompt.

    The prompt is an argument, files, or stdin. Files or stdin come first, then a blank line and the argument. stdin
    is read if it is not a terminal and no file is given; --image - reads a picture from it.

    Each tool call is printed as a line: {"name": ..., "arguments": {...}}. --tools takes a JSON list of function
    declarations in OpenAI's format. --json prints {text, thinking, tool_calls, finish_reason, stats}. Ctrl-C keeps
    the finished blocks; with --json, finish_reason is then "interrupted" and stats is null.

    \b
    mlx-dgemma generate "Write JSON for: Anna is 31 years old and lives in Oslo."
    cat log.txt | mlx-dgemma generate --model FOLDER "What failed?"
    mlx-dgemma generate --model FOLDER --image photo.jpg "What is this?"
    mlx-dgemma generate --model FOLDER -f chapter.txt -f notes.txt "Summarise." --seed 7 --json
    """
    options = explicit_options(options)
    if [*files, *images].count("-") > 1:
        raise click.UsageError("- is given twice, but stdin can be read once.")
    sources = [sys.stdin.buffer.read() if one == "-" else one for one in images]
    text = read_prompt(prompt, files, piped="-" not in images and not sys.stdin.isatty())
    messages = messages_of(text, decode_argument(system, "--system"), sources, video)
    declarations = _read_tools(tools) if tools else None
    json_schema = _read_schema(schema) if schema else None
    constraint = explicit_options({"schema": json_schema, "regex": decode_argument(regex, "--regex")})
    terminal = Terminal()
    engine = model.load(terminal)
    stream = partial(engine.stream, messages, tools=declarations, **constraint, **options)
    answer = stream_answer(engine, stream, terminal, silent=as_json)
    if verbose and answer.result:
        print_details(engine, answer.result, options, terminal)
    if as_json:
        terminal.say(json.dumps(answer.as_dict(), ensure_ascii=False) + "\n")
    if answer.result is None:
        ctx.exit(130)


@main.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@media_options
@model_options
@adapter_option
@answer_options
@click.pass_context
def chat(
    ctx: click.Context,
    images: tuple[str, ...],
    video: str | None,
    verbose: bool,
    model: ModelChoice,
    system: str | None,
    **options: Any,
) -> None:
    """Chat with the model; each turn encodes only the new text.

    --image and --video belong to the first turn. Commands are /image FILE, /video FILE, /system TEXT, /reset, /help
    and /exit. A line that ends in \\ continues on the next line. Ctrl-C stops an answer and keeps its finished
    blocks. If stdin is not a terminal, each of its lines is a turn.

    \b
    mlx-dgemma chat --model FOLDER --system "Answer in one sentence."
    mlx-dgemma chat --model FOLDER --seed 1 < questions.txt
    """
    if "-" in images:
        raise click.UsageError("- is stdin, which holds the conversation; name the picture's file.")
    terminal, interactive = Terminal(), sys.stdin.isatty()
    system, options = decode_argument(system, "--system"), explicit_options(options)
    engine = model.load(terminal)
    if interactive:
        terminal.hint("/help lists the commands, Ctrl-D leaves.")
        if model.name is None:
            terminal.hint("The demo learned single questions: /reset before the next one.")
    session = engine.session()
    messages: list[dict[str, Any]] = []
    pictures = list(images)
    while (line := _read_turn(terminal)) is not None:
        command, _, rest = line.strip().partition(" ")
        if not command or command == "/help":
            terminal.hint(CHAT_HELP if command else "")
        elif command == "/exit":
            break
        elif command == "/reset":
            messages, pictures, video = [], [], None
        elif command == "/image":
            pictures.append(rest.strip())
        elif command == "/video":
            video = rest.strip() or None
        elif command == "/system":
            system = rest.strip() or None
        elif command[0] == "/" and command[1:].isalpha():
            terminal.warn(f"There is no command {command}; /help lists them.")
        else:
            messages += messages_of(line, images=pictures, video=video)
            pictures, video = [], None
            try:
                stream = partial(engine.stream, messages, system=system, session=session, **options)
                answer = stream_answer(engine, stream, terminal)
            except PromptError as error:
                if not interactive:
                    raise
                messages.pop()
                terminal.warn(f"Error: {error} /reset starts anew.")
                continue
            if answer.result or answer.text:  # the history has no thinking
                messages.append({"role": "assistant", "content": answer.text})
            else:
                messages.pop()
            if answer.result is None and not interactive:
                ctx.exit(130)
            if verbose and answer.result:
                print_details(engine, answer.result, options, terminal)


@main.command()
@click.argument("model", required=False, envvar="MLX_DGEMMA_MODEL")
@number_option("--context", 1, "Tokens of prompt and answer to compute the memory for.", "4096")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def info(model: str | None, context: int | None, as_json: bool) -> None:
    """Show a checkpoint's architecture, sizes and sampler, and whether it fits this machine.

    MODEL is a folder or a downloaded Hub id [default: $MLX_DGEMMA_MODEL, else the bundled demo]. No weights are
    loaded.

    \b
    mlx-dgemma info
    mlx-dgemma info google/diffusiongemma-26B-A4B-it --context 32768
    """
    from .info import describe, lines, open_local

    terminal = Terminal()
    if model is None:
        terminal.warn(DEMO_NOTICE)
    about = describe(open_local(model), context)
    terminal.say((json.dumps(about, ensure_ascii=False) if as_json else "\n".join(lines(about))) + "\n")


def _read_turn(terminal: Terminal) -> str | None:
    """Read a turn: a line and its continuation lines. None means that the user leaves."""
    lines: list[str] = []
    try:
        while True:
            line = _read_line(terminal, "… " if lines else "> ")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
    except (EOFError, KeyboardInterrupt):
        terminal.hint("\n" if sys.stdin.isatty() else "")
        return None


def _read_line(terminal: Terminal, prompt: str) -> str:
    if not sys.stdin.isatty():
        if not (data := sys.stdin.buffer.readline()):
            raise EOFError
        return decode_utf8(data, "stdin").removeprefix("\ufeff").rstrip("\r\n")
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input)
    if sys.stdout.isatty():
        return decode_argument(input(prompt), "The line") or ""
    terminal.hint(prompt)
    return decode_argument(input(), "The line") or ""


def _read_schema(source: str) -> dict:
    """Read a JSON Schema from a file, or from the command line if it begins with a brace.

    Raises:
        OptionError: it is not a JSON object.
    """
    inline = source.lstrip().startswith("{")
    name = "--schema" if inline else source
    try:
        schema = json.loads(
            (decode_argument(source, name) or "")
            if inline
            else decode_utf8(Path(source).read_bytes(), source).removeprefix("\ufeff")
        )
    except ValueError as error:
        raise OptionError(f"{name} is not JSON ({error}); give a JSON Schema.") from None
    if not isinstance(schema, dict):
        raise OptionError(f"{name} holds {type(schema).__name__}; give a JSON Schema, which is an object.")
    return schema


def _read_tools(path: str) -> list[dict]:
    """Read function declarations from a JSON file.

    Raises:
        OptionError: the file is not JSON, or not a list of declarations.
    """
    try:
        tools = json.loads(decode_utf8(Path(path).read_bytes(), path).removeprefix("\ufeff"))
    except ValueError as error:
        raise OptionError(f"{path} is not JSON ({error}); give a list of function declarations.") from None
    if not isinstance(tools, list):
        raise OptionError(f"{path} holds {type(tools).__name__}; give a list of function declarations.")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise OptionError(
                f"{path} has no function declaration at position {i}; each should be "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
            )
    return tools
