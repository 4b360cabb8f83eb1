"""Prompts in, answers out: the chat template, and the markers of thinking and tool calls."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import PromptError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


def messages_of(
    prompt: str | Sequence[Message], system: str | None = None, images: Sequence[Any] = (), video: Any = None
) -> list[Message]:
    """Chat messages as the template takes them, every picture and video in its place.

    Args:
        prompt: a user's text, or messages with role and content; an assistant's `tool_calls` may carry
            their arguments as JSON text, its thinking stands in `reasoning_content`. Parts of a content
            are {"type": "text", "text"}, {"type": "image"} or {"type": "video"}; a part may carry its
            own source under "image", "video" or, as OpenAI writes it, {"image_url": {"url"}}.
        system: a system message to begin with.
        images: sources for the image parts that carry none; a text prompt is put behind them.
        video: the same for a video part.

    Raises:
        PromptError: an empty prompt, an unknown role, a message that is none, audio, or parts and
            sources that differ in number.
    """
    if not isinstance(images, (list, tuple)):  # a single path would be taken letter by letter
        raise PromptError(f"images is of type {type(images).__name__}; give a list of pictures.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("The prompt is empty; say what you want.")
        parts: list[Message] = [{"type": "image"} for _ in images]
        parts += [] if video is None else [{"type": "video"}]
        text = {"type": "text", "text": prompt}
        messages: list[Message] = [{"role": "user", "content": [*parts, text] if parts else prompt}]
    else:
        messages = _checked(prompt)
    for kind, sources in (("image", list(images)), ("video", [] if video is None else [video])):
        open_parts = [part for part in parts_of(messages, kind) if kind not in part]
        if len(open_parts) != len(sources):
            raise PromptError(
                f"The messages have {len(open_parts)} {kind} placeholders without a source, "
                f"and {len(sources)} {kind}s are given; they must agree."
            )
        for part, source in zip(open_parts, sources):
            part[kind] = source
    if system:
        if messages[0]["role"] in ("system", "developer"):
            raise PromptError("There are two system messages: one in the messages and one beside them; give one.")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def parts_of(messages: Sequence[Message], *kinds: str) -> list[Message]:
    """The parts of these kinds in all messages, in their order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part["type"] in kinds]


def _checked(prompt: Sequence[Message]) -> list[Message]:
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise PromptError(f"The prompt is {prompt!r}; give a text or a list of messages.")
    messages, called = [], {}
    for i, given in enumerate(prompt):
        role = given.get("role") if isinstance(given, dict) else None
        if role not in ROLES:
            raise PromptError(f"Message {i} has the role {role!r}; it should be one of {', '.join(ROLES)}.")
        if i and role in ("system", "developer"):
            raise PromptError(f"Message {i} is a {role} message, and templates take only the first; put it there.")
        message = dict(given)
        if calls := message.get("tool_calls"):
            if not isinstance(calls, (list, tuple)):
                raise PromptError(f"Message {i} has the tool_calls {calls!r}; it should be a list of calls.")
            message["tool_calls"] = calls = [_call(i, call) for call in calls]
            called.update({call.get("id"): call["function"]["name"] for call in calls})
        message["content"] = _content(i, message)
        if role == "tool" and not message.get("name"):
            key = message.get("tool_call_id")
            message["name"] = called.get(key) if isinstance(key, str) else None
        messages.append(message)
    return messages


def _content(i: int, message: Message) -> Any:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        if not content.strip() and message["role"] == "user":
            raise PromptError(f"Message {i} is empty; say what you want.")
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise PromptError(f"Message {i} has the content {content!r}; it should be a text or a list of parts.")
    return [_part(i, part) for part in content]


def _part(i: int, part: Message) -> Message:
    """A content part with its source, if it has one, under its kind."""
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("audio", "input_audio"):
        raise PromptError(
            f"Message {i} has audio, which is not a modality of DiffusionGemma; transcribe it first and send the text."
        )
    if kind == "image_url":
        url = part.get("image_url")
        source = url.get("url") if isinstance(url, dict) else url
        if source is None:
            raise PromptError(f"Message {i} has an image_url part without a url.")
        return {"type": "image", "image": source}
    if kind in ("image", "video"):
        return {"type": kind} if part.get(kind) is None else {"type": kind, kind: part[kind]}
    raise PromptError(f"Message {i} has a part of type {kind!r}; it should be text, image, image_url or video.")


