"""What a generation tells: `Draft`, `Block` and `Finished`, whose `Result` has the answer and its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mlx.core as mx


class ScoredToken(NamedTuple):
    """A token with its log-probability: in nats, by the processed logits of the step in which its canvas ended."""

    token: int
    log_prob: float


def scored(tokens: Sequence[int], log_probs: Sequence[float]) -> tuple[ScoredToken, ...]:
    """Tokens with their log-probabilities.

    Raises:
        ValueError: there are more of the one than of the other.
    """
    return tuple(ScoredToken(*pair) for pair in zip(tokens, log_probs, strict=True))


@dataclass(frozen=True)
class Draft:
    """A canvas after one denoising step. Arrays are [C]; reading them changes nothing."""

    block: int  # from 0
    step: int  # denoising steps done in this block
    tokens: mx.array  # int32, the most probable token of every position
    accepted: mx.array  # bool, positions kept for the next step
    entropy: mx.array  # float32, nats
    text: str = ""  # of the tokens before the first end token


@dataclass(frozen=True)
class Block:
    """A canvas that has settled, or in causal and speculative mode the tokens of one pass.

    Log-probabilities of the latter are by the model's own distribution, before temperature, cuts and constraints.
    """

    block: int  # from 0
    steps: int  # denoising steps it took
    tokens: tuple[int, ...]  # of a canvas all, what lies behind an end token included
    text: str = ""  # answer text that is new and final
    thinking: str = ""  # thinking text that is new and final
    log_probs: tuple[float, ...] = ()  # of the tokens, as in `ScoredToken`; none where they are not known

    def __post_init__(self) -> None:
        _ = self.scored

    @property
    def scored(self) -> tuple[ScoredToken, ...]:
        """Each token with its log-probability."""
        return scored(self.tokens, self.log_probs) if self.log_probs else ()


@dataclass(frozen=True)
class Stats:
    """What a generation took; times in seconds."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, taken from a session's prefix
    generated_tokens: int
    blocks: int
    denoising_steps: int
    canvas_positions: int  # positions denoised, summed over steps
    seconds: dict[str, float]  # load, prefill, denoise (all behind it), total (prefill and denoise)
    time_to_first_block: float
    tokens_per_second: float  # generated tokens over seconds["total"]
    peak_memory_bytes: int
    seed: int
    images: int = 0  # pictures and video frames in the prompt
    images_encoded: int = 0  # of them, run through the vision tower this time
    frame_seconds: tuple[float, ...] = ()  # times of the video frames in the prompt
    transcripts: tuple[str, ...] = ()  # texts in the prompt that stand for audio
    mode: str = "diffusion"  # how the text came: "diffusion", "causal" or "speculative"
    mode_reason: str = ""  # why, where the mode asked for was "auto"
    causal_passes: int = 0  # passes of the encoder behind the prompt, of one token or of a draft
    verify_passes: int = 0  # of these, passes that verified a draft
    drafted_tokens: int = 0  # tokens of these drafts
    accepted_tokens: int = 0  # of these, tokens that causal mode itself would have drawn


@dataclass(frozen=True)
class Result:
    """An answer. `tool_calls` entries are {"id", "type": "function", "function": {"name", "arguments"}}."""

    text: str
    thinking: str
    tool_calls: list[dict]
    tokens: list[int]
    finish_reason: str  # "stop", "length" or "tool_calls"
    stats: Stats
    log_probs: list[float] = field(default_factory=list)  # one for each of `tokens`, in nats, as in `Block`
    holes: dict[str, str] = field(default_factory=dict)  # what `Engine.fill` put into each
    notes: tuple[str, ...] = ()  # what is to be known of the answer, one sentence each, such as a call that is broken

    def __post_init__(self) -> None:
        _ = self.scored

    @property
    def scored(self) -> tuple[ScoredToken, ...]:
        """Each token with its log-probability."""
        return scored(self.tokens, self.log_probs) if self.log_probs else ()


@dataclass(frozen=True)
class Finished:
    """The last event of a generation."""

    result: Result


Event = Draft | Block | Finished
