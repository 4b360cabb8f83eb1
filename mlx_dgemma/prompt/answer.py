"""`Answer`: tokens become text, thinking and tool calls."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..constraints.spelling import Spelling


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at a text's end may be the beginning of a stop string."""
    pairs = ((one, n) for one in stop for n in range(1, min(len(one), len(text) + 1)))
    return max((n for one, n in pairs if text.endswith(one[:n])), default=0)


def preview(tokenizer: Any, tokens: Sequence[int], end_tokens: Sequence[int]) -> str:
    """The text of a canvas up to its first end token, without special tokens."""
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)


@dataclass
class Answer:
    """Reads blocks of tokens into text, thinking and tool calls, and knows when the text has ended.

    Attributes:
        text: what the user asked for, without any marker.
        thinking: what stood in the thinking channel.
        tool_calls: [{"id", "type": "function", "function": {"name", "arguments"}}].
        tokens: all tokens up to the end, end token left out.
        log_probs: their log-probabilities, in nats.
        finish_reason: "stop", "length" or "tool_calls", once the text has ended.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    skip: int = 0  # characters to leave out at the beginning
    thinks: bool = False  # the prompt ends in a thought that is open
    spelling: Spelling | None = None  # of a text that must be in a language
    text: str = ""
    thinking: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self):
        def first(tokens: Sequence[int] | None) -> int | None:
            return tokens[0] if tokens else None

        wrapper = self.tokenizer
        self._open = {first(wrapper.think_start_tokens): "thinking", first(wrapper.tool_call_start_tokens): "tool"}
        self._close = {first(wrapper.think_end_tokens): "thinking", first(wrapper.tool_call_end_tokens): "tool"}
        self._special = set(wrapper.all_special_ids) | set(self._open) | set(self._close)
        self._part = "thinking" if self.thinks else "text"
        self._inner: list[int] = []  # of the thinking or the call that is open
        self._text = wrapper.detokenizer
        self._given = 0, 0  # characters of text and thinking already taken

    @property
    def left(self) -> int:
        """Tokens that the text has room for."""
        return self.max_tokens - len(self.tokens)

    def feed(self, tokens: Sequence[int], log_probs: Sequence[float]) -> str | None:
        """Take a block and its log-probabilities; returns the finish reason once there is one."""
        for token, log_prob in zip(tokens, log_probs):
            if token in self.end_tokens:
                self.cut("stop")
            else:
                self.tokens.append(token)
                self.log_probs.append(log_prob)
                self._read(token)
                if self.finish_reason is None and len(self.tokens) == self.max_tokens:
                    self.cut("length")
            if self.finish_reason:
                return self.finish_reason
        return None

    def cut(self, reason: str) -> None:
        """End the text here; whatever was open is closed, and nothing is lost."""
        if self._part != "text":
            self._leave(closed=False)
        self._settle_text()
        if self.spelling is not None:
            self.spelling.finish()
        self._stop(final=True)
        if self.finish_reason is None:
            self.finish_reason = "tool_calls" if self.tool_calls and reason == "stop" else reason

    def take(self) -> tuple[str, str]:
        """(text, thinking) that is final and was not taken before.

        Text that may be the beginning of a stop string waits until that is known.
        """
        end = len(self.text)
        if self.finish_reason is None:
            end = min(end - held_back(self.text, self.stop), self._first_stop())
        text, thinking = self.text[self._given[0] : end], self.thinking[self._given[1] :]
        self._given = max(end, self._given[0]), len(self.thinking)
        return text, thinking

    def preview(self, tokens: Sequence[int]) -> str:
        """The text of a canvas that is not final, up to the first end token."""
        if self.spelling is None:
            return preview(self.tokenizer, tokens, self.end_tokens)
        end = next((i for i, token in enumerate(tokens) if token in self.end_tokens), len(tokens))
        return self.spelling.preview(tokens[:end])

    def _read(self, token: int) -> None:
        if self._part == "text" and token in self._open:
            self._settle_text()
            self._part = self._open[token]
        elif self._part != "text" and self._close.get(token) == self._part:
            self._leave(closed=True)
        elif self._part != "text":
            self._inner.append(token)
        elif self.spelling is not None:
            self._say(self.spelling.add(token))
        elif token not in self._special:
            self._text.add_token(token)
            self._say(self._text.last_segment)

    def _settle_text(self) -> None:
        self._text.finalize()
        self._say(self._text.last_segment)
        self._text.reset()

    def _say(self, text: str) -> None:
        if self.finish_reason is not None or not text:
            return
        text, self.skip = text[self.skip :], max(self.skip - len(text), 0)
        self.text += text
        self._stop()

    def _stop(self, final: bool = False) -> None:
        """End the text before the first stop string, unless one that begins earlier may still become complete."""
        at = self._first_stop()
        if self.finish_reason is not None or at == len(self.text):
            return
        if final or at <= len(self.text) - held_back(self.text, self.stop):
            self.text, self.finish_reason = self.text[:at], "stop"

    def _first_stop(self) -> int:
        """Where the first stop string begins; the text's end if there is none."""
        return min((at for one in self.stop if (at := self.text.find(one)) >= 0), default=len(self.text))

    def _leave(self, closed: bool) -> None:
        """Close the open part: thinking without its channel's name, a tool call parsed or kept as text."""
        part, self._part = self._part, "text"
        raw = self.tokenizer.decode(self._inner, skip_special_tokens=part == "thinking")
        self._inner = []
        if part == "thinking":
            thought = re.sub(r"^thought(\n|$)", "", raw).strip()
            self.thinking += ("\n" if self.thinking and thought else "") + thought
            return
        calls = self._parse(raw) if closed else None
        if calls is None:
            warnings.warn(f"The tool call {raw!r} is broken; it was kept as text.", stacklevel=2)
            self._say(raw)
            return
        for call in calls:
            self.tool_calls.append({"id": f"call_{len(self.tool_calls)}", "type": "function", "function": call})

    def _parse(self, raw: str) -> list[dict] | None:
        inner = raw.strip()
        if not inner.startswith("call:") or not inner.endswith("}"):
            return None  # the parser would overlook what stands around a call
        try:
            calls = self.tokenizer.tool_parser(inner)
            json.dumps(calls, ensure_ascii=False, allow_nan=False).encode()  # else nobody could be sent it
        except (ValueError, TypeError):
            return None
        return calls if isinstance(calls, list) else [calls]
