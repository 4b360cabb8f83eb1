"""What the commands share: options, loading, following an answer, reading prompts."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import PromptError, count
from .terminal import Terminal, details, segments, summary

if TYPE_CHECKING:
    from ..decoding.events import Result
    from ..engine import Engine


DEMO_NOTICE = (
    "This is the bundled demo of 6.7 M parameters, a toy. "
    "For the real model: mlx-dgemma convert -q google/diffusiongemma-26B-A4B-it, then --model mlx_model."
)
Command = Callable[..., Any]


def all_of(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, listed in this order."""
    return lambda command: reduce(lambda inner, one: one(inner), reversed(decorators), command)


model_option = click.option(
    "-m",
    "--model",
    metavar="PATH_OR_ID",
    envvar="MLX_DGEMMA_MODEL",
    show_default="$MLX_DGEMMA_MODEL, else the bundled demo",
    help="Checkpoint folder or Hub id.",
)
model_options = all_of(
    model_option,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        show_default="as stored; float32 on a CPU",
        help="Of activations and unquantized weights.",
    ),
    click.option("--ignore-memory", is_flag=True, help="Load even what does not seem to fit."),
)


adapter_option = click.option(
    "--adapter", metavar="PATH_OR_ID", help="LoRA or DoRA in PEFT's layout, to put into the model."
)


def number(name: str, low: float, help: str, default: str = "the checkpoint's") -> Callable[[Command], Command]:
    """An option of a number, at least `low`; whole where that is."""
    kind: Any = click.IntRange(min=low) if isinstance(low, int) else click.FloatRange(min=low)
    return click.option(name, type=kind, metavar="N" if isinstance(low, int) else "X", show_default=default, help=help)


sampler_options = all_of(
    number("--max-denoising-steps", 1, "Steps that a canvas may take."),
    number("--entropy-bound", 0.0, "Nats accepted at once; more is faster and riskier."),
    number("--t-min", 0.0, "Temperature at the last step."),
    number("--t-max", 0.0, "Temperature at the first step."),
    number("--stability-threshold", 0, "Steps without a change before a canvas settles."),
    number("--confidence-threshold", 0.0, "Mean nats below which a canvas settles."),
    number("--certainty-threshold", 0.0, "Nats that no position of a settled answer reaches.", "0.1, --fast 0.3"),
    number("--patience", 0, "Steps without a change that settle an answer; 0: never.", "2"),
    click.option("--fast", is_flag=True, default=None, help="Keep confident tokens for good: fewer steps."),
    number("--prefill-chunk", 1, "Prompt tokens encoded at once.", "512, or 1024 of a prompt beyond 4096"),
)
answer_options = all_of(
    click.option("--system", metavar="TEXT", help="System message."),
    number("--seed", 0, "The same seed gives the same text.", "drawn"),
    number("--max-tokens", 1, "Where the answer is cut."),
    click.option("--thinking/--no-thinking", default=False, show_default=True, help="Let the model think first."),
    click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; repeatable."),
    click.option("--exact", is_flag=True, default=None, help="Settle as Transformers does: slower, more memory."),
    sampler_options,
)


files_option = click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    multiple=True,
    help="Prompt from a UTF-8 file, - for stdin; repeatable.",
)


media_options = all_of(
    click.option(
        "--image",
        "images",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True),
        multiple=True,
        help="Picture, - for stdin; repeatable.",
    ),
    click.option(
        "--video", type=click.Path(exists=True), help="Video file (needs the extra video), or a folder of frames."
    ),
    number("--image-tokens", 1, "Tokens that a picture may take: 70, 140, 280, 560 or 1120."),
    number("--fps", 0.0, "Frames looked at in a second of video.", "1"),
    number("--max-frames", 1, "Frames looked at in a whole video."),
    click.option(
        "-v", "--verbose", is_flag=True, help="Tell on stderr the options in force, frames chosen, and statistics."
    ),
)


@dataclass
class Heard:
    """What came of an answer; without a result it was interrupted."""

    text: str = ""
    thinking: str = ""
    result: Result | None = None

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        result = self.result
        return {
            "text": self.text,
            "thinking": self.thinking,
            "tool_calls": result.tool_calls if result else [],
            "finish_reason": result.finish_reason if result else "interrupted",
            "stats": asdict(result.stats) if result else None,
        }


