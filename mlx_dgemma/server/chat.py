"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
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
from .fields import Fields, read
from .follow import follow_all
from .messages import messages_of, tools_of
from .options import Form, arguments_of, blamed, form_of
from .reading import Done, Reading, stats, usage
from .sending import EventStream, begun, unless_gone
from .settings import Settings

if TYPE_CHECKING:
    from ..engine import Engine


LEVELS = 3  # of brackets inside a json_object's own: each makes the automaton four times as large
LONGEST = 20_000  # characters of a regex; to read a million takes seconds
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


async def chat_completions(request: HttpRequest) -> Response:
    """Answer messages, as a whole or as events."""
    scheduler, settings = request.app.state.scheduler, request.app.state.settings
    asked = read_chat(await read(request), scheduler.engine, settings)
    await unless_gone(request, _look(asked, scheduler.engine, request.app.state.looking))
    prepares = [asked.prepare(scheduler.engine, i) for i in range(asked.form.choices)]
    events = follow_all(scheduler, prepares, asked.form.drafts, Reading(scheduler.engine, asked.log_probs))
    if asked.form.stream:
        return EventStream(await begun(request, _chunks(asked, events)))
    return JSONResponse(await unless_gone(request, _whole(asked, events)))


@dataclass(frozen=True)
class Chat:
    """A request that was read.

    Attributes:
        arguments: of `Engine.prepare`; the seed is the first choice's.
        forced: the only tools one of which must be called, or none.
        log_probs: whether they are told.
    """

    form: Form
    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    forced: list[dict[str, Any]]
    log_probs: bool

    def prepare(self, engine: Engine, i: int) -> Callable[[], Request]:
        """What makes the request of choice `i`, on the scheduler's thread."""

        def prepare() -> Request:
            arguments = {**self.arguments, "seed": self.arguments["seed"] + i}
            held = "regex" if "regex" in arguments else "response_format"
            with blamed("messages", schema=held, pattern=held, constraint=held):
                request = engine.prepare(self.messages, **arguments)
            if not self.forced:
                return request
            with blamed("messages", schema="tool_choice", pattern="tool_choice", constraint="tool_choice"):
                schema, thinking = _call_schema(self.forced), arguments["thinking"]
                constrained.constrain_answer(engine.builder, request, schema, None, thinking, None)
                return request

        return prepare

    def calls(self, done: Done) -> list[dict[str, Any]]:
        """An answer's tool calls as they are sent, with arguments as JSON text."""
        functions = [call["function"] for call in done.result.tool_calls]
        if self.forced:
            given = json.loads(done.result.text)
            named = {"name": self.forced[0]["function"]["name"], "arguments": given}
            functions = [named if len(self.forced) == 1 else given]
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

    def finish_reason(self, done: Done) -> str:
        """Why an answer ended."""
        return "tool_calls" if self.forced else done.result.finish_reason


def read_chat(fields: Fields, engine: Engine, settings: Settings, messages: list[dict[str, Any]] | None = None) -> Chat:
    """Read the body.

    Args:
        messages: where they are not in the body.

    Raises:
        ApiError: anything in it cannot be honoured.
    """
    form = form_of(fields, settings)
    messages = messages_of(fields, settings) if messages is None else messages
    limits = ("max_completion_tokens", "max_tokens")
    arguments = arguments_of(fields, engine.options, limits, form.choices)
    arguments.setdefault("seed", secrets.randbits(32))
    arguments["thinking"] = _thinking(fields, arguments.get("thinking"))
    tools, forced = _tools(fields)
    if len(arguments.get("regex", "")) > LONGEST:
        fields.refuse("regex", f"at most {LONGEST:,} characters are read: give a shorter one")
    if schema := _schema(fields):
        if "regex" in arguments:
            fields.refuse("regex", "but response_format asks for JSON: leave one out")
        arguments["schema"] = schema
    held = next((name for name in ("response_format", "regex", "tool_choice") if fields.has(name)), None)
    held = held if schema or "regex" in arguments or forced else None
    if held != "tool_choice" and held and tools:
        fields.refuse(held, "but tools are given, and a call of one would have another form: leave one out")
    if forced and (name := next((one for one in ("stop", "exact") if arguments.get(one)), None)):
        fields.refuse("tool_choice", f"and {name} is given; they cannot be together: leave one out")
    log_probs = fields.flag("logprobs", False)
    if log_probs and held:
        fields.refuse("logprobs", f"but {held} chooses among texts, not by them: leave one out")
    fields.only("top_logprobs", 0, why="only the chosen tokens' are known: leave it out, or give 0")
    if tools:
        arguments["tools"] = tools
    fields.done()
    return Chat(form, messages, arguments, forced, log_probs)


async def _look(asked: Chat, engine: Engine, looking: CapacityLimiter) -> None:
    """Decode the pictures where nobody waits for it: a small file may take seconds."""
    budget = asked.arguments.get("image_tokens", engine.options.image_tokens)
    with blamed():
        for part in parts_of(asked.messages, "image"):
            part["image"] = await to_thread.run_sync(engine.builder.load_image, part["image"], budget, limiter=looking)


