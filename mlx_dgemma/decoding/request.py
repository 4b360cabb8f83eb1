"""`Request`: a prompt that is ready to be generated, and what has become of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from .control import Control
from .events import Result, Stats
from .options import GenerationOptions
from .session import PromptTokens, Session


class Reader(Protocol):
    """Reads a request's blocks into text and says when it has ended. A token and its log-probability stay together."""

    text: str
    thinking: str
    tool_calls: list[dict]
    finish_reason: str | None

    @property
    def tokens(self) -> list[int]:
        """Tokens of the answer so far, without the end token."""

    @property
    def log_probs(self) -> list[float]:
        """Their log-probabilities, in nats."""

    @property
    def left(self) -> int:
        """Tokens that the text has room for."""

    def close_thought(self, tokens: Sequence[int], log_probs: Sequence[float]) -> tuple[list[int], list[float]]:
        """A block and its log-probabilities, cut where a thought must end, with the token that closes it."""

    def feed(self, tokens: Sequence[int], log_probs: Sequence[float]) -> str | None:
        """Take a block and its log-probabilities; returns the finish reason once there is one."""

    def cut(self, reason: str) -> None:
        """End the text: no further block will come."""

    def take(self) -> tuple[str, str]:
        """(text, thinking) that is final and was not taken before."""

    def preview(self, tokens: Sequence[int]) -> str:
        """The text of a canvas that is not final."""


@dataclass(eq=False)
class Request:
    """A prompt that is ready to be generated. Generating uses it up.

    Attributes:
        prompt: what the model reads.
        seed: of every random draw.
        options: how to generate.
        reader: makes text of blocks.
        control: what is asked of the canvases, or None.
        postprocess: adds to the result what only the asker knows.
        notes: what is to be known of the answer, one sentence each; the reader adds to them.
        drafts: whether `Draft` events are wanted.
        mode_reason: why its mode was taken, where "auto" was asked for.
        likely: tokens that the text may well begin with: speculative mode's first draft.
        session: what prompt and blocks are encoded into.
    """

    prompt: PromptTokens
    seed: int
    options: GenerationOptions
    reader: Reader
    control: Control | None = None
    postprocess: Callable[[Result], Result] | None = None
    notes: list[str] = field(default_factory=list)
    drafts: bool = False
    mode_reason: str = ""
    likely: Sequence[int] = ()
    session: Session = field(init=False)
    # What has become of it.
    key: mx.array | None = None  # [2], of the draws of the blocks to come
    blocks: int = 0
    steps: int = 0
    positions: int = 0  # denoised, summed over steps
    passes: int = 0  # of the encoder behind the prompt
    verified: int = 0  # of these, with a draft
    drafted: int = 0  # tokens of these drafts
    accepted: int = 0  # tokens of these drafts that were taken
    started: float = 0.0  # seconds of a clock
    encoded: float = 0.0  # seconds of the same clock, when the prompt was encoded
    first_block: float = 0.0  # seconds since it started

    def result(self, load_seconds: float) -> Result:
        """What was generated; `load_seconds` is what loading the model took."""
        now, reader, session = time.perf_counter(), self.reader, self.session
        total = now - self.started
        seconds = {"load": load_seconds, "prefill": self.encoded - self.started, "denoise": now - self.encoded}
        tokens: dict[str, Any] = {
            "prompt_tokens": len(self.prompt.tokens),
            "reused_tokens": session.reused_tokens,
            "generated_tokens": len(reader.tokens),
        }
        stats = Stats(
            **tokens,
            blocks=self.blocks,
            denoising_steps=self.steps,
            canvas_positions=self.positions,
            seconds={**seconds, "total": total},
            time_to_first_block=self.first_block,
            tokens_per_second=len(reader.tokens) / total if total else 0.0,
            peak_memory_bytes=mx.get_peak_memory(),
            seed=self.seed,
            images=len(self.prompt.pictures),
            images_encoded=session.images_encoded,
            frame_seconds=tuple(self.prompt.frame_seconds),
            transcripts=tuple(self.prompt.transcripts),
            mode=self.options.mode,
            mode_reason=self.mode_reason,
            causal_passes=self.passes,
            verify_passes=self.verified,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )
        reason = reader.finish_reason or "length"
        told = reader.text, reader.thinking, reader.tool_calls, reader.tokens, reason, stats, reader.log_probs
        result = Result(*told, notes=tuple(self.notes))
        return self.postprocess(result) if self.postprocess else result
