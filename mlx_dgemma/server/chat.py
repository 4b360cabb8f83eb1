"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..decoding.events import Block
from ..decoding.request import Request
from ..prompt.messages import parts_of
from ..serving.scheduler import Accepted
from ..tasks import constrained
from .events import EventTranslator, FinishedAnswer, collect_answers, stats, usage, usage_and_stats
from .fields import Fields, read_body
from .follow import follow_all
from .messages import parse_messages, parse_tools
from .options import Delivery, as_api_errors, parse_arguments, parse_delivery
from .settings import Settings
from .streaming import EventStream, after_first_event, cancel_on_disconnect

if TYPE_CHECKING:
    from ..engine import Engine


NESTED_LEVELS = 3  # of a json_object, below its own; each level makes the automaton four times as large
MAX_REGEX_LENGTH = 20_000  # characters; a million take seconds to parse
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


async def chat_completions(request: HttpRequest) -> Response:
    """Answer messages, with one JSON body or with server-sent events."""
    scheduler, settings = request.app.state.scheduler, request.app.state.settings
    chat = parse_chat(await read_body(request), scheduler.engine, settings)
    await cancel_on_disconnect(request, _decode_pictures(chat, scheduler.engine, request.app.state.decode_limiter))
    prepares = [chat.prepare(scheduler.engine, i) for i in range(chat.delivery.choices)]
    events = follow_all(scheduler, prepares, chat.delivery.drafts, EventTranslator(scheduler.engine, chat.log_probs))
    if chat.delivery.stream:
        return EventStream(await after_first_event(request, _chunks(chat, events)))
    return JSONResponse(await cancel_on_disconnect(request, _body(chat, events)))


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request.

    Attributes:
        delivery: how the answers are sent.
        messages: as `Engine.prepare` takes them.
        arguments: further arguments of `Engine.prepare`, with the seed of the first answer.
        forced_tools: the tools one of which must be called; empty if no call is required.
        log_probs: whether log-probabilities are sent.
    """

    delivery: Delivery
    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    forced_tools: list[dict[str, Any]]
    log_probs: bool

    def prepare(self, engine: Engine, i: int) -> Callable[[], Request]:
        """Return the function that makes the request of answer `i` on the scheduler's thread."""

        def prepare() -> Request:
            arguments = {**self.arguments, "seed": self.arguments["seed"] + i}
            param = "regex" if "regex" in arguments else "response_format"
            with as_api_errors("messages", schema=param, pattern=param, constraint=param):
                request = engine.prepare(self.messages, **arguments)
            if not self.forced_tools:
                return request
            with as_api_errors("messages", schema="tool_choice", pattern="tool_choice", constraint="tool_choice"):
                schema, thinking = _call_schema(self.forced_tools), arguments["thinking"]
                constrained.constrain_answer(engine.builder, request, schema, None, thinking, None)
                return request

        return prepare

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