def _thinking(fields: Fields, given: bool | None) -> bool:
    """Whether to think, by any of its three names."""
    said = {"thinking": given, "reasoning_effort": None, "chat_template_kwargs": None}
    if effort := fields.choice("reasoning_effort", *EFFORTS):
        said["reasoning_effort"] = effort != "none"
    if template := fields.object("chat_template_kwargs"):
        said["chat_template_kwargs"] = template.flag("enable_thinking")
        template.done()
    heard = {name: value for name, value in said.items() if value is not None}
    if len(set(heard.values())) > 1:
        first, *_, last = heard
        fields.refuse(last, f"but {first} says the contrary: leave one out")
    return next(iter(heard.values()), False)


def _schema(fields: Fields) -> dict[str, Any] | None:
    """The JSON Schema that response_format asks for."""
    form = fields.object("response_format")
    if form is None:
        return None
    form.need("type")
    kind, schema = form.choice("type", "text", "json_object", "json_schema"), None
    if kind == "json_object":
        schema = any_object()
    if kind == "json_schema":
        form.need("json_schema")
        held = form.object("json_schema")
        assert held is not None
        held.need("schema")
        for name in ("name", "description"):
            held.text(name)
        held.flag("strict")  # the answer is valid in any case
        inner = held.object("schema")
        assert inner is not None
        schema = inner.given
        held.done()
    form.done()
    return schema


def any_object() -> dict[str, Any]:
    """The schema of any JSON object of up to four levels of brackets, its own included."""
    plain: list[dict[str, Any]] = [{"type": kind} for kind in ("string", "number", "boolean", "null")]
    value: dict[str, Any] = {"anyOf": plain}
    for _ in range(LEVELS):
        value = {
            "anyOf": [*plain, {"type": "object", "additionalProperties": value}, {"type": "array", "items": value}]
        }
    return {"type": "object", "additionalProperties": value}


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tools that are shown, and those of them one of which must be called."""
    tools, choice = tools_of(fields), fields.take("tool_choice")
    several, forced = fields.flag("parallel_tool_calls", True), []
    if isinstance(choice, dict):
        named = fields.object("tool_choice")
        assert named is not None
        named.only("type", "function", why="a function alone can be named")
        named.need("function")
        function = named.object("function")
        assert function is not None
        function.need("name")
        name = function.text("name")
        function.done()
        named.done()
        forced = tools = [tool for tool in tools if tool["function"]["name"] == name]
        if not forced:
            function.refuse("name", "no tool has this name")
    elif choice == "required":
        forced = tools
    elif choice == "none":
        tools = []
    elif choice not in (None, "auto"):
        fields.refuse("tool_choice", "it should be auto, none, required, or name a function")
    if choice == "required" and not tools:
        fields.refuse("tool_choice", "but there are no tools: give some, or leave it out")
    if not forced:
        if tools and not several:
            fields.refuse("parallel_tool_calls", "that holds only where tool_choice is required or names a function")
        if any(tool["function"].get("strict") for tool in tools):
            fields.refuse("tools", "strict holds only where tool_choice is required or names a function: leave it out")
    return tools, forced


def _call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of one tool's arguments, or of a call of one of several."""
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        return functions[0]["parameters"]
    calls = [{"name": {"const": one["name"]}, "arguments": one["parameters"]} for one in functions]
    return {"anyOf": [{"type": "object", "properties": call, "required": [*call]} for call in calls]}


def _base(asked: Chat, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.form.model,
    }


async def _whole(asked: Chat, events: AsyncGenerator[tuple[int, Any]]) -> dict[str, Any]:
    done: dict[int, Done] = {}
    async for i, event in events:
        if isinstance(event, Done):
            done[i] = event
    choices = []
    for i, one in sorted(done.items()):
        calls, text = asked.calls(one), "" if asked.forced else one.result.text
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if one.result.thinking:
            message["reasoning_content"] = one.result.thinking
        if calls:
            message["tool_calls"] = calls
        log_probs = {"content": one.log_probs, "refusal": None} if asked.log_probs else None
        choices.append(
            {"index": i, "message": message, "logprobs": log_probs, "finish_reason": asked.finish_reason(one)}
        )
    told = [stats(one) for _, one in sorted(done.items())]
    return {
        **_base(asked, "chat.completion"),
        "choices": choices,
        "usage": usage([one for _, one in sorted(done.items())]),
        "stats": told[0] if len(told) == 1 else told,
    }


async def _chunks(asked: Chat, events: AsyncGenerator[tuple[int, Any]]) -> AsyncGenerator[dict[str, Any]]:
    base, done = _base(asked, "chat.completion.chunk"), {}

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        log_probs = more.pop("log_probs", None)
        choice = {"index": i, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return {**base, "choices": [choice], **({"usage": None} if asked.form.usage else {}), **more}

    async with aclosing(events):
        async for i, event in events:
            if isinstance(event, Accepted):
                yield chunk(i, {"role": "assistant", "content": ""})
            elif isinstance(event, Block):
                if event.thinking:
                    yield chunk(i, {"reasoning_content": event.thinking})
                if event.text and not asked.forced:
                    yield chunk(i, {"content": event.text})
            elif isinstance(event, Done):
                done[i] = event
                if calls := asked.calls(event):
                    yield chunk(i, {"tool_calls": [{"index": k, **call} for k, call in enumerate(calls)]})
                log_probs = {"content": event.log_probs, "refusal": None} if asked.log_probs else None
                yield chunk(i, {}, asked.finish_reason(event), log_probs=log_probs, stats=stats(event))
            else:
                yield {**base, "choices": [], "draft": {"index": i, **event}}
    if asked.form.usage:
        yield {**base, "choices": [], "usage": usage([one for _, one in sorted(done.items())])}
