"""What endpoints tell of a scheduler's events, read where alone that may be done: on the scheduler's thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..decoding.events import Block, Draft, Finished, Result

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class Done:
    """A result, and what only the tokenizer knows of it."""

    result: Result
    reasoning_tokens: int
    log_probs: list[dict[str, Any]]  # of the tokens of the text, as OpenAI writes them


class Reading:
    """Translates events for `follow`: a `Draft` into a list of its tokens, `Finished` into `Done`.

    Args:
        engine: whose tokenizer it takes.
        log_probs: whether `Done.log_probs` is filled.
    """

    def __init__(self, engine: Engine, log_probs: bool = False):
        self._tokenizer, self._ends, self._log_probs = engine.tokenizer, set(engine.options.end_tokens), log_probs

    def __call__(self, event: Draft | Block | Finished) -> Any:
        """One event."""
        if isinstance(event, Draft):
            return {"block": event.block, "step": event.step, "tokens": self._draft(event)}
        if isinstance(event, Finished):
            text = self._behind_thought(event.result)
            return Done(event.result, text, self._spelt(event.result, text) if self._log_probs else [])
        return event

    def _draft(self, draft: Draft) -> list[dict[str, Any]]:
        tokens: Any = draft.tokens.tolist()
        entropy: Any = draft.entropy.tolist()
        accepted: Any = draft.accepted.tolist()
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        return [
            {"text": text, "confidence": round(math.exp(-nats), 3), "accepted": kept}
            for text, nats, kept in zip(self._pieces(tokens[:end]), entropy, accepted)
        ]

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; a character of several tokens is the last one's."""
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

    def _behind_thought(self, result: Result) -> int:
        """How many tokens a thought takes at the beginning, its marks included."""
        opened, closed = self._tokenizer.think_start_tokens, self._tokenizer.think_end_tokens
        tokens = result.tokens
        if not opened or not closed or not (result.thinking or opened[0] in tokens):
            return 0
        return tokens.index(closed[0]) + 1 if closed[0] in tokens else len(tokens)

    def _spelt(self, result: Result, start: int) -> list[dict[str, Any]]:
        told, length = [], 0
        for piece, log_p in zip(self._pieces(result.tokens[start:]), result.log_probs[start:]):
            if length >= len(result.text):  # behind a stop string, or no text at all
                break
            length += len(piece)
            told.append({"token": piece, "logprob": log_p, "bytes": list(piece.encode()), "top_logprobs": []})
        return told


def usage(done: Sequence[Done]) -> dict[str, Any]:
    """What several answers to one prompt took, as OpenAI counts it."""
    prompt, new = done[0].result.stats.prompt_tokens, sum(len(one.result.tokens) for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": done[0].result.stats.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning_tokens for one in done)},
    }


def stats(done: Done) -> dict[str, Any]:
    """This model's own statistics."""
    return asdict(done.result.stats)
