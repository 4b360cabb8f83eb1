"""OpenAI's Responses as items: a request's input becomes messages, an answer's events become output items."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from ..prompt.messages import Message, parts_of
from .errors import ApiError
from .fields import Fields, parse
from .messages import data_url

ROLES = ("user", "assistant", "system", "developer")
STATUS = ("in_progress", "completed", "incomplete")
PARTS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # of the items that carry text: their part's name, and what a part has besides its text
    "message": ("output_text", {"annotations": [], "logprobs": []}),
    "reasoning": ("reasoning_text", {}),
}

Event = dict[str, Any]


def messages_of_input(fields: Fields, pictures: int) -> list[Message]:
    """Chat messages, as `prompt.messages_of` takes them, from `instructions` and `input`.

    What the model said in one turn (its thinking, its text, its calls) becomes one message.

    Args:
        fields: of the body.
        pictures: that there may be.

    Raises:
        ApiError: an item or part that is unknown or incomplete, too many pictures, a call's output without the call.
    """
    messages: list[Message] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    fields.need("input")
    if isinstance(given := fields.take("input"), str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list):
        fields.refuse("input", "it should be a string or a list of items")
    called: set[str] = set()
    turn: Message | None = None  # the model's, while its items follow each other
    for item in fields.objects("input"):
        kind = item.choice("type", "message", "reasoning", "function_call", "function_call_output", default="message")
        item.text("id")
        item.choice("status", *STATUS)
        message = READERS[kind](item)
        item.done()
        if kind == "message":
            if message["role"] in ("system", "developer") and messages:
                item.refuse("role", "a chat has one such message, its first: put all of it into instructions or there")
        elif kind == "function_call":
            called.add(message["tool_calls"][0]["id"])
        elif kind == "function_call_output" and message["tool_call_id"] not in called:
            item.refuse("call_id", "no function_call before it has this call_id: send the whole conversation")
        if message["role"] != "assistant":
            turn = None
            messages.append(message)
        elif turn is None or not _follows(turn, message):
            turn = message
            messages.append(message)
        else:
            if calls := message.pop("tool_calls", None):
                turn.setdefault("tool_calls", []).extend(calls)
            turn.update({name: value for name, value in message.items() if value})
    if len(parts_of(messages, "image")) > pictures:
        raise ApiError(f"There are more than {pictures} pictures; send fewer.", "input")
    return messages


def _follows(turn: Message, message: Message) -> bool:
    """Whether an item belongs to the turn: thinking begins one, text may follow thinking, calls may follow both."""
    if message.get("tool_calls"):
        return True
    return "reasoning_content" not in message and not turn["content"] and not turn.get("tool_calls")


def _message(item: Fields) -> Message:
    item.need("role")
    role = item.choice("role", *ROLES)
    item.choice("phase", "commentary", "final_answer")
    item.need("content")
    return {"role": role, "content": _content(item, "content", "input_text", "output_text", "input_image")}


def _content(item: Fields, name: str, *kinds: str) -> Any:
    content = item.take(name)
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        item.refuse(name, "it should be a string or a list of parts")
    parts = []
    for part in item.objects(name):
        part.need("type")
        kind = part.choice("type", *kinds)
        if kind == "input_image":
            part.only("file_id", why="no files are kept here: give image_url, a data URL")
            part.only("detail", "auto", why="image_tokens bounds what pictures take: leave detail out")
            part.need("image_url")
            parts.append({"type": "image", "image": data_url(part.text("image_url"), part.path("image_url"))})
        else:
            part.need("text")
            parts.append({"type": "text", "text": part.text("text")})
        if kind == "output_text":  # what an answer had beside its text may come back, and says nothing new
            part.array("annotations")
            part.array("logprobs")
        part.done()
    return parts


def _reasoning(item: Fields) -> Message:
    item.only("encrypted_content", why="only whoever encrypted it can read it: send content")
    texts: dict[str, list[str]] = {}
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        texts[name] = []
        for part in item.objects(name):
            part.choice("type", kind)
            part.need("text")
            texts[name].append(part.text("text"))
            part.done()
    thought = "\n".join(texts["content"] or texts["summary"])
    return {"role": "assistant", "content": "", "reasoning_content": thought}


def _call(item: Fields) -> Message:
    for name in ("call_id", "name", "arguments"):
        item.need(name)
    text = item.text("arguments")
    try:
        arguments = parse(text.encode()).given
    except ApiError:
        item.refuse("arguments", "it should be a JSON object as a string")
    call = {"id": item.text("call_id"), "type": "function"}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": item.text("name"), "arguments": arguments}}],
    }


def _output(item: Fields) -> Message:
    for name in ("call_id", "output"):
        item.need(name)
    output = _content(item, "output", "input_text")
    text = output if isinstance(output, str) else "\n".join(part["text"] for part in output)
    return {"role": "tool", "tool_call_id": item.text("call_id"), "content": text}


READERS = {"message": _message, "reasoning": _reasoning, "function_call": _call, "function_call_output": _output}


class Reply:
    """A response in the making. Every method yields events as OpenAI orders and numbers them; the last one of all
    holds the whole response, which is the answer where nothing is streamed.

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
        self._open: str | None = None  # the kind of the last item, while its text grows
        self._text = ""  # of it
        self._number = 0

    @property
    def begun(self) -> bool:
        """Whether anything was told."""
        return self._number > 0

    def begin(self) -> Iterator[Event]:
        """It was accepted."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=dict(self._response))

    def grow(self, thinking: str, text: str) -> Iterator[Event]:
        """More was generated."""
        for kind, new in (("reasoning", thinking), ("message", text)):
            if new:
                yield from self._turn_to(kind)
                self._text += new
                more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
                yield self._event(f"response.{PARTS[kind][0]}.delta", **self._place(), delta=new, **more)

    def draft(self, draft: dict[str, Any]) -> Iterator[Event]:
        """A canvas after a denoising step; an event of this model's own."""
        yield self._event("response.draft", draft={"index": 0, **draft})

    def finish(self, calls: list[dict[str, Any]], whole: bool, **more: Any) -> Iterator[Event]:
        """All was generated.

        Args:
            calls: of tools, as chat answers have them.
            whole: false where the text was cut.
            more: further fields of the response, `usage` among them.
        """
        if not self._items and not calls:
            yield from self._turn_to("message")
        yield from self._close("completed" if whole else "incomplete")
        for call in calls:
            yield from self._call(call["id"], **call["function"])
        self._response.update(more, completed_at=int(time.time()))
        if whole:
            yield self._end("completed")
        else:
            yield self._end("incomplete", incomplete_details={"reason": "max_output_tokens"})

    def fail(self, message: str) -> Iterator[Event]:
        """It came to nothing after it was accepted."""
        yield from self._close("incomplete")
        yield self._end("failed", error={"code": "server_error", "message": message})

    def _end(self, status: str, **more: Any) -> Event:
        self._response.update(more, status=status, output=self._items)
        return self._event(f"response.{status}", response=self._response)

    def _event(self, kind: str, **content: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **content}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        name, more = PARTS[self._items[-1]["type"]]
        return {"type": name, "text": self._text, **more}

    def _turn_to(self, kind: str) -> Iterator[Event]:
        """Open an item of this kind, unless the open one is."""
        if self._open == kind:
            return
        yield from self._close("completed")
        self._open, self._text = kind, ""
        item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        yield from self._add({"id": f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}", **item, **own})
        yield self._event("response.content_part.added", **self._place(), part=self._part())

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        part = self._part()
        more: dict[str, Any] = {"logprobs": []} if self._open == "message" else {}
        yield self._event(f"response.{PARTS[self._open][0]}.done", **self._place(), text=self._text, **more)
        yield self._event("response.content_part.done", **self._place(), part=part)
        self._open = None
        yield self._settle(status=status, content=[part])

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[Event]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call_id, "name": name}
        yield from self._add({**item, "arguments": "", "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        yield self._settle(status="completed", arguments=arguments)

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _settle(self, **changes: Any) -> Event:
        self._items[-1] = {**self._items[-1], **changes}
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1])
