"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's API. Each request is answered as the equivalent chat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ...decoding.events import Block
from ...decoding.request import Request
from ...prompt.answer import Answer
from ...prompt.messages import Message, messages_of
from ...serving.scheduler import Accepted
from ...tasks.prefill import begin_answer, begun_tokens
from ..errors import ApiError, anthropic_error
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import read_exchange
from ..schemas.anthropic import Messages, conversation
from ..schemas.fields import reject
from ..settings import Settings
from ..streaming import cancel_on_disconnect
from .anthropic_events import MessageBuilder, MessageEvent
from .chat import ChatExchange

if TYPE_CHECKING:
    from ...engine import Engine

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageExchange(ChatExchange):
    """Messages to answer.

    Attributes:
        begun: the text that the answer begins with.
    """

    BODY = Messages
    ENDS = False

    def __init__(self, body: Messages, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        if self.begun:
            self._check_beginning()
        display = body.thought and body.thought.display
        self._builder = MessageBuilder(self.model, display != "omitted", **self.ignored)
        self._reader: Any = None

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        messages, self.begun = conversation(self.body)
        return messages

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of the answer."""
        request = super().prepare(engine, arguments)
        if self.begun:
            with as_api_errors("messages"):
                begin_answer(engine.builder, request, self.begun)
        self._reader = request.reader
        return request

    def count_tokens(self, engine: Engine) -> int:
        """Number of the prompt's tokens, even if the context has no room for them."""
        builder, given = engine.builder, self.arguments
        options = engine.options.override(image_tokens=given.get("image_tokens"))
        with as_api_errors("messages"):
            messages = messages_of(self.messages)
            prompt = builder.prompt_tokens(
                messages, given["thinking"], given.get("tools"), options, builder.check_characters
            )
            return len(prompt.tokens) + len(begun_tokens(builder, self.begun) if self.begun else ())

    def events(self, i: int, event: Any) -> Iterator[MessageEvent]:
        """The events of the message."""
        if isinstance(event, Accepted):
            yield from self._builder.start(_usage(event.prompt_tokens))
        elif isinstance(event, Block):
            yield from self._builder.append(event.thinking, "" if self.withholds_text else event.text)
        elif isinstance(event, FinishedAnswer):
            if self.withholds_text:
                yield from self._builder.append("", self.text_of(event))
            yield from self._builder.finish(self._calls(event), **self._end(event), stats=stats(event))
        else:
            yield {"type": "draft", "draft": event}

    def failed(self, error: ApiError) -> Iterable[MessageEvent]:
        """An event that ends the message."""
        return [anthropic_error(error)]

    def whole(self) -> dict[str, Any]:
        """The message."""
        return self._builder.message

    def _check_beginning(self) -> None:
        """Refuse what an answer cannot have that begins with a given text. It needs not think where it only may."""
        if self.body.thought and self.body.thought.type == "adaptive":
            self.arguments["thinking"] = False
        named = [name for name in ("thinking", "tools") if self.arguments.get(name)]
        if name := next(iter(named), self.constraint):
            why = f"and {name} is given, which an answer that is begun cannot have: leave one out"
            reject(f"messages[{len(self.body.messages) - 1}].role", "assistant", why)

    def _calls(self, answer: FinishedAnswer) -> list[dict[str, Any]]:
        """The calls of an answer as blocks."""
        return [
            {
                "type": "tool_use",
                "id": call["id"].replace("call_", "toolu_"),
                "name": call["function"]["name"],
                "input": json.loads(call["function"]["arguments"]),
            }
            for call in self.tool_calls(answer)
        ]

    def _end(self, answer: FinishedAnswer) -> dict[str, Any]:
        """Why an answer ended, and its numbers of tokens."""
        reason, stop = self.finish_reason(answer), None
        if reason == "stop" and isinstance(self._reader, Answer):
            stop = self._reader.stop_string
        numbers = answer.result.stats
        return {
            "stop_reason": "stop_sequence" if stop else REASONS[reason],
            "stop_sequence": stop,
            "usage": _usage(numbers.prompt_tokens, numbers.reused_tokens, len(answer.result.tokens)),
        }


async def count_tokens(http: HttpRequest) -> Response:
    """POST /v1/messages/count_tokens: how many tokens the prompt of such a request has."""
    state = http.app.state
    exchange = await read_exchange(http, MessageExchange)
    assert isinstance(exchange, MessageExchange)
    counting = to_thread.run_sync(exchange.count_tokens, state.scheduler.engine, limiter=state.parse_limiter)
    return JSONResponse({"input_tokens": await cancel_on_disconnect(http, counting), **exchange.ignored})


def _usage(prompt_tokens: int, reused: int = 0, generated: int = 0) -> dict[str, Any]:
    """Token counts in Anthropic's format: `input_tokens` are those that were encoded for this request."""
    return {
        "input_tokens": prompt_tokens - reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reused,
        "output_tokens": generated,
    }
