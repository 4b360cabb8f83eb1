"""The same prompts through every mode of this model and through an autoregressive one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..decoding.events import Result
from ..decoding.options import CANVAS_OPTIONS, TOKEN_OPTIONS
from ..prompt.answer import read_answer
from .data import Example, text_of
from .evaluate import answer_text, calls_of, scorer_of, wilson
from .peer import Peer

if TYPE_CHECKING:
    from ..engine import Engine

MODES = ("diffusion", "causal", "speculative")
CANVAS_ALONE = (*CANVAS_OPTIONS, "exact", "fast")


@dataclass(frozen=True)
class Reply:
    """One answer of one contestant; times in seconds."""

    text: str  # tool calls are lines of JSON behind it
    score: float  # 0 to 1
    tokens: int
    seconds: float  # from the prompt on
    first_text: float  # until the first token or canvas is told
    peak_memory: int  # bytes
    finish_reason: str


@dataclass(frozen=True)
class Contestant:
    """A mode, or another model, and its answers in the order of the examples."""

    name: str
    replies: list[Reply]

    @property
    def right(self) -> float:
        """Sum of the scores."""
        return sum(one.score for one in self.replies)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share of right answers."""
        return wilson(self.right, len(self.replies))

    def figures(self) -> dict[str, float]:
        """Means and medians over the answers: what the table and the plots show."""
        replies, low_high = self.replies, self.interval
        seconds = sum(one.seconds for one in replies)
        return {
            "right": self.right,
            "of": len(replies),
            "share": self.right / len(replies),
            "low": low_high[0],
            "high": low_high[1],
            "seconds": seconds / len(replies),
            "first_text": statistics.median(one.first_text for one in replies),
            "tokens": sum(one.tokens for one in replies) / len(replies),
            "tokens_per_second": sum(one.tokens for one in replies) / seconds if seconds else 0.0,
            "peak_memory": max(one.peak_memory for one in replies),
        }


Watch = Callable[[str, Reply], None]


def answer_in_modes(
    engine: Engine,
    examples: Sequence[Example],
    metric: Any,
    modes: Sequence[str] = MODES,
    seed: int = 0,
    watch: Watch = lambda name, reply: None,
    **options: Any,
) -> list[Contestant]:
    """Answer every example alone in each mode.

    Args:
        engine: with the model.
        examples, metric, seed: as `evaluate` takes them.
        modes: of `GenerationOptions.mode`.
        watch: called with the mode and each answer.
        options: as `Engine.generate` takes them. A mode leaves out those that it does not know. Token by token the
            temperature is 0 unless it is given, as it is for the other model.
    """
    score, found = scorer_of(metric, examples), []
    for mode in modes:
        unknown = TOKEN_OPTIONS if mode == "diffusion" else CANVAS_ALONE
        known = {name: value for name, value in options.items() if name not in unknown}
        if mode in ("causal", "speculative"):
            known.setdefault("temperature", 0.0)
        replies = []
        for i, one in enumerate(examples):
            replies.append(_reply(engine, one, score, seed + i, mode=mode, **known))
            watch(mode, replies[-1])
        found.append(Contestant(mode, replies))
    return found


def _reply(engine: Engine, example: Example, score: Any, seed: int, **options: Any) -> Reply:
    thinking, tools = example.thinking, example.record.get("tools")
    result = engine.generate(example.chat[:-1], seed=seed, thinking=thinking, tools=tools, **options)
    stats = result.stats
    return Reply(
        answer_text(result.text, result.tool_calls),
        score(example, result),
        stats.generated_tokens,
        stats.seconds["total"],
        stats.time_to_first_block,
        stats.peak_memory_bytes,
        result.finish_reason,
    )


def answer_by_peer(
    name: str,
    examples: Sequence[Example],
    metric: Any,
    tokenizer: Any,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    watch: Watch = lambda name, reply: None,
) -> Contestant:
    """Answer every example by an autoregressive model, which is loaded for it and let go.

    Args:
        name: folder or Hub id.
        examples, metric, seed: as `evaluate` takes them.
        tokenizer: of this project's model, whose notation of thoughts and calls is read in the answers, too.
        max_tokens, temperature: of an answer.
        watch: called with the name and each answer.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    score, replies = scorer_of(metric, examples), []
    peer = Peer.load(name)
    for i, one in enumerate(examples):
        tools = one.record.get("tools")
        spoken = peer.answer(one.chat[:-1], tools, one.thinking, max_tokens, temperature, seed + i)
        read = read_answer(tokenizer, spoken.text, tools)
        stats: Any = None
        result = Result(read.text, read.thinking, read.tool_calls, [], spoken.finish_reason, stats)
        text = answer_text(read.text, read.tool_calls)
        replies.append(Reply(text, score(one, result), *spoken[1:]))
        watch(name, replies[-1])
    del peer
    mx.clear_cache()
    return Contestant(name, replies)


def questions(examples: Sequence[Example]) -> list[tuple[str, str, str]]:
    """(place, last question, expected answer) of each example."""
    found = []
    for one in examples:
        asked = text_of(one.chat[-2]) if len(one.chat) > 1 else ""
        found.append((one.where, asked, answer_text(text_of(one.chat[-1]), calls_of(one))))
    return found
