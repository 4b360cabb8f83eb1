"""`load()` and `Engine`: a prompt becomes events, events become a result."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .adapters import deltas, peft
from .checkpoint import memory
from .checkpoint.build import build
from .checkpoint.find import find
from .checkpoint.folder import Checkpoint
from .constraints.language import Language
from .constraints.tokens import TokenBytes
from .decoding.events import Block, Draft, Finished, Result, Stats
from .decoding.loop import Loop
from .decoding.options import GenerationOptions
from .decoding.prefill import encoding
from .decoding.request import Job, Picture, Row
from .decoding.session import Session
from .errors import CheckpointError, OptionError, PromptError
from .model import device
from .model.config import ModelConfig
from .model.device import on_cpu
from .model.diffusion_gemma import DiffusionGemma
from .model.kv_cache import Prefix
from .model.patches import join
from .prompt.answer import Answer
from .prompt.images import digest, open_image, patchify
from .prompt.messages import Message, messages_of, parts_of
from .prompt.template import opens_thought, render
from .prompt.video import sample_frames, stamp
from .tasks import constrained, edit, fill, infill
from .tasks.choose import Labels, choose

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
        adapter: folder of the adapter that is in the model, or None.
    """

    checkpoint: Checkpoint
    model: DiffusionGemma
    tokenizer: Any
    options: GenerationOptions
    notes: tuple[str, ...] = ()
    load_seconds: float = 0.0
    adapter: Path | None = None
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
        return Job(row, effective, constrained.constraint(self, row, effective, schema, regex, thinking, tools))

    def run(self, job: Job, session: Session | None = None, drafts: bool = True) -> Iterator[Draft | Block | Finished]:
        """Generate what was prepared, event by event, as `stream` does."""
        loop, job.drafts = Loop(self.model), drafts
        mx.reset_peak_memory()
        with device.wired_limit():
            self.start(loop, job, session)
            while loop.jobs:
                for _, event in self.advance(loop):
                    if isinstance(event, Exception):
                        raise event
                    yield event

    def start(self, loop: Loop, job: Job, session: Session | None = None, branch: int = 0) -> None:
        """Let a job be generated by a loop, whose events `advance` tells.

        Args:
            loop: of this engine's model.
            job: from `prepare`.
            session: what its prompt and blocks are encoded into; it may hold the prompt's beginning.
            branch: position of the prompt of which a copy of the session is to be kept, as `job.branch`; 0: none.
        """
        if session is None:
            canvas = self.config.canvas_length  # what is longer than this room grows in steps
            room = len(job.row.tokens) + min(job.options.max_tokens, 4 * canvas) + canvas
            session = Session(self.model.new_prefix(capacity=room))
        job.session, job.row.started = session, time.perf_counter()
        loop.add(job, self._encode(job, branch))

    def advance(self, loop: Loop) -> Iterator[tuple[Job, Draft | Block | Finished | Exception]]:
        """One step of a loop: events of jobs, `Finished` or what it failed with as a job's last."""
        for job, event in loop.step():
            row, now = job.row, time.perf_counter()
            if event is None:
                result = self._result(row, now)
                yield job, Finished(job.refine(result) if job.refine else result)
            elif isinstance(event, Draft):
                yield job, replace(event, text=self._draft_text(event.tokens, job.options))
            elif isinstance(event, Block):
                row.first_block = row.first_block or now - row.started
                row.log_probs += event.log_probs
                text, thinking = row.answer.take()
                yield job, replace(event, text=text, thinking=thinking)
            else:
                yield job, event

    def generate_batch(
        self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None, **arguments: Any
    ) -> list[Result]:
        """Answer several prompts together, each as `generate` would with its seed; takes what `stream` takes.

        Raises:
            PromptError, OptionError: as `generate`; also when seeds and prompts differ in number.
        """
        if not prompts:
            raise PromptError("There are no prompts; give at least one.")
        if seeds is not None and len(seeds) != len(prompts):
            raise OptionError(f"There are {len(prompts)} prompts and {len(seeds or ())} seeds; give one seed a prompt.")
        jobs = [self.prepare(prompt, seed=seeds[i] if seeds else None, **arguments) for i, prompt in enumerate(prompts)]
        loop, results = Loop(self.model), {}
        looked: dict[str, mx.array] = {}
        mx.reset_peak_memory()
        with device.wired_limit():
            for job in jobs:
                self.start(loop, job)
                job.session.features = looked  # a picture in several prompts is looked at once
            while loop.jobs:
                for job, event in self.advance(loop):
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Finished):
                        results[job] = event.result
        return [results[job] for job in jobs]

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
        return self._last(self.run(infill.infill(self, prefix, suffix, **arguments), drafts=False))

    def fill(self, template: str, holes: fill.Holes, **arguments: Any) -> Result:
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
        return self._last(self.run(fill.fill(self, template, holes, **arguments), drafts=False))

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
        return self._last(self.run(edit.edit(self, text, instruction, **arguments), drafts=False))

    @staticmethod
    def _last(events: Iterator[Draft | Block | Finished]) -> Result:
        for event in events:
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("a generation ends with Finished")

    @cached_property
    def spelling(self) -> TokenBytes:
        """What the tokens of this tokenizer spell."""
        added = [token for token, one in self.tokenizer.added_tokens_decoder.items() if one.special]
        return TokenBytes(self.tokenizer, self.config.text.vocab_size, [*added, *self.options.end_tokens])

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
        row.tokens, row.cache_key = [*row.tokens, *tokens], [*row.cache_key, *tokens]
        self._check_room(len(row.tokens) + max(beside - self.config.canvas_length, 0))

    @cached_property
    def _longest_piece(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _check_length(self, messages: list[Message]) -> None:
        """Refuse texts that no tokens could make fit, before they are cut into tokens, which takes a second a MB."""
        texts = [message["content"] for message in messages if isinstance(message["content"], str)]
        count = sum(map(len, [*texts, *(part["text"] for part in parts_of(messages, "text"))]))
        room = self.config.text.max_position_embeddings - self.config.canvas_length
        if count > room * self._longest_piece:
            raise PromptError(
                f"The prompt has {count} characters, but the context leaves room for {room} tokens of at most "
                f"{self._longest_piece}; shorten it."
            )

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
        self._check_length(messages)
        tokens, pictures, times = self.tokens_of(messages, thinking, tools, options)
        self._check_room(len(tokens))
        begun = opens_thought(self.tokenizer, tokens)
        answer = Answer(self.tokenizer, options.end_tokens, options.max_tokens, options.stop, thinks=begun)
        digests = iter([picture.digest for picture in pictures for _ in range(picture.tokens)])
        placeholder = self.config.image_token_id
        held = [next(digests) if token == placeholder and pictures else token for token in tokens]
        return Row(tokens, held, pictures, times, seed, answer)

    def tokens_of(
        self,
        messages: list[Message],
        thinking: bool = False,
        tools: list[dict] | None = None,
        options: GenerationOptions | None = None,
    ) -> tuple[list[int], list[Picture], list[float]]:
        """A conversation as the model gets to see it, however long, ready for the assistant's answer.

        Args:
            messages: from `messages_of`.
            thinking, tools: as `stream` takes them.
            options: what pictures and videos may take; None takes the checkpoint's.

        Returns:
            Token ids, the generation prompt and a placeholder per soft token included; the pictures; and the times
            of video frames in seconds.

        Raises:
            PromptError: the template refuses the messages, or a picture cannot be read.
        """
        pictures, shown, times = self._media(messages, options or self.options)
        image = self._marker(self.config.image_token_id)
        return render(self.tokenizer, messages, tools, thinking, shown, (image, VIDEO)), pictures, times

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
        config, image = self.config, self._marker(self.config.image_token_id)
        begin, end = self._marker(config.boi_token_id), self._marker(config.eoi_token_id)

        def span(picture: Picture) -> str:
            pictures.append(picture)
            return begin + image * picture.tokens + end

        for part in parts:
            if part["type"] == "image":
                shown.append((image, span(self.load_image(part["image"], options.image_tokens))))
                continue
            budget = self.checkpoint.processor.video_tokens
            frames = sample_frames(part["video"], options.fps, options.max_frames)
            spans = []
            for frame in frames:
                times.append(frame.seconds)
                spans.append(f"{stamp(frame.seconds)} {span(self.load_image(frame.image, budget))}")
            shown.append((VIDEO, " ".join(spans)))
        return pictures, shown, times

    def load_image(self, source: Any, budget: int) -> Picture:
        """A picture that is ready to stand in a message's part, where its decoding would be in the way.

        Args:
            source: what `stream` takes, or such a picture itself; from any thread.
            budget: the most soft tokens, one of `images.BUDGETS`.

        Raises:
            PromptError: it cannot be read, or the checkpoint has no vision tower.
        """
        vision = self.config.vision
        if vision is None:
            raise PromptError("This checkpoint has no vision tower, so it cannot look at pictures; send text alone.")
        if isinstance(source, Picture):
            return source
        image = open_image(source)
        patches = patchify([image], budget, vision.patch_size, vision.pooling_kernel_size)
        return Picture(f"{digest(image)}/{budget}", patches)

    def encoded(self, row: Row, options: GenerationOptions) -> Prefix:
        """A prompt's prefix."""
        job = Job(row, options)
        job.session = Session(self.model.new_prefix(capacity=len(row.tokens) + self.config.canvas_length))
        for _ in self._encode(job):
            pass
        return job.session.prefix

    def _encode(self, job: Job, branch: int = 0) -> Iterator[None]:
        """Encode what a job's session does not hold of its prompt, a chunk at a time."""
        row, session = job.row, job.session
        row.reused = session.reuse(row.cache_key)
        features, taken = self._look(row, session.features), 0
        for name in list(session.features)[:-KEPT_PICTURES]:
            del session.features[name]
        for start, end in pairwise([row.reused, *([branch] if row.reused < branch < len(row.tokens) else []), None]):
            new = np.array([row.tokens[start:end]], np.int32)
            count = int((new == self.config.image_token_id).sum()) if features is not None else 0
            held = [features[taken : taken + count]] if features is not None and count else []
            taken += count
            for _ in encoding(self.model, session.prefix, new, job.options.prefill_chunk, features=held):
                session.cache_key = row.cache_key[: session.prefix.offset]
                yield
            if end is not None:
                job.branch = session.fork()
        session.prefix.set_rewind_point()
        row.encoded = time.perf_counter()

    def _look(self, row: Row, known: dict[str, mx.array]) -> mx.array | None:
        """Soft tokens [tokens, H] of the row's pictures that the prefix does not hold; `known` is filled."""
        before = sum(isinstance(one, str) for one in row.cache_key[: row.reused])
        ends = np.cumsum([picture.tokens for picture in row.pictures])
        new = [picture for picture, end in zip(row.pictures, ends) if end > before]
        fresh = {picture.digest: picture for picture in new if picture.digest not in known}
        if fresh:
            joined = join([picture.patches for picture in fresh.values()])
            features = self.model.encode_images((mx.array(joined.patches), mx.array(joined.positions)))
            cuts = np.cumsum([picture.tokens for picture in fresh.values()])[:-1]
            for name, part in zip(fresh, mx.split(features, cuts.tolist())):
                known[name] = part
        row.images_encoded = len(fresh)
        return mx.concatenate([known[picture.digest] for picture in new]) if new else None

    def _draft_text(self, tokens: mx.array, options: GenerationOptions) -> str:
        ids = np.asarray(tokens).tolist()
        end = next((i for i, token in enumerate(ids) if token in options.end_tokens), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def _result(self, row: Row, now: float) -> Result:
        answer, total = row.answer, now - row.started
        seconds = {
            "load": self.load_seconds,
            "prefill": row.encoded - row.started,
            "denoise": now - row.encoded,
            "total": total,
        }
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
            images_encoded=row.images_encoded,
            frame_seconds=tuple(row.times),
        )
        return Result(
            answer.text,
            answer.thinking,
            answer.tool_calls,
            answer.tokens,
            answer.finish_reason or "length",
            stats,
            row.log_probs[: len(answer.tokens)],
        )


def load(
    path: str | PathLike | None = None,
    dtype: str | None = None,
    *,
    adapter: str | PathLike | None = None,
    dequantize: bool | None = None,
    ignore_memory: bool = False,
) -> Engine:
    """Load a checkpoint: Hugging Face's layout, mlx-community's or our own.

    Args:
        path: a folder or a Hub id; None takes $MLX_DGEMMA_MODEL, else the bundled demo.
        dtype: "float32", "bfloat16" or "float16" for activations and unquantized weights; None keeps
            what is stored, and takes float32 on the CPU.
        adapter: a LoRA or DoRA in PEFT's layout, a folder or a Hub id, to put into the model.
        dequantize: unpack quantized weights; None does so on the CPU where they fit, since quantized
            matrix products are slow there.
        ignore_memory: load even what does not seem to fit.

    Raises:
        CheckpointError: nothing there, something broken, or another model; an adapter of another model.
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
    folder = None if adapter is None else peft.find(adapter)
    read = None if folder is None else peft.read(folder, checkpoint.shapes)
    if not ignore_memory:
        needed = memory.need(checkpoint, memory.context(checkpoint), dtype, dequantize)
        memory.check(checkpoint, replace(needed, weights=needed.weights + (read.nbytes if read else 0)))
    tokenizer = _load_tokenizer(checkpoint)
    model = build(checkpoint, dtype, dequantize)
    if read is not None:
        deltas.apply(model, read)
        modes = "both modes alike" if read.shared else "encoder and decoder differently"
        notes.append(f"The adapter {folder} changes {len(read.changes)} modules, {modes}.")
    options = GenerationOptions.of(checkpoint.generation, checkpoint.processor)
    return Engine(checkpoint, model, tokenizer, options, tuple(notes), time.perf_counter() - started, folder)


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
