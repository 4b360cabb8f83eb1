"""POST /v1/chat/completions, and what other endpoints need to answer a chat."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...decoding.events import Block
from ...decoding.request import Request
from ...prompt.messages import Message, parts_of
from ...serving.scheduler import Accepted
from ...tasks import constrained
from ..errors import ApiError
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import Exchange
from ..schemas.bodies import Chat
from ..schemas.fields import Body, reject
from ..schemas.messages import chat_messages, tool_declarations
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine

THOUGHT_BUDGETS = {
    "minimal": 128,
    "low": 512,
    "medium": 2048,
}  # tokens, by reasoning_effort; others: no limit


class ChatExchange(Exchange):
    """A chat to answer, from the body of any endpoint that has the fields of `Chat` or properties in their place.

    Attributes:
        forced_tools: the tools one of which must be called; empty if no call is required.
    """

    BODY: ClassVar[type[Body]] = Chat
    KIND = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(self, body: Any, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        self.messages = self.read_messages()
        if len(parts_of(self.messages, "image")) > settings.pictures:
            raise ApiError(f"There are more than {settings.pictures} pictures; send fewer.", body.path("messages"))
        self.arguments["thinking"] = self._thinking()
        budget = THOUGHT_BUDGETS.get(body.reasoning_effort)
        if budget is not None and body.mode in (None, "diffusion"):
            self.arguments.setdefault("thinking_budget", budget)
        tools, self.forced_tools = self._tools()
        self._check_constraint(tools)
        self.log_probs = bool(getattr(body, "logprobs", None))
        if self.log_probs and self.forced_tools:
            reject("logprobs", True, "but tool_choice asks for a call, whose text is not sent: leave one out")
        if tools:
            self.arguments["tools"] = tools

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        return chat_messages(self.body.messages)

    @cached_property
    def constraint(self) -> str | None:
        """Path of the field that says what the answer may be, if there is one."""
        name = "response_format" if self._schema else "regex" if self.body.regex is not None else None
        return self.body.path(name or "tool_choice") if name or self.forced_tools else None

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer."""
        messages, param = self.body.path("messages"), self.constraint or self.body.path("response_format")
        with as_api_errors(messages, **dict.fromkeys(("schema", "pattern", "constraint"), param)):
            request = engine.prepare(self.messages, **arguments)
            if self.forced_tools:
                schema, thinking = _call_schema(self.forced_tools), arguments["thinking"]
                constrained.constrain_answer(engine.builder, request, schema, None, thinking, None)
            return request

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The chunks of an event."""
        if isinstance(event, Accepted):
            yield self._delta(i, {"role": "assistant", "content": ""})
        elif isinstance(event, Block):
            if event.thinking:
                yield self._delta(i, {"reasoning_content": event.thinking})
            if event.text and not self.forced_tools:
                yield self._delta(i, {"content": event.text})
        elif isinstance(event, FinishedAnswer):
            self.answers[i] = event
            if self.body.stream and (calls := self.tool_calls(event)):
                yield self._delta(i, {"tool_calls": [{"index": k, **call} for k, call in enumerate(calls)]})
            yield self._delta(i, {}, event, stats=stats(event))
        else:
            yield self.draft(i, event)

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """A whole answer as a choice of the body."""
        calls, text = self.tool_calls(answer), "" if self.forced_tools else answer.result.text
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if answer.result.thinking:
            message["reasoning_content"] = answer.result.thinking
        if calls:
            message["tool_calls"] = calls
        return {"index": i, "message": message, **self._end_of(answer)}

    def tool_calls(self, answer: FinishedAnswer) -> list[dict[str, Any]]:
        """The tool calls of an answer in OpenAI's format, with their arguments as JSON text."""
        functions = [call["function"] for call in answer.result.tool_calls]
        if self.forced_tools:
            value = json.loads(answer.result.text)
            only_tool = {"name": self.forced_tools[0]["function"]["name"], "arguments": value}
            functions = [only_tool if len(self.forced_tools) == 1 else value]
        return [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": function["name"],
                    "arguments": json.dumps(function["arguments"], ensure_ascii=False),
                },
            }
            for function in functions
        ]

    def finish_reason(self, answer: FinishedAnswer) -> str:
        """Why an answer ended, in OpenAI's terms."""
        return "tool_calls" if self.forced_tools else answer.result.finish_reason

    def _delta(
        self, i: int, delta: dict[str, Any], answer: FinishedAnswer | None = None, **more: Any
    ) -> dict[str, Any]:
        return self.chunk({"index": i, "delta": delta, **self._end_of(answer)}, **more)

    def _end_of(self, answer: FinishedAnswer | None) -> dict[str, Any]:
        """What only the end of an answer tells."""
        if answer is None:
            return {"logprobs": None, "finish_reason": None}
        log_probs = {"content": answer.log_probs, "refusal": None} if self.log_probs else None
        return {"logprobs": log_probs, "finish_reason": self.finish_reason(answer)}

    def _thinking(self) -> bool:
        """Whether to think; a request can ask for it in three ways, which must agree."""
        effort, template = self.body.reasoning_effort, getattr(self.body, "chat_template_kwargs", None)
        asked = {
            "thinking": (self.body.thinking, self.body.thinking),
            "reasoning_effort": (effort, effort and effort != "none"),
            "chat_template_kwargs": (template, template and template.enable_thinking),
        }
        given = {name: value for name, (_, value) in asked.items() if value is not None}
        if len(set(given.values())) > 1:
            first, *_, last = given
            reject(self.body.path(last), asked[last][0], f"but {first} says the contrary: leave one out")
        return next(iter(given.values()), False)

    @cached_property
    def _schema(self) -> dict[str, Any] | None:
        """The JSON Schema of the answer, or None if it is text."""
        form = self.body.response_format
        return {"type": "object"} if form and form.type == "json_object" else self.body.schema_asked

    def _check_constraint(self, tools: list[Message]) -> None:
        """Put schema or pattern into the arguments, or refuse what they cannot go with."""
        body, path = self.body, self.body.path
        if body.regex is not None:
            if self._schema:
                reject("regex", body.regex, f"but {path('response_format')} asks for JSON: leave one out")
            self.arguments["regex"] = body.regex
        if self._schema:
            self.arguments["schema"] = self._schema
        if (self._schema or body.regex is not None) and tools:
            value = body.response_format if self._schema else body.regex
            why = "but tools are given, and a call of one would have another form: leave one out"
            reject(str(self.constraint), value, why)
        if self.forced_tools and (name := next((one for one in ("stop", "exact") if self.arguments.get(one)), None)):
            reject("tool_choice", body.tool_choice, f"and {name} is given; they cannot be together: leave one out")

    def _tools(self) -> tuple[list[Message], list[Message]]:
        """The tools to put into the prompt, and those of which one must be called."""
        body, choice = self.body, self.body.tool_choice
        tools = tool_declarations(body.functions, body.path("tools[{}].function.name"))
        forced: list[Message] = []
        if name := body.named_function:
            forced = tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not forced:
                reject(body.path("tool_choice.function.name"), name, "no tool has this name")
        elif choice == "required":
            forced = tools
        elif choice == "none":
            tools = []
        if choice == "required" and not tools:
            reject("tool_choice", choice, "but there are no tools: give some, or leave it out")
        if not forced:
            why = "holds only where tool_choice is required or names a function"
            if tools and body.parallel_tool_calls is False:
                reject("parallel_tool_calls", False, f"that {why}")
            if any(tool["function"].get("strict") for tool in tools):
                reject("tools", body.tools, f"strict {why}: leave it out")
        return tools, forced


def _call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a required call: a single tool's arguments, or the name and arguments of one of several tools."""
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        return functions[0]["parameters"]
    calls = [{"name": {"const": one["name"]}, "arguments": one["parameters"]} for one in functions]
    return {"anyOf": [{"type": "object", "properties": call, "required": [*call]} for call in calls]}
