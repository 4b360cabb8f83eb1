"""Events of OpenAI's Responses API: generated text becomes output items."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ..schemas.items import CUSTOM_INPUT, CustomTool

# Items that carry text: the type of their content part, and the part's other fields.
CONTENT_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("output_text", {"annotations": [], "logprobs": []}),
    "reasoning": ("reasoning_text", {}),
}

ResponseEvent = dict[str, Any]


class ResponseBuilder:
    """Builds a response from generated text. Every method yields events in OpenAI's order, with sequence numbers.

    Args:
        request: the fields of the response that repeat the request.
        tools: by the names of their functions, (namespace or None, tool) as the request has them.

    Attributes:
        response: the response so far.
    """

    def __init__(self, request: dict[str, Any], tools: Mapping[str, tuple[str | None, Any]] | None = None):
        self.response = {
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
        self._tools = tools or {}
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # type of the last item, if text can still be added to it
        self._text = ""  # text of the open item
        self._events = 0  # number of events so far

    def start(self) -> Iterator[ResponseEvent]:
        """The request was accepted."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=dict(self.response))

    def append(self, thinking: str, text: str) -> Iterator[ResponseEvent]:
        """Add generated text."""
        for kind, new in (("reasoning", thinking), ("message", text)):
            if new:
                yield from self._open_item(kind)
                self._text += new
                more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
                yield self._event(f"response.{CONTENT_PARTS[kind][0]}.delta", **self._location(), delta=new, **more)

    def draft(self, draft: dict[str, Any]) -> ResponseEvent:
        """The canvas after a denoising step, an extension of OpenAI's format."""
        return self._event("response.draft", draft={"index": 0, **draft})

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
        self.response.update(more, completed_at=int(time.time()))
        if complete:
            yield self._end("completed")
        else:
            yield self._end("incomplete", incomplete_details={"reason": "max_output_tokens"})

    def fail(self, message: str) -> Iterator[ResponseEvent]:
        """The generation failed after it was accepted."""
        yield from self._close_item("incomplete")
        yield self._end("failed", error={"code": "server_error", "message": message})

    def _end(self, status: str, **more: Any) -> ResponseEvent:
        self.response.update(more, status=status, output=self._items)
        return self._event(f"response.{status}", response=self.response)

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
        space, tool = self._tools.get(name, (None, None))
        own_name = name if tool is None else tool.name
        called = {"call_id": call_id, "name": own_name, **({} if space is None else {"namespace": space})}
        if isinstance(tool, CustomTool):
            kind, event, field, told = "custom_tool_call", "custom_tool_call_input", "input", {}
            text = str(json.loads(arguments).get(CUSTOM_INPUT, ""))
        else:
            kind, event, field, told = "function_call", "function_call_arguments", "arguments", {"name": own_name}
            text = arguments
        item = {"id": f"{'ctc' if told == {} else 'fc'}_{uuid.uuid4().hex}", "type": kind, **called}
        yield from self._add_item({**item, field: "", "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event(f"response.{event}.delta", **place, delta=text)
        yield self._event(f"response.{event}.done", **place, **told, **{field: text})
        yield self._finish_item(status="completed", **{field: text})

    def _add_item(self, item: dict[str, Any]) -> Iterator[ResponseEvent]:
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _finish_item(self, **changes: Any) -> ResponseEvent:
        self._items[-1] = {**self._items[-1], **changes}
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1])
