"""Events of Anthropic's Messages API: generated text becomes content blocks."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

MessageEvent = dict[str, Any]
EMPTY: dict[str, MessageEvent] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class MessageBuilder:
    """Builds a message from generated text. Every method yields events in Anthropic's order.

    Args:
        model: the served model's name.
        shows_thinking: whether the text of a thought is sent.
        more: further fields of the message.

    Attributes:
        message: the message so far.
    """

    def __init__(self, model: str, shows_thinking: bool, **more: Any):
        self._content: list[dict[str, Any]] = []
        self.message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
            **more,
        }
        self._shows_thinking, self._open = shows_thinking, False

    def start(self, usage: dict[str, Any]) -> Iterator[MessageEvent]:
        """The request was accepted."""
        self.message["usage"] = usage
        yield {"type": "message_start", "message": {**self.message, "content": []}}
        yield {"type": "ping"}

    def append(self, thinking: str, text: str) -> Iterator[MessageEvent]:
        """Add generated text."""
        for kind, new in (("thinking", thinking), ("text", text)):
            if not new:
                continue
            if not self._open or self._content[-1]["type"] != kind:
                yield from self._close()
                yield self._begin(EMPTY[kind])
                self._open = True
            if kind == "text" or self._shows_thinking:
                self._content[-1][kind] += new
                yield self._delta(f"{kind}_delta", **{kind: new})

    def finish(self, calls: list[dict[str, Any]], **end: Any) -> Iterator[MessageEvent]:
        """The generation finished.

        Args:
            calls: blocks of type tool_use.
            end: `stop_reason`, `stop_sequence`, `usage` and further fields of the message.
        """
        if not self._content and not calls:
            yield self._begin(EMPTY["text"])
            self._open = True
        yield from self._close()
        for call in calls:
            yield self._begin({**call, "input": {}})
            yield self._delta("input_json_delta", partial_json=json.dumps(call["input"], ensure_ascii=False))
            self._content[-1] = call
            yield self._stop()
        self.message.update(end)
        delta = {name: end.pop(name) for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, **end}
        yield {"type": "message_stop"}

    def _close(self) -> Iterator[MessageEvent]:
        """End the block to which text was added, if there is one."""
        if self._open:
            if self._content[-1]["type"] == "thinking":
                yield self._delta("signature_delta", signature="")
            yield self._stop()
        self._open = False

    def _begin(self, block: dict[str, Any]) -> MessageEvent:
        self._content.append(dict(block))
        return {"type": "content_block_start", "index": len(self._content) - 1, "content_block": block}

    def _delta(self, kind: str, **content: str) -> MessageEvent:
        return {
            "type": "content_block_delta",
            "index": len(self._content) - 1,
            "delta": {"type": kind, **content},
        }

    def _stop(self) -> MessageEvent:
        return {"type": "content_block_stop", "index": len(self._content) - 1}
