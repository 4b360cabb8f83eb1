"""Answers that are not as they were asked for are generated again, under the schema that they missed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...constraints.schema.alternatives import Alternatives
from ...constraints.schema.flat import Part
from ...decoding.events import Result, Stats
from ...errors import OptionError
from ...prompt.answer import BROKEN
from ..events import FinishedAnswer

DEPTH = 16  # references that lead back to themselves which are followed in a value
PATTERNS = ("pattern", "patternProperties")
SUMMED = (
    "generated_tokens", "blocks", "denoising_steps", "canvas_positions", "causal_passes", "verify_passes",
    "drafted_tokens", "accepted_tokens",
)  # fmt: skip


def is_surely_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid by a JSON Schema. Patterns are not tried, since one may take for ever: False."""
    if _has_pattern(schema):
        return False
    try:
        return Alternatives(schema, DEPTH).is_valid(value, (Part(schema, "#", DEPTH),))
    except (OptionError, RecursionError, OverflowError):
        return False  # a schema that the retake refuses with a sentence


def is_valid_text(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that is valid by a schema."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return is_surely_valid(value, schema)


def is_unreadable(answer: FinishedAnswer) -> bool:
    """Whether an answer came to its end, and its call cannot be read."""
    result = answer.result
    broken = any(note.endswith(BROKEN) for note in result.notes)
    return broken and not result.tool_calls and result.finish_reason != "length"


def with_calls(answer: FinishedAnswer, takes: dict[int, FinishedAnswer]) -> FinishedAnswer:
    """An answer some of whose calls got new arguments, by the call's number."""
    calls = list(answer.result.tool_calls)
    for k, take in takes.items():
        function = {**calls[k]["function"], "arguments": json.loads(take.result.text)}
        calls[k] = {**calls[k], "function": function}
    result = _with_work(answer.result, [take.result for take in takes.values()])
    return replace(answer, result=replace(result, tool_calls=calls))


def with_call(answer: FinishedAnswer, take: FinishedAnswer, tools: Sequence[dict[str, Any]]) -> FinishedAnswer:
    """An answer whose call could not be read, with the one that was generated again."""
    value = json.loads(take.result.text)
    function = {"name": tools[0]["function"]["name"], "arguments": value} if len(tools) == 1 else value
    result = replace(
        _with_work(answer.result, [take.result]),
        text=answer.result.text.partition("call:")[0].rstrip(),
        tool_calls=[{"id": "call_0", "type": "function", "function": function}],
        finish_reason="tool_calls",
    )
    return replace(answer, result=result)


def with_text(answer: FinishedAnswer, take: FinishedAnswer) -> FinishedAnswer:
    """An answer whose text is another's."""
    result = _with_work(answer.result, [take.result])
    result = replace(result, text=take.result.text, finish_reason=take.result.finish_reason)
    return replace(answer, result=result, log_probs=take.log_probs)


def _with_work(result: Result, others: Sequence[Result]) -> Result:
    """A result that counts the tokens and steps of others as its own."""
    tokens, log_probs, stats = list(result.tokens), list(result.log_probs), result.stats
    for other in others:
        tokens, log_probs = tokens + other.tokens, log_probs + other.log_probs
        stats = _summed(stats, other.stats)
    return replace(result, tokens=tokens, log_probs=log_probs, stats=stats)


def _summed(first: Stats, second: Stats) -> Stats:
    seconds = {name: first.seconds.get(name, 0.0) + value for name, value in second.seconds.items()}
    seconds["load"] = first.seconds.get("load", 0.0)
    sums: dict[str, Any] = {name: getattr(first, name) + getattr(second, name) for name in SUMMED}
    rate = sums["generated_tokens"] / seconds["total"] if seconds["total"] else 0.0
    return replace(first, **sums, seconds=seconds, tokens_per_second=rate)


def _has_pattern(schema: Any) -> bool:
    if isinstance(schema, dict):
        return any(name in schema for name in PATTERNS) or any(map(_has_pattern, schema.values()))
    return isinstance(schema, list) and any(map(_has_pattern, schema))