def _call(i: int, call: Any) -> Any:
    """A tool call with its arguments as an object, whether they came as one or as JSON text."""
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
        if not isinstance(function["name"], str) or not isinstance(function["arguments"], dict):
            raise ValueError("no name or no arguments")
        if not isinstance(call.get("id"), (str, type(None))):
            raise ValueError("its id is no text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PromptError(f"Message {i} has a tool call that cannot be read ({error}): {call!r}.") from None
    return {**call, "function": function}


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict] | None = None,
    thinking: bool = False,
    media: Sequence[tuple[str, str]] = (),
    markers: Sequence[str] = (),
) -> list[int]:
    """Token ids of the messages in the checkpoint's own chat template, ready for the answer.

    Args:
        tokenizer: mlx-lm's wrapper.
        messages: from `messages_of`.
        tools: function declarations in OpenAI's form.
        thinking: switch the template's thinking on.
        media: for each image and video part, in order, (the template's marker, the text that takes its place).
        markers: every marker that there is.

    Raises:
        PromptError: the checkpoint has no chat template, the template refuses these messages, or it shows
            another number of markers than there are pictures and videos.
    """
    if not tokenizer.has_chat_template:
        raise PromptError("This checkpoint has no chat template; add its chat_template.jinja to the folder.")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, enable_thinking=bool(thinking), tokenize=False
        )
    except Exception as error:  # templates raise what they like
        raise PromptError(f"The chat template refuses these messages: {error}") from None
    whole("The prompt", text)
    for marker in markers:
        given = sum(one == marker for one, _ in media)
        if text.count(marker) != given:
            raise PromptError(
                f"The prompt has {text.count(marker)} {marker} placeholders, but {given} sources are given for them; "
                "they must agree."
            )
    done = ""
    for marker, shown in media:
        head, _, text = text.partition(marker)
        done += head + shown
    return tokenizer.encode(done + text, add_special_tokens=False)


def opens_thought(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether a prompt ends where its template has opened a thought."""
    opened = tokenizer.think_start_tokens
    tail = tokenizer.decode(list(tokens[-len(opened) - 1 :])) if opened else ""
    return bool(opened) and tail.rstrip().endswith(tokenizer.decode(list(opened)))


def whole(name: str, text: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer takes.

    Raises:
        PromptError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} has half of a surrogate pair, {text[error.start]!a}, which is no character; leave it out."
        ) from None


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at a text's end may be the beginning of a stop string."""
    pairs = ((one, n) for one in stop for n in range(1, min(len(one), len(text) + 1)))
    return max((n for one, n in pairs if text.endswith(one[:n])), default=0)


@dataclass
class Answer:
    """Reads a row's tokens into text, thinking and tool calls, and knows when the text has ended.

    Attributes:
        text: what the user asked for, without any marker.
        thinking: what stood in the thinking channel.
        tool_calls: [{"id", "type": "function", "function": {"name", "arguments"}}].
        tokens: all tokens up to the end, end token left out.
        finish_reason: "stop", "length" or "tool_calls", once the text has ended.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    skip: int = 0  # characters to leave out at the beginning
    thinks: bool = False  # the prompt ends in a thought that is open
    text: str = ""
    thinking: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
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

    def feed(self, tokens: Sequence[int]) -> str | None:
        """Take a block; returns the finish reason once there is one."""
        for token in tokens:
            if token in self.end_tokens:
                self.cut("stop")
            else:
                self.tokens.append(token)
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
        if self.finish_reason is None:
            self.finish_reason = "tool_calls" if self.tool_calls and reason == "stop" else reason

    def take(self) -> tuple[str, str]:
        """(text, thinking) that is final and was not taken before.

        Text that may be the beginning of a stop string waits until that is known.
        """
        end = len(self.text)
        if self.finish_reason is None:
            end -= held_back(self.text, self.stop)
        text, thinking = self.text[self._given[0] : end], self.thinking[self._given[1] :]
        self._given = max(end, self._given[0]), len(self.thinking)
        return text, thinking

    def _read(self, token: int) -> None:
        if self._part == "text" and token in self._open:
            self._settle_text()
            self._part = self._open[token]
        elif self._part != "text" and self._close.get(token) == self._part:
            self._leave(closed=True)
        elif self._part != "text":
            self._inner.append(token)
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
        ends = [at for s in self.stop if (at := self.text.find(s)) >= 0]
        if ends:
            self.text, self.finish_reason = self.text[: min(ends)], "stop"

    def _leave(self, closed: bool) -> None:
        """Close the open part: thinking without its channel's name, a tool call parsed or kept as text."""
        part, self._part = self._part, "text"
        raw = self.tokenizer.decode(self._inner)
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
