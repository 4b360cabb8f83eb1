"""The command chat."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import Any

import click

from ...errors import PromptError
from ...prompt.messages import messages_of
from ..common import (
    ModelChoice,
    adapter_option,
    answer_options,
    decode_argument,
    decode_utf8,
    explicit_options,
    media_options,
    model_options,
    print_details,
    stream_answer,
)
from ..terminal import Terminal

CHAT_HELP = """\
/image FILE    add a picture to the next line
/video FILE    add a video to the next line
/system TEXT   set the system message; without TEXT, remove it
/reset         start a new conversation
/help          show this help
/exit          leave; Ctrl-D does the same
A line that ends in \\ continues on the next line. Ctrl-C stops an answer."""


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
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
    opened = model.open(terminal)
    opened.options.override(**{name: value for name, value in options.items() if name not in ("seed", "thinking")})
    engine = model.load(terminal, opened)
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
