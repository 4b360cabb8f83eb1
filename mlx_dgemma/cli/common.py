"""Options shared by the commands, loading of the engine, streaming of answers, and reading of prompts."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from ..desktop.user_config import default_model
from ..errors import PromptError, count
from .options.kinds import CanvasSize, IntegerRange, MediaPath, NumberRange
from .terminal import Terminal, details, segments, summary, told_warnings

if TYPE_CHECKING:
    from ..decoding.events import Result
    from ..decoding.request import Request
    from ..engine import Engine
    from ..prompt.builder import PromptBuilder
    from ..prompt.opened import Opened
    from .local import Remote


DEMO_NOTICE = "This is the bundled demo of 6.7 M parameters, a toy. For the real model: mlx-dgemma setup."
Command = Callable[..., Any]


def combine(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine option decorators into one; `--help` lists them in this order."""
    return lambda command: reduce(lambda inner, one: one(inner), reversed(decorators), command)


model_option = click.option(
    "-m",
    "--model",
    metavar="PATH_OR_ID",
    envvar="MLX_DGEMMA_MODEL",
    default=default_model,
    show_default="$MLX_DGEMMA_MODEL, else setup's, else the bundled demo",
    help="Checkpoint folder or Hub id.",
)


@dataclass(frozen=True)
class ModelChoice:
    """The values of `model_options` and of `adapter_option`, if the command has it.

    Attributes:
        name: checkpoint folder or Hub id; None means the demo.
        dtype: type of activations and unquantized weights; None keeps the stored one.
        ignore_memory: whether to skip the check of memory.
        adapter: folder or Hub id of an adapter.
        compute_dtype: type of matrix products; None is that of activations.
        kv_bits: bits of the prefix in full layers; None does not quantize it.
        low_memory: whether to save memory at the price of time.
        server: whether a server that has loaded this may do the work.
    """

    name: str | None
    dtype: str | None
    ignore_memory: bool
    adapter: str | None = None
    compute_dtype: str | None = None
    kv_bits: int | None = None
    low_memory: bool = False
    server: bool = False

    @property
    def identity(self) -> str:
        """By which commands find a server that has loaded this."""
        from ..serving.rendezvous import identity

        return identity(self.name, self.adapter, self.dtype, self.compute_dtype, self.kv_bits)

    def find(self, terminal: Terminal) -> Remote | None:
        """The server on this machine that has loaded this, unless there is none or the user forbids it."""
        if not self.server:
            return None
        from .local import find_server

        terminal.draw([], "looking for a server")
        try:
            found = find_server(self.identity, terminal)
        finally:
            terminal.erase()
        if found is not None:
            found.accepted = lambda: self._tell(found.notes, terminal)
        return found

    def open(self, terminal: Terminal) -> Opened:
        """The checkpoint without its weights: what is wrong with a request shows before they are read.

        Raises:
            CheckpointError: there is no such checkpoint or adapter, or it is broken.
        """
        terminal.draw([], f"opening {self.name or 'the demo'}")
        try:
            from ..prompt.opened import Opened

            folder = None
            if self.adapter is not None:
                from ..adapters import peft

                folder = peft.find(self.adapter)
            return Opened.of(self.name, folder)
        finally:
            terminal.erase()

    def load(self, terminal: Terminal, opened: Opened | None = None, whole: bool = False) -> Engine:
        """Load checkpoint and adapter; of several ranks each its part, or the `whole`. The demo comes with a notice."""
        if not terminal.hints:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        terminal.draw([], f"loading {self.name or 'the demo'}")
        try:
            from ..ranks.start import load

            engine = load(
                self.name, whole=whole, dtype=self.dtype, adapter=self.adapter, ignore_memory=self.ignore_memory,
                compute_dtype=self.compute_dtype, kv_bits=self.kv_bits, low_memory=self.low_memory,
                tokenizer=opened and opened.tokenizer,
            )  # fmt: skip
        finally:
            terminal.erase()
        self._tell(engine.notes, terminal)
        return engine

    def _tell(self, notes: Sequence[str], terminal: Terminal) -> None:
        """Print what was chosen while loading, for people at a terminal, and that this is the demo."""
        if self.name is None:
            terminal.warn(DEMO_NOTICE)
        for note in notes:
            terminal.hint(note)

    def prepare(self, make: Callable[[PromptBuilder], Request], terminal: Terminal) -> tuple[Engine, Request]:
        """Make a request, and only then load the model that it is for.

        Args:
            make: the request of a builder; it raises whatever is wrong with it.
            terminal: for progress and warnings.
        """
        opened = self.open(terminal)
        with told_warnings(terminal):
            request = make(opened.builder)
        engine = self.load(terminal, opened)
        if request.mode_reason:  # the mode was chosen by reckoned costs; the machine's are known now
            request = make(engine.builder)
        return engine, request


def find_task(
    model: ModelChoice, terminal: Terminal, name: str, *arguments: Any, **keywords: Any
) -> tuple[Engine | Remote, Callable[..., Any]]:
    """Who does a task, "generate", "infill" or "edit", and what starts its events."""
    if (remote := model.find(terminal)) is not None:
        return remote, partial(remote.task, name, list(arguments), keywords)
    kind = "answer" if name == "generate" else name
    make = getattr(import_module(f"..tasks.{kind}", __package__), kind)
    engine, request = model.prepare(lambda builder: make(builder, *arguments, **keywords), terminal)
    return engine, partial(engine.run, request)


kv_bits_option = click.option(
    "--kv-bits",
    type=click.Choice(["8", "4"]),
    show_default="not quantized",
    help="Bits of the prompt's keys and values in full layers, which grow with it.",
)


def model_options(command: Command) -> Command:
    """Options that choose the model; the command gets them as `model: ModelChoice`."""

    @wraps(command)
    def with_model(
        *,
        model: str | None,
        dtype: str | None,
        compute_dtype: str | None,
        ignore_memory: bool,
        kv_bits: str | None,
        low_memory: bool,
        adapter: str | None = None,
        no_server: bool = True,
        **options: Any,
    ) -> Any:
        bits = None if kv_bits is None else int(kv_bits)
        choice = ModelChoice(model, dtype, ignore_memory, adapter, compute_dtype, bits, low_memory, not no_server)
        return command(model=choice, **options)

    return combine(
        model_option,
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            show_default="as stored; float32 on a CPU",
            help="Type of activations and unquantized weights.",
        ),
        click.option(
            "--compute-dtype",
            type=click.Choice(["float16"]),
            show_default="that of activations",
            help="Type of matrix products: float16 is faster on M1 and M2.",
        ),
        kv_bits_option,
        click.option(
            "--low-memory", is_flag=True, help="Save memory at the price of time: smaller chunks, less ahead."
        ),
        click.option("--ignore-memory", is_flag=True, help="Load the model even if it seems too large for memory."),
    )(with_model)


adapter_option = click.option(
    "--adapter", metavar="PATH_OR_ID", help="LoRA or DoRA adapter in PEFT format: folder or Hub id."
)


server_option = click.option(
    "--no-server",
    is_flag=True,
    envvar="MLX_DGEMMA_NO_SERVER",
    show_envvar=True,
    help="Load the model here, even if a server on this machine (`mlx-dgemma serve`) has loaded it.",
)


def number_option(name: str, low: float, help: str, default: str = "the checkpoint's") -> Callable[[Command], Command]:
    """An option for a number of at least `low`, which must be an integer if `low` is one."""
    kind: Any = IntegerRange(min=low) if isinstance(low, int) else NumberRange(min=low)
    return click.option(name, type=kind, metavar="N" if isinstance(low, int) else "X", show_default=default, help=help)


