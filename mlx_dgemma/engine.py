"""`load()` and `Engine`: a prompt becomes events, events become a result."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from . import memory, verbs
from .canvas import Control
from .checkpoint import Checkpoint, build, find
from .choose import Labels, choose
from .config import ModelConfig
from .constrain import Language, Spelling
from .errors import CheckpointError, OptionError, PromptError
from .generate import Block, Draft, Finished, GenerationOptions, generate, prefill
from .images import digest, join, open_image, patchify
from .layers import on_cpu
from .model import DiffusionGemma
from .prefix import Prefix
from .prompt import Answer, Message, messages_of, parts_of, render
from .result import Result, Stats
from .session import Job, Picture, Row, Session
from .video import sample_frames, stamp

Prompt = str | Sequence[Message]
KEPT_LANGUAGES = 16  # of constraints, the last used
KEPT_PICTURES = 64  # whose soft tokens a conversation keeps, the newest
VIDEO = "<|video|>"  # Gemma 4's marker in chat templates; it never reaches the model


@dataclass
class Engine:
    """A loaded checkpoint. Make one with `load`.

    Attributes:
        tokenizer: mlx-lm's wrapper around the checkpoint's tokenizer.
        options: the effective `GenerationOptions`, as the checkpoint sets them.
        notes: what was chosen while loading, one sentence each.
    """

    checkpoint: Checkpoint
    model: DiffusionGemma
    tokenizer: Any
    options: GenerationOptions
    notes: tuple[str, ...] = ()
    load_seconds: float = 0.0
    _languages: dict[str, Language] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        """Sizes and special tokens of the model."""
        return self.model.config

    def session(self) -> Session:
        """A conversation to hand to `generate` and `stream` turn after turn."""
        return Session(self.model.new_prefix())

    def generate(self, prompt: Prompt, **arguments: Any) -> Result:
        """Answer a prompt; takes what `stream` takes.

        Returns:
            The whole answer.

        Raises:
            PromptError: an empty, malformed or too long prompt.
            OptionError: an unknown option or a value outside its bounds.
        """
        return self._last(self.stream(prompt, drafts=False, **arguments))

    def stream(
        self,
        prompt: Prompt,
        *,
        session: Session | None = None,
        drafts: bool = True,
        **arguments: Any,
    ) -> Iterator[Draft | Block | Finished]:
        """Answer a prompt, event by event.

        Args:
            prompt: a user's text, or chat messages with role and content.
            images: paths, bytes, PIL images, arrays or data URLs; they stand before a text prompt, or take
                the places of the messages' image parts in order.
            video: a file (needs the extra `video`), a folder of frames, or a list of them.
            seed: the same seed gives the same tokens; without one it is drawn and told in the statistics.
            max_tokens: the text is cut there.
            thinking: let the model think first, where its template can.
            tools: function declarations in OpenAI's form.
            system: a system message to begin with.
            session: reuse and extend a conversation's prefix.
            drafts: yield a `Draft` after each step; the answer is the same without.
            schema: a JSON Schema that the answer's text is valid for, always; `schema.SUPPORTED` lists the keywords.
            regex: a regular expression in `re`'s syntax that the answer's text matches as a whole, always.
            options: any field of `GenerationOptions`.

        Yields:
            `Draft` per denoising step, `Block` per settled canvas, and `Finished` with the result.

        Raises:
            PromptError, OptionError: at once, before anything is computed.
        """
        return self.run(self.prepare(prompt, **arguments), session, drafts)

    def prepare(
        self,
        prompt: Prompt,
        *,
        images: Sequence[Any] = (),
        video: Any = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        thinking: bool = False,
        tools: list[dict] | None = None,
        system: str | None = None,
        schema: dict | None = None,
        regex: str | None = None,
        **options: Any,
    ) -> Job:
        """What `stream` generates, ready for `run` or a `schedule.Scheduler`; takes the same and raises the same."""
        effective = self.options.override(max_tokens=max_tokens, **options)
        messages = messages_of(prompt, system, images, video)
        row = self._row(messages, seed, effective, thinking, tools)
        return Job(row, effective, verbs.constraint(self, [row], effective, schema, regex, thinking, tools))

    def run(self, job: Job, session: Session | None = None, drafts: bool = True) -> Iterator[Draft | Block | Finished]:
        """Generate what was prepared, event by event, as `stream` does."""
        for event in self._events([job.row], job.options, session, drafts, job.control):
            if isinstance(event, Finished) and job.refine:
                event = Finished(job.refine(event.result))
            yield event

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[int] | None = None,
        max_tokens: int | None = None,
        thinking: bool = False,
        tools: list[dict] | None = None,
        system: str | None = None,
        schema: dict | None = None,
        regex: str | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answer several prompts together, padded on the left; each as `generate` would with its seed.

        Raises:
            PromptError, OptionError: as `generate`; also when seeds and prompts differ in number.
        """
        if not prompts:
            raise PromptError("There are no prompts; give at least one.")
        if seeds is not None and len(seeds) != len(prompts):
            raise OptionError(f"There are {len(prompts)} prompts and {len(seeds or ())} seeds; give one seed a prompt.")
        effective = self.options.override(max_tokens=max_tokens, **options)
        rows = [
            self._row(messages_of(prompt, system), seeds[i] if seeds else None, effective, thinking, tools)
            for i, prompt in enumerate(prompts)
        ]
        control = verbs.constraint(self, rows, effective, schema, regex, thinking, tools)
        events = self._events(rows, effective, None, False, control)
        return [event.result for event in events if isinstance(event, Finished)]

    def choose(self, prompt: Prompt, labels: Labels | dict[str, Labels], **arguments: Any) -> dict[Any, Any]:
        """How probable each label is as the answer, read in one denoising step.

        Args:
            prompt: as `generate` takes it.
            labels: texts, a range (its numbers are the keys), `bool` (True and False), or a dict of named questions.
            arguments: `images`, `video` and `system` as `generate` takes them, and its image_tokens, fps, max_frames
                and prefill_chunk; `answer`, a template that the answer begins with, such as "It is {}." or, with
                named questions, "{color} {shape}"; `seed` of the canvas's noise (0); `calibrate`, true to divide
                by what the labels get where nothing is asked.

        Returns:
            {label: probability}, in all 1; of named questions {name: {label: probability}}.

        Raises:
            PromptError, OptionError: at once, before anything is computed.
        """
        return choose(self, prompt, labels, **arguments).probabilities

    def infill(self, prefix: str, suffix: str, **arguments: Any) -> Result:
        """Fill a hole between two texts, which stay byte for byte: prefix + r.text + suffix is the whole.

        Args:
            prefix: the text before the hole.
            suffix: the text behind it; without one the prefix is continued until its end.
            prompt: a request before it, a text or messages, to which prefix, hole and suffix are the answer; without
                one the model is asked to fill the gap.
            length: tokens of the hole, pieces of words at its ends included; without one the likely lengths up to
                `infill.LONGEST` are tried. A hole longer than a canvas is filled canvas by canvas, with a warning.
            seed: as in `stream`.
            options: any field of `GenerationOptions` but exact and stop.

        Raises:
            PromptError, OptionError: as `stream`.
        """
        return self._last(self.run(verbs.infill(self, prefix, suffix, **arguments), drafts=False))

    def fill(self, template: str, holes: verbs.Holes, **arguments: Any) -> Result:
        """Fill a template's holes: the text is the template, with `r.holes` in place of the names in braces.

        Args:
            template: as for str.format, with a name in every pair of braces.
            holes: for each name a number of characters that it has at most, a list of texts, or a regular expression.
            prompt: a request before it; without one the model is asked to fill in the template.
            seed: as in `stream`.
            options: any field of `GenerationOptions` but exact and stop.

        Raises:
            PromptError, OptionError: as `stream`; a hole that only one of template and `holes` has.
        """
        return self._last(self.run(verbs.fill(self, template, holes, **arguments), drafts=False))

    def edit(self, text: str, instruction: str, **arguments: Any) -> Result:
        """Rewrite a text as an instruction says, beginning with the text itself rather than with noise.

        Args:
            text: the draft.
            instruction: what to do with it.
            strength: the share of the draft that is noised at first, from 0 to 1 (0.5).
            seed: as in `stream`.
            options: any field of `GenerationOptions` but exact and stop.

        Raises:
            PromptError, OptionError: as `stream`.
        """
        return self._last(self.run(verbs.edit(self, text, instruction, **arguments), drafts=False))

    @staticmethod
    def _last(events: Iterator[Draft | Block | Finished]) -> Result:
        for event in events:
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("a generation ends with Finished")

    @cached_property
    def spelling(self) -> Spelling:
        """What the tokens of this tokenizer spell."""
        added = [token for token, one in self.tokenizer.added_tokens_decoder.items() if one.special]
        return Spelling(self.tokenizer, self.config.text.vocab_size, [*added, *self.options.end_tokens])

    @cached_property
    def turn_end(self) -> int:
        """The token that ends an answer in this checkpoint's chats."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return next((t for t in reversed(tokens) if t in self.options.end_tokens), self.options.end_tokens[0])

    def language(self, pattern: str, what: str) -> Language:
        """The language of a plain pattern, made once; the last few are kept."""
        found = self._languages.pop(pattern, None) or Language(pattern, self.spelling, what)
        self._languages[pattern] = found
        for oldest in list(self._languages)[:-KEPT_LANGUAGES]:
            del self._languages[oldest]
        return found

    def _extend(self, row: Row, tokens: Sequence[int], beside: int) -> None:
        """Let an answer begin with tokens; `beside` more are to have room on canvases."""
        row.tokens, row.held = [*row.tokens, *tokens], [*row.held, *tokens]
        self._check_room(len(row.tokens) + max(beside - self.config.canvas_length, 0))

    def _check_room(self, count: int) -> None:
        room = self.config.text.max_position_embeddings - self.config.canvas_length
        if count > room:
            raise PromptError(
                f"The prompt has {count} tokens, but the context leaves room for {room} "
                f"beside a canvas of {self.config.canvas_length}; shorten it."
            )

    def _row(
        self,
        messages: list[Message],
        seed: int | None,
        options: GenerationOptions,
        thinking: bool = False,
        tools: list[dict] | None = None,
    ) -> Row:
        if seed is None:
            seed = secrets.randbits(32)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise OptionError(f"seed is {seed!r}; it should be a whole number from 0 to 2**64 - 1.")
        pictures, shown, times = self._media(messages, options)
        image = self._marker(self.config.image_token_id)
        tokens = render(self.tokenizer, messages, tools, thinking, shown, (image, VIDEO))
        self._check_room(len(tokens))
        answer = Answer(self.tokenizer, options.end_tokens, options.max_tokens, options.stop)
        digests = iter([picture.digest for picture in pictures for _ in range(picture.tokens)])
        placeholder = self.config.image_token_id
        held = [next(digests) if token == placeholder and pictures else token for token in tokens]
        return Row(tokens, held, pictures, times, seed, answer)

    def _marker(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    def _media(
        self, messages: list[Message], options: GenerationOptions
    ) -> tuple[list[Picture], list[tuple[str, str]], list[float]]:
        """A prompt's pictures, each part's marker with the placeholders in its place, and the frames' times."""
        pictures: list[Picture] = []
        shown: list[tuple[str, str]] = []
        times: list[float] = []
        parts = parts_of(messages, "image", "video")
        if not parts:
            return pictures, shown, times
        if self.config.vision is None:
            raise PromptError("This checkpoint has no vision tower, so it cannot look at pictures; send text alone.")
        config, vision = self.config, self.config.vision
        image = self._marker(config.image_token_id)
        begin, end = self._marker(config.boi_token_id), self._marker(config.eoi_token_id)

        def span(picture: Image.Image, budget: int) -> str:
            patches = patchify([picture], budget, vision.patch_size, vision.pooling_kernel_size)
            pictures.append(Picture(f"{digest(picture)}/{budget}", patches))
            return begin + image * pictures[-1].tokens + end

        for part in parts:
            if part["type"] == "image":
                shown.append((image, span(open_image(part["image"]), options.image_tokens)))
                continue
            budget = self.checkpoint.processor.video_tokens
            frames = sample_frames(part["video"], options.fps, options.max_frames)
            spans = []
            for frame in frames:
                times.append(frame.seconds)
                spans.append(f"{stamp(frame.seconds)} {span(frame.image, budget)}")
            shown.append((VIDEO, " ".join(spans)))
        return pictures, shown, times

    def _events(
        self,
        rows: list[Row],
        options: GenerationOptions,
        session: Session | None,
        drafts: bool,
        control: Control | None = None,
    ) -> Iterator[Draft | Block | Finished]:
        mx.reset_peak_memory()
        started = time.perf_counter()
        with memory.wired_limit():
            prefix = self._encode(rows, options, session)
            encoded = time.perf_counter()
            history: list[int | str] = list(rows[0].held)
            try:
                if control is not None:
                    key = mx.random.key(rows[0].seed)
                    rows[0].positions += control.prepare(self.model, prefix, options, key)
                answers, seeds = [row.answer for row in rows], [row.seed for row in rows]
                for event in generate(self.model, prefix, answers, options, seeds, control):
                    row = rows[event.row]
                    if isinstance(event, Draft):
                        if drafts:
                            yield replace(event, text=self._draft_text(event.tokens, options))
                        continue
                    history += event.tokens
                    row.blocks, row.steps = row.blocks + 1, row.steps + event.steps
                    row.positions += event.steps * len(event.tokens)
                    row.first_block = row.first_block or time.perf_counter() - started
                    text, thinking = row.answer.take()
                    yield replace(event, text=text, thinking=thinking)
            finally:
                if session is not None:  # the prefix knows how much of what was generated it holds
                    session.held = history[: prefix.offset]
        ended = time.perf_counter()
        seconds = {
            "load": self.load_seconds,
            "prefill": encoded - started,
            "denoise": ended - encoded,
            "total": ended - started,
        }
        for row in rows:
            yield Finished(self._result(row, seconds))

    def _encode(self, rows: list[Row], options: GenerationOptions, session: Session | None) -> Prefix:
        length = max(len(row.tokens) for row in rows)
        if session is not None:
            prefix, row = session.prefix, rows[0]
            row.reused = session.reuse(row.held)
            new = np.array([row.tokens[row.reused :]], np.int32)
            prefill(self.model, prefix, new, options.prefill_chunk, features=[self._look(row, session.features)])
            for name in list(session.features)[:-KEPT_PICTURES]:
                del session.features[name]
            prefix.mark()
            return prefix
        canvas = self.config.canvas_length
        room = length + min(options.max_tokens, 4 * canvas) + canvas  # what is longer grows in steps
        prefix = self.model.new_prefix(len(rows), capacity=room)
        padded = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            padded[i, length - len(row.tokens) :] = row.tokens
            mask[i, length - len(row.tokens) :] = True
        known: dict[str, mx.array] = {}
        features = [self._look(row, known) for row in rows]
        prefill(self.model, prefix, padded, options.prefill_chunk, None if mask.all() else mask, features)
        return prefix

    def _look(self, row: Row, known: dict[str, mx.array]) -> mx.array | None:
        """Soft tokens [tokens, H] of the row's pictures that the prefix does not hold; `known` is filled."""
        before = sum(isinstance(one, str) for one in row.held[: row.reused])
        ends = np.cumsum([picture.tokens for picture in row.pictures])
        new = [picture for picture, end in zip(row.pictures, ends) if end > before]
        fresh = {picture.digest: picture for picture in new if picture.digest not in known}
        if fresh:
            joined = join([picture.patches for picture in fresh.values()])
            features = self.model.look((mx.array(joined.patches), mx.array(joined.positions)))
            cuts = np.cumsum([picture.tokens for picture in fresh.values()])[:-1]
            for name, part in zip(fresh, mx.split(features, cuts.tolist())):
                known[name] = part
        row.encoded = len(fresh)
        return mx.concatenate([known[picture.digest] for picture in new]) if new else None

    def _draft_text(self, tokens: mx.array, options: GenerationOptions) -> str:
        ids = np.asarray(tokens).tolist()
        end = next((i for i, token in enumerate(ids) if token in options.end_tokens), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def _result(self, row: Row, seconds: dict[str, float]) -> Result:
        answer, total = row.answer, seconds["total"]
        stats = Stats(
            prompt_tokens=len(row.tokens),
            reused_tokens=row.reused,
            generated_tokens=len(answer.tokens),
            blocks=row.blocks,
            denoising_steps=row.steps,
            canvas_positions=row.positions,
            seconds=seconds,
            time_to_first_block=row.first_block,
            tokens_per_second=len(answer.tokens) / total if total else 0.0,
            peak_memory_bytes=mx.get_peak_memory(),
            seed=row.seed,
            images=len(row.pictures),
            images_encoded=row.encoded,
            frame_seconds=tuple(row.times),
        )
        return Result(
            answer.text, answer.thinking, answer.tool_calls, answer.tokens, answer.finish_reason or "length", stats
        )


def load(
    path: str | PathLike | None = None,
    dtype: str | None = None,
    *,
    dequantize: bool | None = None,
    ignore_memory: bool = False,
) -> Engine:
    """Load a checkpoint: Hugging Face's layout, mlx-community's or our own.

    Args:
        path: a folder or a Hub id; None takes $MLX_DGEMMA_MODEL, else the bundled demo.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantized weights; None keeps
            what is stored, and takes float32 on the CPU.
        dequantize: unpack quantized weights; None does so on the CPU where they fit, since quantized
            matrix products are slow there.
        ignore_memory: load even what does not seem to fit.

    Raises:
        CheckpointError: nothing there, something broken, or another model.
        MemoryLimitError: the machine has too little memory.
        OptionError: an unknown dtype.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(find(path))
    notes = []
    dtype, dequantize = memory.settle(checkpoint, dtype, dequantize)
    if on_cpu():
        how = f"{'dequantized to' if dequantize else 'computed in'} {dtype}"
        how += ", the fastest there" if dtype == "float32" else ""
        if checkpoint.quantization and not dequantize:
            how = "kept packed, which is slow there"
        notes.append(f"CPU device: weights of {checkpoint.bits_per_weight:.1f} bits are {how}.")
    if not ignore_memory:
        memory.check(checkpoint, memory.need(checkpoint, memory.context(checkpoint), dtype, dequantize))
    tokenizer = _load_tokenizer(checkpoint)
    model = build(checkpoint, dtype, dequantize)
    options = GenerationOptions.of(checkpoint.generation, checkpoint.processor)
    return Engine(checkpoint, model, tokenizer, options, tuple(notes), time.perf_counter() - started)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    if not (checkpoint.path / "tokenizer.json").exists():
        raise CheckpointError(f"{checkpoint.path} has no tokenizer.json; download the whole checkpoint.")
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from tokenizers import Tokenizer

    try:
        tokenizer = load_tokenizer(checkpoint.path, eos_token_ids=list(checkpoint.generation.eos_token_ids))
        # Transformers' GemmaTokenizer has a pre-tokenizer of its own; the checkpoint was trained with its file's.
        stored = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
        tokenizer.backend_tokenizer.pre_tokenizer = stored.pre_tokenizer
        return tokenizer
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer in {checkpoint.path} cannot be read ({error}); download it again."
        ) from None
