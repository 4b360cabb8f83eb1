"""`load()` and `Engine`: a prompt becomes events, events become a result."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from . import memory
from .checkpoint import Checkpoint, build, find
from .config import ModelConfig
from .errors import CheckpointError, OptionError, PromptError
from .generate import Block, Draft, Finished, GenerationOptions, generate, prefill
from .images import Patches, digest, join, open_image, patchify
from .layers import on_cpu
from .model import DiffusionGemma
from .prefix import Prefix
from .prompt import Answer, Message, messages_of, parts_of, render
from .video import sample_frames, stamp

Prompt = str | Sequence[Message]
KEPT_PICTURES = 64  # whose soft tokens a conversation keeps, the newest
VIDEO = "<|video|>"  # Gemma 4's marker in chat templates; it never reaches the model


@dataclass(frozen=True)
class Stats:
    """What a generation took; times in seconds."""

    prompt_tokens: int
    reused_tokens: int  # of them, taken from a session's prefix
    generated_tokens: int
    blocks: int
    denoising_steps: int
    canvas_positions: int  # positions denoised, summed over steps
    seconds: dict[str, float]  # load, prefill, denoise (commits included), total (prefill and denoise)
    time_to_first_block: float
    tokens_per_second: float  # generated tokens over seconds["total"]
    peak_memory_bytes: int
    seed: int
    images: int = 0  # pictures and video frames in the prompt
    images_encoded: int = 0  # of them, run through the vision tower this time
    frame_seconds: tuple[float, ...] = ()  # times of the video frames in the prompt


@dataclass(frozen=True)
class Result:
    """An answer. `tool_calls` entries are {"id", "type": "function", "function": {"name", "arguments"}}."""

    text: str
    thinking: str
    tool_calls: list[dict]
    tokens: list[int]
    finish_reason: str  # "stop", "length" or "tool_calls"
    stats: Stats


class Session:
    """A conversation's prefix and pictures: a prompt that begins as the last one did encodes only what is new.

    Attributes:
        prefix: the keys and values held.
        held: what they are of: token ids, and for a placeholder its picture's digest.
        features: soft tokens of the pictures seen so far, by digest.
    """

    def __init__(self, prefix: Prefix):
        self.prefix = prefix
        self.held: list[int | str] = []
        self.features: dict[str, mx.array] = {}

    def reuse(self, wanted: list[int | str]) -> int:
        """Go back to what the prefix shares with a prompt; returns how many tokens that are."""
        pairs = enumerate(zip(self.held, wanted))
        shared = next((i for i, (mine, new) in pairs if mine != new), min(len(self.held), len(wanted)))
        count = self.prefix.rewind(shared)
        del self.held[count:]
        return count


@dataclass(frozen=True)
class _Picture:
    """A picture or video frame of a prompt."""

    digest: str  # of its pixels and its budget
    patches: Patches

    @property
    def tokens(self) -> int:
        return self.patches.tokens[0]


@dataclass
class _Row:
    """One prompt on its way through the loop."""

    tokens: list[int]
    held: list[int | str]  # as `Session.held`
    pictures: list[_Picture]
    times: list[float]  # of video frames, seconds
    seed: int
    answer: Answer
    reused: int = 0
    encoded: int = 0  # pictures
    blocks: int = 0
    steps: int = 0
    first_block: float = 0.0


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
        for event in self.stream(prompt, drafts=False, **arguments):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("a generation ends with Finished")

    def stream(
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
        session: Session | None = None,
        drafts: bool = True,
        **options: Any,
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
            options: any field of `GenerationOptions`.

        Yields:
            `Draft` per denoising step, `Block` per settled canvas, and `Finished` with the result.

        Raises:
            PromptError, OptionError: at once, before anything is computed.
        """
        effective = self.options.override(max_tokens=max_tokens, **options)
        messages = messages_of(prompt, system, images, video)
        row = self._row(messages, seed, effective, thinking, tools)
        return self._events([row], effective, session, drafts)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[int] | None = None,
        max_tokens: int | None = None,
        thinking: bool = False,
        tools: list[dict] | None = None,
        system: str | None = None,
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
        events = self._events(rows, effective, None, drafts=False)
        return [event.result for event in events if isinstance(event, Finished)]

    def _row(
        self,
        messages: list[Message],
        seed: int | None,
        options: GenerationOptions,
        thinking: bool,
        tools: list[dict] | None,
    ) -> _Row:
        if seed is None:
            seed = secrets.randbits(32)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise OptionError(f"seed is {seed!r}; it should be a whole number from 0 to 2**64 - 1.")
        pictures, shown, times = self._media(messages, options)
        image = self._marker(self.config.image_token_id)
        tokens = render(self.tokenizer, messages, tools, thinking, shown, (image, VIDEO))
        room = self.config.text.max_position_embeddings - self.config.canvas_length
        if len(tokens) > room:
            raise PromptError(
                f"The prompt has {len(tokens)} tokens, but the context leaves room for {room} "
                f"beside a canvas of {self.config.canvas_length}; shorten it."
            )
        answer = Answer(self.tokenizer, options.end_tokens, options.max_tokens, options.stop)
        digests = iter([picture.digest for picture in pictures for _ in range(picture.tokens)])
        placeholder = self.config.image_token_id
        held = [next(digests) if token == placeholder and pictures else token for token in tokens]
        return _Row(tokens, held, pictures, times, seed, answer)

    def _marker(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    def _media(
        self, messages: list[Message], options: GenerationOptions
    ) -> tuple[list[_Picture], list[tuple[str, str]], list[float]]:
        """A prompt's pictures, each part's marker with the placeholders in its place, and the frames' times."""
        pictures: list[_Picture] = []
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
            pictures.append(_Picture(f"{digest(picture)}/{budget}", patches))
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
        self, rows: list[_Row], options: GenerationOptions, session: Session | None, drafts: bool
    ) -> Iterator[Draft | Block | Finished]:
        mx.reset_peak_memory()
        started = time.perf_counter()
        with memory.wired_limit():
            prefix = self._encode(rows, options, session)
            encoded = time.perf_counter()
            history: list[int | str] = list(rows[0].held)
            try:
                for event in generate(self.model, prefix, [r.answer for r in rows], options, [r.seed for r in rows]):
                    row = rows[event.row]
                    if isinstance(event, Draft):
                        if drafts:
                            yield replace(event, text=self._draft_text(event.tokens, options))
                        continue
                    history += event.tokens
                    row.blocks, row.steps = row.blocks + 1, row.steps + event.steps
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

    def _encode(self, rows: list[_Row], options: GenerationOptions, session: Session | None) -> Prefix:
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

    def _look(self, row: _Row, known: dict[str, mx.array]) -> mx.array | None:
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

    def _result(self, row: _Row, seconds: dict[str, float]) -> Result:
        answer, total = row.answer, seconds["total"]
        stats = Stats(
            prompt_tokens=len(row.tokens),
            reused_tokens=row.reused,
            generated_tokens=len(answer.tokens),
            blocks=row.blocks,
            denoising_steps=row.steps,
            canvas_positions=row.steps * self.config.canvas_length,
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
