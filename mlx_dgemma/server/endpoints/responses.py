"""POST /v1/responses: OpenAI's newer API. Each request is answered as the equivalent chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ...decoding.events import Block
from ...prompt.messages import Message
from ...serving.scheduler import Accepted
from ..errors import ApiError
from ..events import FinishedAnswer, stats, usage
from ..schemas.items import AnyItem, ReferenceItem, Response, full_name, input_items, input_messages
from ..settings import Settings
from .chat import ChatExchange
from .response_events import ResponseBuilder, ResponseEvent

if TYPE_CHECKING:
    from ...engine import Engine

ITEM: TypeAdapter[Any] = TypeAdapter(AnyItem)


class ResponseExchange(ChatExchange):
    """Input items to answer."""

    BODY = Response
    ENDS = False

    def __init__(self, body: Response, engine: Engine, settings: Settings):
        self._stored = settings.stored
        self._items = self._looked_up(body)
        super().__init__(body, engine, settings)
        tools = {full_name(space, tool.name): (space, tool) for space, tool in body.own_tools}
        self._builder = ResponseBuilder(self._echoed(), tools)

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        earlier, items = self._items
        return input_messages(self.body, earlier, items)

    def _looked_up(self, body: Response) -> tuple[list[Any], list[Any]]:
        """The items of the response that the request goes on from, and its own with references looked up.

        Raises:
            ApiError: one of them is not kept (404).
        """
        name, items = body.previous_response_id, input_items(body)
        earlier = [] if name is None else self._stored.items(name)
        if earlier is None:
            raise _not_kept("previous_response_id", name, "previous_response_not_found")
        for i, item in enumerate(items):
            if isinstance(item, ReferenceItem):
                items[i] = self._stored.item(item.id)
                if items[i] is None:
                    raise _not_kept(f"input[{i}].id", item.id, "item_not_found")
        return earlier, items

    def events(self, i: int, event: Any) -> Iterator[ResponseEvent]:
        """The events of the response."""
        if isinstance(event, Accepted):
            yield from self._builder.start()
        elif isinstance(event, Block):
            yield from self._builder.append(event.thinking, "" if self.withholds_text else event.text)
        elif isinstance(event, FinishedAnswer):
            if self.withholds_text:
                yield from self._builder.append("", self.text_of(event))
            complete, more = self.finish_reason(event) != "length", {"usage": _usage(event), "stats": stats(event)}
            last: ResponseEvent | None = None
            for one in self._builder.finish(self.tool_calls(event), complete, **more, **self.ignored):
                if last is not None:
                    yield last
                last = one
            self._keep()  # before the client knows that it is whole
            assert last is not None
            yield last
        else:
            yield self._builder.draft(event)

    def failed(self, error: ApiError) -> Iterable[ResponseEvent]:
        """An event that ends the response."""
        return self._builder.fail(str(error))

    def whole(self) -> dict[str, Any]:
        """The response."""
        return self._builder.response

    def _keep(self) -> None:
        """Store the response, unless it should not be."""
        if self.body.store is not False:
            answered = [ITEM.validate_python(item) for item in self._builder.response["output"]]
            earlier, items = self._items
            self._stored.add(self._builder.response["id"], [*earlier, *items, *answered])

    def _echoed(self) -> dict[str, Any]:
        """The fields of the response that repeat the request."""
        given = self.body.model_dump(by_alias=True, exclude_none=True, exclude={"input"})
        tools = [tool for tool in given.get("tools", ()) if self.arguments.get("tools")]
        tools = [{"strict": False, "parameters": {}, **one} if one["type"] == "function" else one for one in tools]
        repeated = ("instructions", "max_output_tokens", "temperature", "top_p", "user")
        return {
            "model": self.model,
            "background": False,
            "metadata": given.get("metadata", {}),
            "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": self.body.previous_response_id,
            "reasoning": {"effort": self.body.reasoning_effort, "summary": None},
            "store": self.body.store is not False,
            "text": {"format": {"type": "text"}, **given.get("text", {})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": tools,
            "truncation": "disabled",
            **{name: given.get(name) for name in repeated},
        }


def _not_kept(path: str, name: str | None, code: str) -> ApiError:
    why = "it is not kept here, or no longer: send the whole conversation as input"
    return ApiError(f"{path} is {name!r}; {why}.", path, 404, code)


def _usage(answer: FinishedAnswer) -> dict[str, Any]:
    counts = usage([answer])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }
