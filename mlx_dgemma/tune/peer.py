"""An autoregressive model beside this one: the same chats through mlx-lm, or mlx-vlm where that alone knows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from ..checkpoint.find import find
from ..errors import CheckpointError, DataError
from ..prompt.messages import Message, parts_of
from ..upstream import load_autoregressive, make_sampler, mlx_vlm, stream_generate


class Spoken(NamedTuple):
    """What an autoregressive model answered."""

    text: str  # with whatever markers it has
    tokens: int
    seconds: float
    first_text: float  # seconds until its first text
    peak_memory: int  # bytes
    finish_reason: str


@dataclass
class Peer:
    """A loaded autoregressive model.

    Attributes:
        name: path or Hub id.
        program: "mlx-lm" or "mlx-vlm".
    """

    name: str
    program: str
    _model: Any
    _tokenizer: Any  # of mlx-vlm the processor

    @classmethod
    def load(cls, name: str) -> Peer:
        """Load a folder or a Hub id.

        Raises:
            CheckpointError: there is none, or neither program can load it.
        """
        folder = find(name)
        try:
            model, tokenizer = load_autoregressive(str(folder))[:2]
            return cls(name, "mlx-lm", model, tokenizer)
        except Exception as error:  # a model that mlx-lm does not know, or whose files it cannot read
            reason, vlm = error, mlx_vlm()
        if vlm is None:
            raise CheckpointError(f"mlx-lm cannot load {name} ({reason}); give another model, or install mlx-vlm.")
        try:
            return cls(name, "mlx-vlm", *vlm.load(str(folder)))
        except Exception as error:
            raise CheckpointError(f"Neither mlx-lm ({reason}) nor mlx-vlm ({error}) can load {name}.") from None

    def answer(
        self,
        messages: list[Message],
        tools: list[dict] | None,
        thinking: bool,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> Spoken:
        """Answer a chat of texts, at temperature 0 with the most probable tokens."""
        mx.random.seed(seed)
        mx.reset_peak_memory()
        started, first, last, text = time.perf_counter(), 0.0, None, ""
        for last in self._pieces(self.prompt(messages, tools, thinking), max_tokens, temperature):
            text += last.text
            first = first or (time.perf_counter() - started if text else 0.0)
        taken = time.perf_counter() - started
        count, reason = (last.generation_tokens, last.finish_reason) if last is not None else (0, None)
        return Spoken(text, count, taken, first or taken, mx.get_peak_memory(), reason or "stop")

    def prompt(self, messages: list[Message], tools: list[dict] | None, thinking: bool) -> list[int]:
        """The chat by the model's own template; without one its texts, a line each.

        Raises:
            DataError: it has pictures or videos.
        """
        if parts_of(messages, "image", "video"):
            raise DataError("The data have pictures or videos, and a comparison is of texts alone; leave them out.")
        tokenizer = self._tokenizer.tokenizer if self.program == "mlx-vlm" else self._tokenizer
        plain = [_plain(message) for message in messages]
        if not tokenizer.chat_template:
            return list(tokenizer.encode("\n".join(message["content"] for message in plain) + "\n"))
        asked = {"tools": tools} if tools else {}
        text = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=True, enable_thinking=thinking, **asked
        )
        return list(tokenizer.encode(text, add_special_tokens=False))

    def _pieces(self, prompt: list[int], max_tokens: int, temperature: float) -> Iterator[Any]:
        if self.program == "mlx-lm":
            sampler = make_sampler(temp=temperature)
            return stream_generate(self._model, self._tokenizer, prompt, max_tokens, sampler=sampler)
        vlm: Any = mlx_vlm()
        inputs = {"input_ids": mx.array([prompt]), "max_tokens": max_tokens, "temperature": temperature}
        return vlm.stream_generate(self._model, self._tokenizer, "", **inputs)


def _plain(message: Message) -> dict[str, Any]:
    """A message whose content is one text, as every template takes it."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return {**message, "content": content}
