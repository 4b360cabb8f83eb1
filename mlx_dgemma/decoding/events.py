"""What a generation comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    pass


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
    log_probs: list[float] = field(default_factory=list)  # of `tokens`, in nats, as their last step's logits have them
    holes: dict[str, str] = field(default_factory=dict)  # what `Engine.fill` put into each


@dataclass(frozen=True)
class Draft:
    """A canvas after one denoising step. Arrays are [C]; reading them changes nothing."""

    block: int  # from 0
    step: int  # denoising steps done in this block
    tokens: mx.array  # int32, the most probable token of every position
    accepted: mx.array  # bool, positions kept for the next step
    entropy: mx.array  # float32, nats
    text: str = ""  # filled in by the engine


@dataclass(frozen=True)
class Block:
    """A canvas that settled."""

    block: int  # from 0
    steps: int  # denoising steps it took
    tokens: tuple[int, ...]  # the whole canvas, also what lies behind an end token
    text: str = ""  # answer text that is new and final (filled in by the engine)
    thinking: str = ""  # thinking text that is new and final
    log_probs: tuple[float, ...] = ()  # of the tokens, in nats, as the last step's processed logits have them


@dataclass(frozen=True)
class Finished:
    """The last event of a generation."""

    result: Result
