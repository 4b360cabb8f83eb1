"""Options shared by the commands, and loading of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from ..desktop.user_config import default_model
from .calls.answers import tell_model
from .calls.texts import decode_argument
from .options.kinds import CanvasSize, IntegerRange, MediaPath, NumberRange
from .terminal import Terminal, told_warnings

if TYPE_CHECKING:
    from ..decoding.request import Request
    from ..engine import Engine
    from ..prompt.builder import PromptBuilder
    from ..prompt.opened import Opened
    from .local import Remote


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
            found.accepted = lambda: tell_model(self.name, found.notes, terminal)
        return found

    def open(self, terminal: Terminal) -> Opened:
        """The checkpoint without its weights: what is wrong with a request shows before they are read.

        Raises:
            CheckpointError: there is no such checkpoint or adapter, it is broken, or they do not fit.
        """
        terminal.draw([], f"opening {self.name or 'the demo'}")
        try:
            from ..prompt.opened import Opened

            folder = None
            if self.adapter is not None:
                from ..adapters import peft

                folder = peft.find(self.adapter)
            opened = Opened.of(self.name, folder)
            if folder is not None:
                peft.check(folder, opened.settings.shapes)
            return opened
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
        tell_model(self.name, engine.notes, terminal)
        return engine

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
        "0.3, --exact 0",
    ),
    number_option("--patience", 0, "Finish after N steps without a change; 0 disables.", "2, --exact 0"),
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


def explicit_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set; the checkpoint decides the others."""
    stop = tuple(decode_argument(one, "--stop") for one in options.get("stop") or ()) or None
    return {name: value for name, value in {**options, "stop": stop}.items() if value is not None}
