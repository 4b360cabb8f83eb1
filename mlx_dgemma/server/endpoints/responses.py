"""POST /v1/responses: OpenAI's newer API. Each request is answered as the equivalent chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...decoding.events import Block
from ...prompt.messages import Message
from ...serving.scheduler import Accepted
from ..errors import ApiError
from ..events import FinishedAnswer, stats, usage
from ..schemas.items import Response, input_messages
from ..settings import Settings
from .chat import ChatExchange
from .response_events import ResponseBuilder, ResponseEvent

if TYPE_CHECKING:
    from ...engine import Engine


class ResponseExchange(ChatExchange):
    """Input items to answer."""

    BODY = Response

    def __init__(self, body: Response, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        self._builder = ResponseBuilder(self._echoed())

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        return input_messages(self.body)

    def events(self, i: int, event: Any) -> Iterator[ResponseEvent]:
        """The events of the response."""
        if isinstance(event, Accepted):
            yield from self._builder.start()
        elif isinstance(event, Block):
            yield from self._builder.append(event.thinking, "" if self.forced_tools else event.text)
        elif isinstance(event, FinishedAnswer):
            complete = self.finish_reason(event) != "length"
            yield from self._builder.finish(self.tool_calls(event), complete, usage=_usage(event), stats=stats(event))
        else:
            yield self._builder.draft(event)

    def end(self) -> Iterable[dict[str, Any] | str]:
        """Nothing: the last event of the response is told."""
        return ()

    def failed(self, error: ApiError) -> Iterable[ResponseEvent]:
        """An event that ends the response."""
        return self._builder.fail(str(error))

    def whole(self) -> dict[str, Any]:
        """The response."""
        return self._builder.response

    def _echoed(self) -> dict[str, Any]:
        """The fields of the response that repeat the request."""
        given = self.body.model_dump(by_alias=True, exclude_none=True, exclude={"input"})
        tools = [{"strict": False, **tool["function"], "type": "function"} for tool in self.arguments.get("tools", ())]
        repeated = ("instructions", "max_output_tokens", "temperature", "top_p", "user")
        return {
            "model": self.model,
            "background": False,
            "metadata": given.get("metadata", {}),
            "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": self.body.reasoning_effort, "summary": None},
            "store": False,
            "text": {"format": {"type": "text"}, **given.get("text", {})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": tools,
            "truncation": "disabled",
            **{name: given.get(name) for name in repeated},
        }


def _usage(answer: FinishedAnswer) -> dict[str, Any]:
    counts = usage([answer])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }
