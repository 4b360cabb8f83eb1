"""`load()` and `Engine`: the public verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from .adapters.loading import load_model
from .checkpoint.folder import Checkpoint
from .checkpoint.together import open_together
from .checkpoint.tokenizer import load_tokenizer
from .decoding.costs import KnownCosts
from .decoding.events import Event, Finished, Result
from .decoding.loop import Loop
from .decoding.options import GenerationOptions
from .decoding.request import Request
from .decoding.session import Session
from .distributed.agreement import together
from .distributed.group import ALONE, Group
from .model import device
from .model.config import ModelConfig
from .model.diffusion_gemma import DiffusionGemma
from .prompt.answer import ReadAnswer, read_answer
from .prompt.builder import PromptBuilder
from .prompt.endings import own_options
from .prompt.messages import Message
from .tasks import answer, choose, edit, fill, infill
from .tasks.labels import Labels

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .tasks.answer import AnswerKeywords
    from .tasks.choose import ChooseKeywords
    from .tasks.edit import EditKeywords
    from .tasks.fill import FillKeywords, Holes
    from .tasks.infill import InfillKeywords

Prompt = str | Sequence[Message]
T = TypeVar("T")


@dataclass(repr=False)
class Engine:
    """A loaded checkpoint. Make one with `load`.

    Attributes:
        tokenizer: mlx-lm's wrapper around the checkpoint's tokenizer.
        options: the effective `GenerationOptions`, as the checkpoint sets them.
        notes: what was chosen while loading, one sentence each.
        load_seconds: what loading took.
        adapter: folder of the adapter that is in the model, or None.
        costs: called for what passes of the model take on this machine.
    """

    checkpoint: Checkpoint
    model: DiffusionGemma
    tokenizer: Any
    options: GenerationOptions
    notes: tuple[str, ...] = ()
    load_seconds: float = 0.0
    adapter: Path | None = None

    def __post_init__(self) -> None:
        self.costs = KnownCosts(self.model)

    def __getstate__(self) -> Any:
        raise TypeError("An Engine holds a model's weights, so it is not pickled; give its path, and load it there.")

    def __repr__(self) -> str:
        adapter = f", adapter={str(self.adapter)!r}" if self.adapter else ""
        return f"Engine({str(self.checkpoint.path)!r}, {self.model.dtype}{adapter})"

    @property
    def config(self) -> ModelConfig:
        """Sizes and special tokens of the model."""
        return self.model.config

    @cached_property
    def builder(self) -> PromptBuilder:
        """What makes requests of prompts for this checkpoint."""
        shared = self.options, self.checkpoint.processor.video_tokens, self.costs, self.model.group.draw_seed
        return PromptBuilder(self.tokenizer, self.config, *shared)

    def session(self) -> Session:
        """A conversation for turn after turn."""
        return Session(self.model)

    def loop(self) -> Loop:
        """What generates requests together."""
        return Loop(self.model, self.load_seconds, self.costs)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that computes with the model."""
        return function(*arguments)

    def generate(self, prompt: Prompt, *, session: Session | None = None, **keywords: Unpack[AnswerKeywords]) -> Result:
        """Answer a prompt.

        Args:
            prompt: a user's text, or chat messages with role and content.
            session: reuse and extend a conversation's prefix. One answer at a time uses a session.
            images: paths, bytes, PIL images, arrays or data URLs; they stand before a text prompt, or take
                the places of the messages' image parts in order.
            video: a file (needs the extra `video`), a folder of frames, or a list of them.
            seed: the same seed gives the same tokens; without one it is drawn and told in the statistics.
            thinking: let the model think first, where its template can.
            tools: function declarations in OpenAI's form.
            system: a system message to begin with.
            schema: a JSON Schema that the answer's text is valid for, always; `schema.SUPPORTED` lists the keywords.
            regex: a regular expression in `re`'s syntax that the answer's text matches as a whole, always.
            keywords: any field of `GenerationOptions`, such as `max_tokens`, at which the text is cut.

        Raises:
            PromptError: an empty, malformed or too long prompt.
            OptionError: an unknown option or a value outside its bounds; a session of another engine or in use.
            RangeError: the model computed inf or NaN.
        """
        return self._result(self.run(self.prepare(prompt, **keywords), session, drafts=False))

    def stream(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        drafts: bool = True,
        **keywords: Unpack[AnswerKeywords],
    ) -> Iterator[Event]:
        """Answer a prompt, event by event.

        Args:
            prompt, session, keywords: as `generate` takes them.
            drafts: yield a `Draft` after each step; the answer is the same without.

        Yields: `Draft` per denoising step, `Block` per settled canvas, and `Finished` with the result.
        Raises: PromptError, OptionError at once, before anything is computed.
        """
        if session is not None:
            session.check(self.model)
        return self.run(self.prepare(prompt, **keywords), session, drafts)

    def prepare(self, prompt: Prompt, **keywords: Unpack[AnswerKeywords]) -> Request:
        """A request for `run` or a `Scheduler`; takes what `generate` takes and raises the same."""
        return answer.answer(self.builder, prompt, **keywords)

    def run(self, request: Request, session: Session | None = None, drafts: bool = True) -> Iterator[Event]:
        """Generate what was prepared, event by event, as `stream` does."""
        request.drafts = drafts
        loop = self.loop()
        mx.reset_peak_memory()
        with device.wired_limit(self.model.low_memory), closing(loop):
            loop.add(request, session)
            request.session.rewinds = session is not None
            while loop.requests:
                for _, event in loop.step():
                    if isinstance(event, Exception):
                        raise event
                    yield event

    def generate_batch(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None, **keywords: Unpack[AnswerKeywords]
    ) -> list[Result]:
        """Answer several prompts together, each as `generate` would with its seed; takes and raises what that does."""
        requests = answer.answers(self.builder, prompts, seeds, **keywords)
        loop, results = self.loop(), {}
        features: dict[str, mx.array] = {}  # a picture in several prompts is encoded once
        mx.reset_peak_memory()
        with device.wired_limit(self.model.low_memory), closing(loop):
            for request in requests:
                loop.add(request)
                request.session.rewinds, request.session.features = False, features
            while loop.requests:
                for request, event in loop.step():
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Finished):
                        results[request] = event.result
        return [results[request] for request in requests]

    def choose(
        self, prompt: Prompt, labels: Labels | dict[str, Labels], **keywords: Unpack[ChooseKeywords]
    ) -> dict[Any, Any]:
        """How probable each label is as the answer, read in one denoising step.

        Args:
            prompt: as `generate` takes it.
            labels: texts, a range (its numbers are the keys), `bool` (True and False), or a dict of named questions.
            keywords: `images`, `video` and `system` as `generate` takes them, and its image_tokens, fps, max_frames
                and prefill_chunk; `answer`, a template that the answer begins with, such as "It is {}." or, with
                named questions, "{color} {shape}"; `seed` of the canvas's noise (0); `calibrate`, true to divide
                by what the labels get where nothing is asked.

        Returns:
            {label: probability}, in all 1; of named questions {name: {label: probability}}.

        Raises: PromptError, OptionError at once, before anything is computed.
        """
        asked = choose.ask(self.builder, prompt, labels, **keywords)
        return self.call(choose.compute, self.model, asked).probabilities

    def infill(self, prefix: str, suffix: str, **keywords: Unpack[InfillKeywords]) -> Result:
        """Fill a hole between two texts, which stay byte for byte: prefix + r.text + suffix is the whole.

        Args:
            prefix, suffix: the texts around the hole; without a suffix the prefix is continued until its end.
            prompt: a request before it, a text or messages, which is answered; None asks to fill the gap.
            context: texts that the request without a prompt shows before this one, such as other files.
            length: tokens of the hole, pieces of words at its ends included; without one the likely lengths up to
                `infill.LONGEST`, or `max_tokens` if that is less, are tried. A hole longer than a canvas is filled
                canvas by canvas, with a warning. Without a suffix it is the most tokens that are written.
            keywords: `seed` and all options but exact and stop, as in `generate`, whose errors it raises.
        """
        return self._result(self.run(infill.infill(self.builder, prefix, suffix, **keywords), drafts=False))

    def fill(self, template: str, holes: Holes, **keywords: Unpack[FillKeywords]) -> Result:
        """Fill a template's holes: the text is the template, with `r.holes` in place of the names in braces.

        Args:
            template: as for str.format, with a name in every pair of braces.
            holes: for each name a number of characters that it has at most, a list of texts, or a regular expression.
            prompt: a request before it; without one the model is asked to fill in the template.
            seed, keywords: as in `infill`.

        Raises: as `generate`; OptionError for a hole that only one of template and `holes` has.
        """
        return self._result(self.run(fill.fill(self.builder, template, holes, **keywords), drafts=False))

    def edit(self, text: str, instruction: str, **keywords: Unpack[EditKeywords]) -> Result:
        """Rewrite a text as an instruction says, beginning with the text itself; its line endings and blanks stay.

        Args:
            text: the draft.
            instruction: what to do with it.
            strength: the share of the draft that is noised at first, from 0 to 1.
            keywords: `seed` and all options but exact and stop, as in `generate`, whose errors it raises.
        """
        return self._result(self.run(edit.edit(self.builder, text, instruction, **keywords), drafts=False))

    def read(self, text: str, tools: list[dict[str, Any]] | None = None) -> ReadAnswer:
        """An answer that spells its markers, from wherever it came: its `text`, `thinking` and `tool_calls`.

        Args:
            text: the answer; "<|channel>thought" and its other markers stand in it as text.
            tools: function declarations in OpenAI's form; with them names and keys are known.

        Raises: PromptError where it has half of a surrogate pair.
        """
        return read_answer(self.tokenizer, text, tools)

    @staticmethod
    def _result(events: Iterator[Event]) -> Result:
        return next(event.result for event in events if isinstance(event, Finished))


