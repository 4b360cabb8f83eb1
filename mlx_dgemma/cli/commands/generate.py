"""The command generate."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import click

from ...errors import OptionError
from ...prompt.messages import messages_of
from ..common import (
    ModelChoice,
    adapter_option,
    answer_options,
    decode_argument,
    decode_utf8,
    explicit_options,
    files_option,
    media_options,
    model_options,
    print_details,
    read_bytes,
    read_prompt,
    server_option,
    stream_answer,
)
from ..terminal import Terminal


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
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
@server_option
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
    engine = model.find(terminal)
    stream = partial(engine.stream, messages, tools=declarations, **constraint, **options)
    answer = stream_answer(engine, stream, terminal, silent=as_json)
    if verbose and answer.result:
        print_details(engine, answer.result, options, terminal)
    if as_json:
        terminal.say(json.dumps(answer.as_dict(), ensure_ascii=False) + "\n")
    if answer.result is None:
        ctx.exit(130)


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
            else decode_utf8(read_bytes(source), source).removeprefix("\ufeff")
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
        tools = json.loads(decode_utf8(read_bytes(path), path).removeprefix("\ufeff"))
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
