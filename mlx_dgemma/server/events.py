"""Scheduler events as JSON values, and the token counts and statistics of finished answers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..decoding.events import Block, Draft, Finished, Result

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class FinishedAnswer:
    """A result with the values that need the tokenizer.

    Attributes:
        result: the engine's result.
        reasoning_tokens: number of tokens of the thought, its markers included.
        log_probs: log-probabilities of the text's tokens, in OpenAI's format.
    """

    result: Result
    reasoning_tokens: int
    log_probs: list[dict[str, Any]]


class EventTranslator:
    """Translates events for `follow`: `Draft` into a JSON object, `Finished` into `FinishedAnswer`.

    It reads arrays and uses the tokenizer, so only the scheduler's thread may call it.

    Args:
        engine: provides the tokenizer and the end tokens.
        log_probs: whether to fill `FinishedAnswer.log_probs`.
        top: whether each token stands among its `top_logprobs`, where it is alone: no other's is known.
    """

    def __init__(self, engine: Engine, log_probs: bool = False, top: bool = False):
        self._tokenizer, self._log_probs, self._top = engine.tokenizer, log_probs, top
        self._end_tokens = set(engine.options.end_tokens)

    def __call__(self, event: Draft | Block | Finished) -> Any:
        """Translate one event."""
        if isinstance(event, Draft):
            return {"block": event.block, "step": event.step, "tokens": self._draft_tokens(event)}
        if isinstance(event, Finished):
            start = self._reasoning_tokens(event.result)
            return FinishedAnswer(
                event.result, start, self._token_log_probs(event.result, start) if self._log_probs else []
            )
        return event

    def _draft_tokens(self, draft: Draft) -> list[dict[str, Any]]:
        tokens: Any = draft.tokens.tolist()
        entropy: Any = draft.entropy.tolist()
        accepted: Any = draft.accepted.tolist()
        end = next((i for i, token in enumerate(tokens) if token in self._end_tokens), len(tokens))
        return [
            {"text": text, "confidence": round(math.exp(-nats), 3), "accepted": is_accepted}
            for text, nats, is_accepted in zip(self._pieces(tokens[:end]), entropy, accepted)
        ]

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token. A character that takes several tokens belongs to the last of them."""
        reader, special = self._tokenizer.detokenizer, set(self._tokenizer.all_special_ids)
        pieces = []
        for token in tokens:
            if token not in special:
                reader.add_token(token)
            pieces.append("" if token in special else reader.last_segment)
        reader.finalize()
        if pieces:
            pieces[-1] += reader.last_segment
        return pieces

    def _reasoning_tokens(self, result: Result) -> int:
        """Number of tokens of the thought that begins an answer, its markers included."""
        opened, closed = self._tokenizer.think_start_tokens, self._tokenizer.think_end_tokens
        tokens = result.tokens
        if not opened or not closed or not (result.thinking or opened[0] in tokens):
            return 0
        return tokens.index(closed[0]) + 1 if closed[0] in tokens else len(tokens)

    def _token_log_probs(self, result: Result, start: int) -> list[dict[str, Any]]:
        entries, length = [], 0
        for piece, log_p in zip(self._pieces(result.tokens[start:]), result.log_probs[start:]):
            if length >= len(result.text):  # the rest is behind a stop string
                break
            length += len(piece)
            entry = {"token": piece, "logprob": log_p, "bytes": list(piece.encode())}
            entries.append({**entry, "top_logprobs": [entry] if self._top else []})
        return entries


async def collect_answers(events: AsyncIterator[tuple[int, Any]]) -> list[FinishedAnswer]:
    """Wait for all answers of `follow_all`, in the order of their indices."""
    answers = {i: event async for i, event in events if isinstance(event, FinishedAnswer)}
    return [answers[i] for i in sorted(answers)]


def usage(answers: Sequence[FinishedAnswer]) -> dict[str, Any]:
    """Token counts of all answers to one prompt, in OpenAI's format."""
    prompt_tokens = answers[0].result.stats.prompt_tokens
    completion_tokens = sum(len(one.result.tokens) for one in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answers[0].result.stats.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning_tokens for one in answers)},
    }


def stats(answer: FinishedAnswer) -> dict[str, Any]:
    """Statistics of one answer, an extension of OpenAI's format."""
    return asdict(answer.result.stats)


def usage_and_stats(answers: Sequence[FinishedAnswer]) -> dict[str, Any]:
    """The `usage` and `stats` of a response body; several answers have a list of statistics."""
    each = [stats(one) for one in answers]
    return {"usage": usage(answers), "stats": each[0] if len(each) == 1 else each}