def parse_chat(
    fields: Fields, engine: Engine, settings: Settings, messages: list[dict[str, Any]] | None = None
) -> ChatRequest:
    """Parse the body of a chat request.

    Args:
        fields: the body.
        engine: provides the default options.
        settings: the server's configuration.
        messages: parsed messages; None reads them from the body.

    Raises:
        ApiError: a field is wrong or not supported.
    """
    delivery = parse_delivery(fields, settings)
    messages = parse_messages(fields, settings) if messages is None else messages
    limits = ("max_completion_tokens", "max_tokens")
    arguments = parse_arguments(fields, engine.options, limits, delivery.choices)
    arguments.setdefault("seed", secrets.randbits(32))
    arguments["thinking"] = _thinking(fields, arguments.get("thinking"))
    tools, forced_tools = _tools(fields)
    if len(arguments.get("regex", "")) > MAX_REGEX_LENGTH:
        fields.reject("regex", f"at most {MAX_REGEX_LENGTH:,} characters are read: give a shorter one")
    if schema := _schema(fields):
        if "regex" in arguments:
            fields.reject("regex", "but response_format asks for JSON: leave one out")
        arguments["schema"] = schema
    constraint = next((name for name in ("response_format", "regex", "tool_choice") if fields.has(name)), None)
    constraint = constraint if schema or "regex" in arguments or forced_tools else None
    if constraint != "tool_choice" and constraint and tools:
        fields.reject(constraint, "but tools are given, and a call of one would have another form: leave one out")
    if forced_tools and (name := next((one for one in ("stop", "exact") if arguments.get(one)), None)):
        fields.reject("tool_choice", f"and {name} is given; they cannot be together: leave one out")
    log_probs = fields.flag("logprobs", False)
    if log_probs and constraint:
        fields.reject("logprobs", f"but {constraint} chooses among texts, not by them: leave one out")
    fields.allow_only("top_logprobs", 0, why="only the chosen tokens' are known: leave it out, or give 0")
    if tools:
        arguments["tools"] = tools
    fields.reject_unknown()
    return ChatRequest(delivery, messages, arguments, forced_tools, log_probs)


async def _decode_pictures(chat: ChatRequest, engine: Engine, limiter: CapacityLimiter) -> None:
    """Decode the pictures in a worker thread, since even a small file may take seconds."""
    budget = chat.arguments.get("image_tokens", engine.options.image_tokens)
    with as_api_errors():
        for part in parts_of(chat.messages, "image"):
            part["image"] = await to_thread.run_sync(engine.builder.load_image, part["image"], budget, limiter=limiter)


def _thinking(fields: Fields, thinking: bool | None) -> bool:
    """Whether to think; a request can ask for it in three ways, which must agree."""
    asked = {"thinking": thinking, "reasoning_effort": None, "chat_template_kwargs": None}
    if effort := fields.choice("reasoning_effort", *EFFORTS):
        asked["reasoning_effort"] = effort != "none"
    if template := fields.object("chat_template_kwargs"):
        asked["chat_template_kwargs"] = template.flag("enable_thinking")
        template.reject_unknown()
    given = {name: value for name, value in asked.items() if value is not None}
    if len(set(given.values())) > 1:
        first, *_, last = given
        fields.reject(last, f"but {first} says the contrary: leave one out")
    return next(iter(given.values()), False)


def _schema(fields: Fields) -> dict[str, Any] | None:
    """The JSON Schema of `response_format`, or None if it asks for text."""
    response_format = fields.object("response_format")
    if response_format is None:
        return None
    response_format.require("type")
    kind, schema = response_format.choice("type", "text", "json_object", "json_schema"), None
    if kind == "json_object":
        schema = any_object_schema()
    if kind == "json_schema":
        response_format.require("json_schema")
        json_schema = response_format.object("json_schema")
        assert json_schema is not None
        json_schema.require("schema")
        for name in ("name", "description"):
            json_schema.text(name)
        json_schema.flag("strict")  # no effect: answers are always valid
        schema_fields = json_schema.object("schema")
        assert schema_fields is not None
        schema = schema_fields.data
        json_schema.reject_unknown()
    response_format.reject_unknown()
    return schema


