"""Chat messages: checked, with every picture and video in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import PromptError

TYPE_CHECKING = False  # as typing's: a call of a running server imports this
if TYPE_CHECKING:
    from typing import Any

SYSTEM_ROLES = ("system", "developer")
ROLES = ("system", "developer", "user", "assistant", "tool")
AUDIO = ("audio", "input_audio")  # kinds of parts that `audio.with_transcripts` replaces
Message = dict[str, "Any"]


def messages_of(
    prompt: str | Sequence[Message], system: str | None = None, images: Sequence[Any] = (), video: Any = None
) -> list[Message]:
    """Chat messages as the template takes them, every picture and video in its place.

    Args:
        prompt: a user's text, or messages with role and content; an assistant's `tool_calls` may carry
            their arguments as JSON text, its thinking stands in `reasoning_content`. Parts of a content
            are {"type": "text", "text"}, {"type": "image"} or {"type": "video"}; a part may carry its
            own source under "image", "video" or, as OpenAI writes it, {"image_url": {"url"}}.
        system: a system message to begin with, before those of the messages.
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
        message = dict(given)
        if not isinstance(message.get("name"), (str, type(None))):
            raise PromptError(f"Message {i} has the name {message['name']!r}; it should be a text.")
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
    contents = [message["content"] for message in messages]
    if not any(one.strip() if isinstance(one, str) else one for one in contents) and not called:
        last = len(messages) - 1
        if prompt[last].get("content") is None:
            raise PromptError(f"Message {last} has the content None; it should be a text or a list of parts.")
        raise PromptError(f"Message {last} is empty; say what you want.")
    return messages


def joined(messages: Sequence[Message]) -> Message:
    """Several messages of one role as one, their texts with a blank line between them; it has the first one's role."""
    contents = [one["content"] for one in messages if one["content"]]
    if all(isinstance(one, str) for one in contents):
        return {**messages[0], "content": "\n\n".join(contents)}
    parts = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in contents]
    return {**messages[0], "content": [part for one in parts for part in one]}


def _content(i: int, message: Message) -> Any:
    content, role = message.get("content"), message["role"]
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise PromptError(f"Message {i} has the content {content!r}; it should be a text or a list of parts.")
    parts = [_part(i, part) for part in content]
    if role != "user" and all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)  # templates take the text of these roles as one
    return parts


def _part(i: int, part: Message) -> Message:
    """A content part with its source, if it has one, under its kind."""
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        heard = {"transcripts": part["transcripts"]} if part.get("transcripts") else {}
        return {"type": "text", "text": part["text"], **heard}
    if kind in AUDIO:
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


def reject_surrogates(name: str, text: str) -> None:
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