def load(
    path: str | PathLike | None = None,
    dtype: str | None = None,
    *,
    adapter: str | PathLike | None = None,
    dequantize: bool | None = None,
    ignore_memory: bool = False,
    compute_dtype: str | None = None,
    kv_bits: int | None = None,
    low_memory: bool = False,
    tokenizer: Any = None,
    group: Group = ALONE,
) -> Engine:
    """Load a checkpoint: Hugging Face's layout, mlx-community's or our own.

    Args:
        path: a folder or a Hub id; None takes $MLX_DGEMMA_MODEL, else the bundled demo.
        dtype: "float32", "bfloat16", "float16" for activations and plain weights; None: as stored, on the CPU float32.
        adapter: a LoRA or DoRA in PEFT's layout, a folder or a Hub id.
        dequantize: unpack quantized weights; None does so on the CPU, where packed ones are slow, if they fit.
        ignore_memory: load even what does not seem to fit.
        compute_dtype: "float16" for matrix products, faster on M1 and M2; beyond its range lies a `RangeError`.
        kv_bits: 8 or 4 keeps the prefix so in full layers, whose keys and values grow with it; None: not quantized.
        low_memory: smaller chunks of a prompt, no step ahead and few freed buffers: less memory, slower.
        tokenizer: the checkpoint's, if it is loaded already.
        group: ranks that compute the model together (`distributed.group.init`); each makes the same calls.

    Raises:
        CheckpointError: nothing there, something broken, another model's; weights that do not fit `compute_dtype`.
        MemoryLimitError: the machine has too little memory. OptionError: an unknown dtype or `kv_bits`.
    """
    started = time.perf_counter()
    checkpoint = open_together(path, group)
    tokenizer = together(group, lambda: load_tokenizer(checkpoint) if tokenizer is None else tokenizer)
    choices = dtype, adapter, dequantize, ignore_memory, compute_dtype, kv_bits, low_memory, group
    model, folder, notes = load_model(checkpoint, *choices)
    options, more = own_options(checkpoint, tokenizer, model.config.text.vocab_size, folder)
    return Engine(checkpoint, model, tokenizer, options, (*notes, *more), time.perf_counter() - started, folder)