def any_object_schema() -> dict[str, Any]:
    """The schema of any JSON object with at most four levels of nesting, its own included."""
    scalars: list[dict[str, Any]] = [{"type": kind} for kind in ("string", "number", "boolean", "null")]
    value: dict[str, Any] = {"anyOf": scalars}
    for _ in range(NESTED_LEVELS):
        value = {
            "anyOf": [*scalars, {"type": "object", "additionalProperties": value}, {"type": "array", "items": value}]
        }
    return {"type": "object", "additionalProperties": value}


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tools to put into the prompt, and those of which one must be called."""
    tools, choice = parse_tools(fields), fields.get("tool_choice")
    parallel, forced_tools = fields.flag("parallel_tool_calls", True), []
    if isinstance(choice, dict):
        named_tool = fields.object("tool_choice")
        assert named_tool is not None
        named_tool.allow_only("type", "function", why="a function alone can be named")
        named_tool.require("function")
        function = named_tool.object("function")
        assert function is not None
        function.require("name")
        name = function.text("name")
        function.reject_unknown()
        named_tool.reject_unknown()
        forced_tools = tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not forced_tools:
            function.reject("name", "no tool has this name")
    elif choice == "required":
        forced_tools = tools
    elif choice == "none":
        tools = []
    elif choice not in (None, "auto"):
        fields.reject("tool_choice", "it should be auto, none, required, or name a function")
    if choice == "required" and not tools:
        fields.reject("tool_choice", "but there are no tools: give some, or leave it out")
    if not forced_tools:
        if tools and not parallel:
            fields.reject("parallel_tool_calls", "that holds only where tool_choice is required or names a function")
        if any(tool["function"].get("strict") for tool in tools):
            fields.reject("tools", "strict holds only where tool_choice is required or names a function: leave it out")
    return tools, forced_tools


def _call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a required call: a single tool's arguments, or the name and arguments of one of several tools."""
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        return functions[0]["parameters"]
    calls = [{"name": {"const": one["name"]}, "arguments": one["parameters"]} for one in functions]
    return {"anyOf": [{"type": "object", "properties": call, "required": [*call]} for call in calls]}


def _choice(chat: ChatRequest, i: int, answer: FinishedAnswer) -> dict[str, Any]:
    tool_calls, text = chat.tool_calls(answer), "" if chat.forced_tools else answer.result.text
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if tool_calls else ""), "refusal": None}
    if answer.result.thinking:
        message["reasoning_content"] = answer.result.thinking
    if tool_calls:
        message["tool_calls"] = tool_calls
    return {
        "index": i,
        "message": message,
        "logprobs": _log_probs(chat, answer),
        "finish_reason": chat.finish_reason(answer),
    }


def _log_probs(chat: ChatRequest, answer: FinishedAnswer) -> dict[str, Any] | None:
    return {"content": answer.log_probs, "refusal": None} if chat.log_probs else None


async def _body(chat: ChatRequest, events: AsyncGenerator[tuple[int, Any]]) -> dict[str, Any]:
    answers = await collect_answers(events)
    return {
        **chat.delivery.envelope("chatcmpl", "chat.completion"),
        "choices": [_choice(chat, i, answer) for i, answer in enumerate(answers)],
        **usage_and_stats(answers),
    }


async def _chunks(chat: ChatRequest, events: AsyncGenerator[tuple[int, Any]]) -> AsyncGenerator[dict[str, Any]]:
    envelope = chat.delivery.envelope("chatcmpl", "chat.completion.chunk")
    answers: dict[int, FinishedAnswer] = {}

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        log_probs = more.pop("log_probs", None)
        choice = {"index": i, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return {**envelope, "choices": [choice], **({"usage": None} if chat.delivery.usage else {}), **more}

    async with aclosing(events):
        async for i, event in events:
            if isinstance(event, Accepted):
                yield chunk(i, {"role": "assistant", "content": ""})
            elif isinstance(event, Block):
                if event.thinking:
                    yield chunk(i, {"reasoning_content": event.thinking})
                if event.text and not chat.forced_tools:
                    yield chunk(i, {"content": event.text})
            elif isinstance(event, FinishedAnswer):
                answers[i] = event
                if calls := chat.tool_calls(event):
                    yield chunk(i, {"tool_calls": [{"index": k, **call} for k, call in enumerate(calls)]})
                log_probs = _log_probs(chat, event)
                yield chunk(i, {}, chat.finish_reason(event), log_probs=log_probs, stats=stats(event))
            else:
                yield {**envelope, "choices": [], "draft": {"index": i, **event}}
    if chat.delivery.usage:
        yield {**envelope, "choices": [], "usage": usage([answers[i] for i in sorted(answers)])}