def load_engine(
    model: str | None, dtype: str | None, ignore_memory: bool, terminal: Terminal, adapter: str | None = None
) -> Engine:
    """Load a checkpoint, or the demo with a word about it, and an adapter."""
    if model is None:
        terminal.warn(DEMO_NOTICE)
    if not terminal.hints:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    terminal.draw([], f"loading {model or 'the demo'}")
    try:
        from ..engine import load

        engine = load(model, dtype, adapter=adapter, ignore_memory=ignore_memory)
    finally:
        terminal.erase()
    for note in engine.notes:
        terminal.hint(note)
    return engine


def listen(engine: Engine, stream: Callable[..., Any], terminal: Terminal, silent: bool = False) -> Heard:
    """Start an answer and follow it; `silent` keeps it from stdout. Ctrl-C ends it, warnings become lines."""
    from ..decoding.events import Block, Draft

    heard, blocks = Heard(), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        events = stream(drafts=terminal.live)
        try:
            terminal.draw([], "reading the prompt")
            for event in events:
                if isinstance(event, Draft):
                    canvas = segments(event, engine.tokenizer, engine.options.end_tokens)
                    terminal.draw(canvas, f"block {event.block + 1}, step {event.step}")
                elif isinstance(event, Block):
                    blocks += 1
                    heard.text, heard.thinking = heard.text + event.text, heard.thinking + event.thinking
                    terminal.hint(event.thinking)
                    terminal.say("" if silent else event.text)
                else:
                    heard.result = event.result
        except KeyboardInterrupt:
            terminal.interrupted()
        finally:
            events.close()
            terminal.erase()
    result = heard.result
    if not silent:
        calls = result.tool_calls if result else []
        if not heard.text.endswith("\n") and (heard.text or not calls):
            terminal.say("\n")
        for call in calls:
            terminal.say(json.dumps(call["function"], ensure_ascii=False) + "\n")
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        terminal.warn(f"Warning: {message}")
    if result is None:
        terminal.hint(f"Interrupted after {count(blocks, 'finished block')}.")
        return heard
    if result.finish_reason == "length":
        terminal.hint(f"Cut at {count(len(result.tokens), 'token')}; --max-tokens N makes room for more.")
    terminal.hint(summary(result.stats))
    return heard


def tell(engine: Engine, result: Result, options: dict[str, Any], terminal: Terminal) -> None:
    """What --verbose asks for."""
    known = {name: value for name, value in options.items() if name not in ("seed", "thinking")}
    told = details(result.stats, engine.options.override(**known))
    for line in [*engine.notes, *told][: None if not terminal.hints else -1]:  # a terminal had the summary
        terminal.warn(line)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Options that were set; the checkpoint decides the others."""
    stop = tuple(utf8(one, "--stop") for one in options.get("stop") or ()) or None
    return {name: value for name, value in {**options, "stop": stop}.items() if value is not None}


def read_prompt(argument: str | None, files: Sequence[str], piped: bool) -> str:
    """Files or piped stdin, then the argument, with blank lines between.

    Raises:
        PromptError: something is not UTF-8.
        click.UsageError: there is nothing to read.
    """
    if argument is None and not files and not piped:
        raise click.UsageError("There is no prompt: give it as an argument, with --file, or on stdin.")
    parts = []
    for name in files or (["-"] if piped else []):
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        parts.append(decode(data, "stdin" if name == "-" else name).removeprefix("\ufeff").rstrip())
    if argument is not None:
        parts.append(utf8(argument, "The prompt") or "")
    return "\n\n".join(part for part in parts if part.strip())


def decode(data: bytes, what: str) -> str:
    """Text as it is, byte order mark and line ends too.

    Raises:
        PromptError: not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{what} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; convert it, for example with iconv."
        ) from None


def utf8(text: str | None, what: str) -> str | None:
    """Text from the command line, where bytes that are not UTF-8 arrive as lone surrogates."""
    return text if text is None else decode(os.fsencode(text), what)