sampler_options = combine(
    number_option("--max-denoising-steps", 1, "Maximum number of denoising steps of a canvas."),
    number_option(
        "--entropy-bound", 0.0, "Nats; a higher value accepts more positions in one step: faster, less accurate."
    ),
    number_option("--entropy-rise", 0.0, "Share of the entropy bound that each step adds to it.", "2, --exact 0"),
    number_option("--t-min", 0.0, "Temperature at the last step."),
    number_option("--t-max", 0.0, "Temperature at the first step."),
    number_option("--stability-threshold", 0, "Number of previous steps that must have the same text."),
    number_option("--confidence-threshold", 0.0, "Finish a canvas when its mean entropy is below X nats."),
    number_option(
        "--certainty-threshold",
        0.0,
        "Finish when each position's entropy is below X nats; 0 disables.",
        "0.1, --fast 0.3",
    ),
    number_option("--patience", 0, "Finish after N steps without a change; 0 disables.", "2"),
    click.option(
        "--effort",
        type=click.Choice(["low", "medium", "high"]),
        show_default="medium",
        help="Steps for an answer: low is --fast, high keeps the entropy bound as it is.",
    ),
    click.option(
        "--canvas",
        type=CanvasSize(),
        metavar="auto|full|N",
        show_default="auto",
        help="Compute each canvas as far as the answer goes, or in full; N: begin with N tokens and double.",
    ),
    click.option("--fast", is_flag=True, default=None, help="Fix confident tokens for good: fewer steps."),
    click.option(
        "--mode",
        type=click.Choice(["diffusion", "causal", "speculative", "auto"]),
        show_default="diffusion",
        help="Canvas by canvas, token by token, the latter from drafts, or what is fastest here.",
    ),
    number_option("--temperature", 0.0, "Token by token: 0 takes the most probable token.", "1"),
    number_option("--top-p", 0.0, "Token by token: draw among the tokens with this share of the probability.", "1"),
    number_option("--top-k", 0, "Token by token: draw among N most probable tokens; 0 disables.", "0"),
    number_option("--min-p", 0.0, "Token by token: draw among tokens with X of the best one's probability.", "0"),
    number_option("--repetition-penalty", 0.0, "Token by token: above 1, earlier tokens become less probable.", "1"),
    number_option("--prefill-chunk", 1, "Prompt tokens encoded at once.", "512; 1024 for prompts above 4096"),
)
answer_options = combine(
    click.option("--system", metavar="TEXT", help="System message."),
    number_option("--seed", 0, "The same seed gives the same text.", "random"),
    number_option("--max-tokens", 1, "Maximum length of the answer."),
    click.option(
        "--thinking/--no-thinking", default=False, show_default=True, help="Let the model think before it answers."
    ),
    number_option("--thinking-budget", 0, "Tokens after which a thought is ended.", "none"),
    click.option("--stop", metavar="TEXT", multiple=True, help="End the answer before this text; repeatable."),
    click.option(
        "--exact", is_flag=True, default=None, help="Use the stopping rule of Transformers: slower, more memory."
    ),
    sampler_options,
)


files_option = click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    multiple=True,
    help="Read the prompt from a UTF-8 file, - for stdin; repeatable.",
)


media_options = combine(
    click.option(
        "--image",
        "images",
        type=MediaPath(exists=True, dir_okay=False, allow_dash=True),
        multiple=True,
        help="Picture file, - for stdin; repeatable.",
    ),
    click.option(
        "--video", type=MediaPath(exists=True), help="Video file (needs the extra video), or a folder of frames."
    ),
    number_option("--image-tokens", 1, "Maximum tokens of a picture: 70, 140, 280, 560 or 1120."),
    number_option("--fps", 0.0, "Frames used for a second of video.", "1"),
    number_option("--max-frames", 1, "Maximum number of frames of a video."),
    click.option("-v", "--verbose", is_flag=True, help="Print options, frame times and statistics to stderr."),
)


