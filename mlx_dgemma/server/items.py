"""Items of OpenAI's Responses API: input items become chat messages, and generated text becomes output items."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from ..prompt.messages import Message, parts_of
from .errors import ApiError
from .fields import Fields, parse_json
from .messages import decode_data_url

ROLES = ("user", "assistant", "system", "developer")
STATUS = ("in_progress", "completed", "incomplete")
# Items that carry text: the type of their content part, and the part's other fields.
CONTENT_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("output_text", {"annotations": [], "logprobs": []}),
    "reasoning": ("reasoning_text", {}),
}

ResponseEvent = dict[str, Any]


def parse_input(fields: Fields, max_pictures: int) -> list[Message]:
    """Read `instructions` and `input` as chat messages for `Engine.prepare`.

    The items of one turn of the model (thinking, text, calls) become one message.

    Args:
        fields: the body.
        max_pictures: maximum number of pictures.

    Raises:
        ApiError: an unknown or incomplete item or part, too many pictures, or a call's output without the call.
    """
    messages: list[Message] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    fields.require("input")
    if isinstance(items := fields.get("input"), str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list):
        fields.reject("input", "it should be a string or a list of items")
    call_ids: set[str] = set()
    turn: Message | None = None  # the model's current turn, while its items are consecutive
    for item in fields.objects("input"):
        kind = item.choice("type", "message", "reasoning", "function_call", "function_call_output", default="message")
        item.text("id")
        item.choice("status", *STATUS)
        message = ITEM_PARSERS[kind](item)
        item.reject_unknown()
        if kind == "message":
            if message["role"] in ("system", "developer") and messages:
                item.reject("role", "a chat has one such message, its first: put all of it into instructions or there")
        elif kind == "function_call":
            call_ids.add(message["tool_calls"][0]["id"])
        elif kind == "function_call_output" and message["tool_call_id"] not in call_ids:
            item.reject("call_id", "no function_call before it has this call_id: send the whole conversation")
        if message["role"] != "assistant":
            turn = None
            messages.append(message)
        elif turn is None or not _continues(turn, message):
            turn = message
            messages.append(message)
        else:
            if calls := message.pop("tool_calls", None):
                turn.setdefault("tool_calls", []).extend(calls)
            turn.update({name: value for name, value in message.items() if value})
    if len(parts_of(messages, "image")) > max_pictures:
        raise ApiError(f"There are more than {max_pictures} pictures; send fewer.", "input")
    return messages


def _continues(turn: Message, message: Message) -> bool:
    """Whether a message belongs to the turn. A turn is thinking, then text, then calls; each part is optional."""
    if message.get("tool_calls"):
        return True
    return "reasoning_content" not in message and not turn["content"] and not turn.get("tool_calls")


def _message(item: Fields) -> Message:
    item.require("role")
    role = item.choice("role", *ROLES)
    item.choice("phase", "commentary", "final_answer")
    item.require("content")
    return {"role": role, "content": _content(item, "content", "input_text", "output_text", "input_image")}


def _content(item: Fields, name: str, *kinds: str) -> Any:
    content = item.get(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        item.reject(name, "it should be a string or a list of parts")
    parts = []
    for part in item.objects(name):
        part.require("type")
        kind = part.choice("type", *kinds)
        if kind == "input_image":
            part.allow_only("file_id", why="no files are kept here: give image_url, a data URL")
            part.allow_only("detail", "auto", why="image_tokens bounds what pictures take: leave detail out")
            part.require("image_url")
            parts.append({"type": "image", "image": decode_data_url(part.text("image_url"), part.path("image_url"))})
        else:
            part.require("text")
            parts.append({"type": "text", "text": part.text("text")})
        if kind == "output_text":  # clients send back the other fields of an output; they have no effect
            part.array("annotations")
            part.array("logprobs")
        part.reject_unknown()
    return parts


def _reasoning(item: Fields) -> Message:
    item.allow_only("encrypted_content", why="only whoever encrypted it can read it: send content")
    texts: dict[str, list[str]] = {}
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        texts[name] = []
        for part in item.objects(name):
            part.choice("type", kind)
            part.require("text")
            texts[name].append(part.text("text"))
            part.reject_unknown()
    thought = "\n".join(texts["content"] or texts["summary"])
    return {"role": "assistant", "content": "", "reasoning_content": thought}


def _call(item: Fields) -> Message:
    for name in ("call_id", "name", "arguments"):
        item.require(name)
    text = item.text("arguments")
    try:
        arguments = parse_json(text.encode()).data
    except ApiError:
        item.reject("arguments", "it should be a JSON object as a string")
    call = {"id": item.text("call_id"), "type": "function"}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": item.text("name"), "arguments": arguments}}],
    }


def _output(item: Fields) -> Message:
    for name in ("call_id", "output"):
        item.require(name)
    output = _content(item, "output", "input_text")
    text = output if isinstance(output, str) else "\n".join(part["text"] for part in output)
    return {"role": "tool", "tool_call_id": item.text("call_id"), "content": text}


ITEM_PARSERS = {"message": _message, "reasoning": _reasoning, "function_call": _call, "function_call_output": _output}


class ResponseBuilder:
    """Builds a response from generated text. Every method yields events in OpenAI's order, with sequence numbers.

    The last event holds the whole response, which is the body if the request does not stream.

    Args:
        request: the fields of the response that repeat the request.
    """

    def __init__(self, request: dict[str, Any]):
        self._response = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **request,
        }
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # type of the last item, if text can still be added to it
        self._text = ""  # text of the open item
        self._events = 0  # number of events so far

    @property
    def started(self) -> bool:
        """Whether any event was made."""
        return self._events > 0

    def start(self) -> Iterator[ResponseEvent]:
        """The request was accepted."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=dict(self._response))

    def append(self, thinking: str, text: str) -> Iterator[ResponseEvent]:
        """Add generated text."""
        for kind, new in (("reasoning", thinking), ("message", text)):
            if new:
                yield from self._open_item(kind)
                self._text += new
                more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
                yield self._event(f"response.{CONTENT_PARTS[kind][0]}.delta", **self._location(), delta=new, **more)

    def draft(self, draft: dict[str, Any]) -> Iterator[ResponseEvent]:
        """The canvas after a denoising step, an extension of OpenAI's format."""
        yield self._event("response.draft", draft={"index": 0, **draft})

    def finish(self, calls: list[dict[str, Any]], complete: bool, **more: Any) -> Iterator[ResponseEvent]:
        """The generation finished.

        Args:
            calls: tool calls in the format of chat answers.
            complete: false if the text was cut at the token limit.
            more: further fields of the response, such as `usage`.
        """
        if not self._items and not calls:
            yield from self._open_item("message")
        yield from self._close_item("completed" if complete else "incomplete")
        for call in calls:
            yield from self._add_call(call["id"], **call["function"])
        self._response.update(more, completed_at=int(time.time()))
        if complete:
            yield self._end("completed")
        else:
            yield self._end("incomplete", incomplete_details={"reason": "max_output_tokens"})

    def fail(self, message: str) -> Iterator[ResponseEvent]:
        """The generation failed after it was accepted."""
        yield from self._close_item("incomplete")
        yield self._end("failed", error={"code": "server_error", "message": message})

    def _end(self, status: str, **more: Any) -> ResponseEvent:
        self._response.update(more, status=status, output=self._items)
        return self._event(f"response.{status}", response=self._response)

    def _event(self, kind: str, **content: Any) -> ResponseEvent:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **content}

    def _location(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        name, more = CONTENT_PARTS[self._items[-1]["type"]]
        return {"type": name, "text": self._text, **more}

    def _open_item(self, kind: str) -> Iterator[ResponseEvent]:
        """Open an item of this kind, unless one is already open."""
        if self._open == kind:
            return
        yield from self._close_item("completed")
        self._open, self._text = kind, ""
        item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        extra: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._add_item({"id": f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}", **item, **extra})
        yield self._event("response.content_part.added", **self._location(), part=self._part())

    def _close_item(self, status: str) -> Iterator[ResponseEvent]:
        if self._open is None:
            return
        part = self._part()
        more: dict[str, Any] = {"logprobs": []} if self._open == "message" else {}
        yield self._event(f"response.{CONTENT_PARTS[self._open][0]}.done", **self._location(), text=self._text, **more)
        yield self._event("response.content_part.done", **self._location(), part=part)
        self._open = None
        yield self._finish_item(status=status, content=[part])

    def _add_call(self, call_id: str, name: str, arguments: str) -> Iterator[ResponseEvent]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call_id, "name": name}
        yield from self._add_item({**item, "arguments": "", "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        yield self._finish_item(status="completed", arguments=arguments)

    def _add_item(self, item: dict[str, Any]) -> Iterator[ResponseEvent]:
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _finish_item(self, **changes: Any) -> ResponseEvent:
        self._items[-1] = {**self._items[-1], **changes}
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1])
