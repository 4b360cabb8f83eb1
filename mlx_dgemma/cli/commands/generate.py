"""The command generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...errors import DgemmaError, OptionError
from ..audio import audio_options, hear, user_turn
from ..calls.answers import answer_prompt
from ..calls.texts import decode_argument, decode_utf8
from ..common import (
    ModelChoice,
    adapter_option,
    answer_options,
    explicit_options,
    files_option,
    find_task,
    media_options,
    model_options,
    server_option,
)
from ..output import Output, output_options
from ..stdin import read_prompt, read_stdin
from ..terminal import Terminal


class SchemaType(click.ParamType):
    """A JSON Schema: text that begins with a brace, else the file of one."""

    name = "schema"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict:
        """Read it.

        Raises:
            DgemmaError: the file holds something else.
        """
        inline = value.lstrip().startswith("{")
        if not inline:
            value = click.Path(exists=True, dir_okay=False).convert(value, param, ctx)
        name, error = ("--schema", OptionError) if inline else (value, DgemmaError)
        try:
            schema = json.loads(
                (decode_argument(value, name) or "")
                if inline
                else decode_utf8(Path(value).read_bytes(), name).removeprefix("\ufeff")
            )
        except (ValueError, RecursionError) as problem:
            raise error(f"{name} is not JSON ({problem}); give a JSON Schema.") from None
        if not isinstance(schema, dict):
            raise error(f"{name} holds {type(schema).__name__}; give a JSON Schema, which is an object.")
        return schema


@click.command(epilog="`mlx-dgemma info` shows the checkpoint's own settings.")
@click.argument("prompt", required=False)
@files_option
@media_options
@audio_options
@click.option(
    "--tools", metavar="FILE.json", type=click.Path(exists=True, dir_okay=False), help="Tools that the model may call."
)
@click.option("--schema", type=SchemaType(), metavar="FILE.json|JSON", help="Constrain the answer to this JSON Schema.")
@click.option("--regex", metavar="PATTERN", help="Constrain the whole answer to this regular expression.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@output_options
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
    audios: tuple[str, ...],
    audio_model: str | None,
    tools: str | None,
    schema: dict | None,
    regex: str | None,
    as_json: bool,
    output: Output,
    verbose: bool,
    model: ModelChoice,
    system: str | None,
    **options: Any,
) -> None:
    """Answer one prompt.

    The prompt is an argument, files, or stdin. Files or stdin come first, then a blank line and the argument. Beside
    an argument stdin is read if it was piped or redirected to this command, but not if the loop or script around it
    has it too. "-", as PROMPT or FILE, always reads it; --image - reads a picture from it. What is said in audio files
    comes before all; with --audio no other prompt is needed.

    Each tool call is printed as a line: {"name": ..., "arguments": {...}}. --tools takes a JSON list of function
    declarations in OpenAI's format. --json prints {text, thinking, tool_calls, finish_reason, stats}. Ctrl-C keeps
    the finished blocks; with --json, finish_reason is then "interrupted" and stats is null.

    \b
    mlx-dgemma generate "Write JSON for: Anna is 31 years old and lives in Oslo."
    cat log.txt | mlx-dgemma generate --model FOLDER "What failed?"
    mlx-dgemma generate --model FOLDER --image photo.jpg "What is this?"
    mlx-dgemma generate --model FOLDER -f chapter.txt -f notes.txt "Summarise." --seed 7 --json
    """
    terminal, options = Terminal(), explicit_options(options)
    if [*files, *images, prompt].count("-") > 1:
        raise click.UsageError("- is given twice, but stdin can be read once.")
    output.check()
    sources = [read_stdin(terminal) if one == "-" else one for one in images]
    prompt = "" if audios and prompt is None and not files else prompt  # what is said may be all
    # `calls.start` may have read the prompt, which can hold stdin.
    text = read_prompt(prompt, files, terminal, taken="-" in images) if ctx.obj is None else ctx.obj
    asked: dict[str, Any] = {
        "tools": _read_tools(tools) if tools else None,
        "schema": schema,
        "regex": decode_argument(regex, "--regex"),
    }
    said = [hear(one, audio_model, terminal) for one in audios]
    messages = user_turn(text, said, sources, video, decode_argument(system, "--system"))
    engine, stream = find_task(model, terminal, "generate", messages, **asked, **options)
    ctx.exit(answer_prompt(engine, stream, terminal, options, as_json, verbose, output))


def _read_tools(path: str) -> list[dict]:
    """Read function declarations from a JSON file.

    Raises:
        DgemmaError: the file is not JSON, or not a list of declarations.
    """
    try:
        tools = json.loads(decode_utf8(Path(path).read_bytes(), path).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{path} is not JSON ({error}); give a list of function declarations.") from None
    if not isinstance(tools, list):
        raise DgemmaError(f"{path} holds {type(tools).__name__}; give a list of function declarations.")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise DgemmaError(
                f"{path} has no function declaration at position {i}; each should be "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
            )
    return tools