@dataclass
class StreamedAnswer:
    """An answer as far as it was streamed. Without a result it was interrupted."""

    text: str = ""
    thinking: str = ""
    result: Result | None = None

    @property
    def printed(self) -> str:
        """What stdout takes: the text with a line break at its end, and a line for each tool call."""
        calls = self.result.tool_calls if self.result else []
        ends = self.text.endswith("\n") or (calls and not self.text)
        lines = [json.dumps(call["function"], ensure_ascii=False) + "\n" for call in calls]
        return "".join([self.text, "" if ends else "\n", *lines])

    def as_dict(self) -> dict[str, Any]:
        """The object that --json prints."""
        result = self.result
        return {
            "text": self.text,
            "thinking": self.thinking,
            "tool_calls": result.tool_calls if result else [],
            "finish_reason": result.finish_reason if result else "interrupted",
            "stats": dict(vars(result.stats)) if result else None,
        }


def stream_answer(
    engine: Engine | Remote, stream: Callable[..., Any], terminal: Terminal, silent: bool = False
) -> StreamedAnswer:
    """Start an answer and print it while it is generated, unless `silent`; then print warnings. Ctrl-C stops it."""
    from .local import SeenBlock, SeenDraft, seen_events

    answer, blocks = StreamedAnswer(), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        events = stream(drafts=terminal.live)
        try:
            terminal.draw([], "reading the prompt")
            for event in seen_events(engine, events):
                if isinstance(event, SeenDraft):
                    terminal.draw(segments(event.pieces), f"block {event.block + 1}, step {event.step}")
                elif isinstance(event, SeenBlock):
                    blocks += 1
                    answer.text, answer.thinking = answer.text + event.text, answer.thinking + event.thinking
                    terminal.hint(event.thinking)
                    terminal.say("" if silent else event.text)
                else:
                    answer.result = event.result
        except KeyboardInterrupt:
            terminal.interrupted()
        finally:
            events.close()
            terminal.erase()
    result = answer.result
    if not silent:
        terminal.say(answer.printed.removeprefix(answer.text))
    noted = result.notes if result else ()
    for message in dict.fromkeys([*(str(warning.message) for warning in caught), *noted]):
        terminal.warn(f"Warning: {message}")
    if result is None:
        terminal.hint(f"Interrupted after {count(blocks, 'finished block')}.")
        return answer
    if not answer.text.strip() and not result.tool_calls:
        terminal.warn("Warning: The answer is empty; try another --seed or another prompt.")
    if result.finish_reason == "length":
        terminal.hint(f"Cut at {count(len(result.tokens), 'token')}; --max-tokens N makes room for more.")
    terminal.hint(summary(result.stats))
    return answer


def print_details(engine: Engine | Remote, result: Result, options: dict[str, Any], terminal: Terminal) -> None:
    """Print what --verbose asks for."""
    known = {name: value for name, value in options.items() if name not in ("seed", "thinking")}
    effective = engine.options if isinstance(engine.options, dict) else asdict(engine.options.override(**known))
    lines = details(result.stats, effective)
    for line in [*engine.notes, *lines][: None if not terminal.hints else -1]:  # terminals already show the summary
        terminal.warn(line)


def explicit_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set; the checkpoint decides the others."""
    stop = tuple(decode_argument(one, "--stop") for one in options.get("stop") or ()) or None
    return {name: value for name, value in {**options, "stop": stop}.items() if value is not None}


def decode_utf8(data: bytes, source: str) -> str:
    """Decode text unchanged, with any byte order mark and line ends. `source` names it in errors.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
            "convert it, for example with iconv."
        ) from None


def decode_argument(text: str | None, source: str) -> str | None:
    """Check text from the command line, where bytes that are not UTF-8 arrive as lone surrogates."""
    return text if text is None else decode_utf8(os.fsencode(text), source)
