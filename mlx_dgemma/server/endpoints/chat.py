"""POST /v1/chat/completions, and what other endpoints need to answer a chat."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from ...decoding.events import Block
from ...decoding.request import Request
from ...prompt.audio import transcripts as audio
from ...prompt.messages import Message, parts_of
from ...serving.scheduler import Accepted
from ...tasks import constrained
from ..errors import ApiError
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import Exchange
from ..schemas.bodies import Chat
from ..schemas.fields import Body, parse_json, reject
from ..schemas.messages import chat_messages, tool_declarations
from ..settings import Settings
from .retakes import is_surely_valid, is_unreadable, is_valid_text, with_call, with_calls, with_text

if TYPE_CHECKING:
    from ...engine import Engine

THOUGHT_BUDGETS = {
    "minimal": 128,
    "low": 512,
    "medium": 2048,
}  # tokens, by reasoning_effort; others: no limit
MAX_AUDIO = 16  # pieces of audio in a request


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
        self.check_pictures(settings.pictures)
        self._check_audio()
        self.arguments["thinking"] = self._thinking()
        budget = THOUGHT_BUDGETS.get(body.reasoning_effort)
        if budget is not None and body.mode in (None, "diffusion"):
            self.arguments.setdefault("thinking_budget", budget)
        tools, self.forced_tools = self._tools()
        self._form: dict[str, Any] = {}  # the schema or regex of an answer that calls no tool
        self._check_constraint(tools)
        self._strict = {} if self.forced_tools else _strict_parameters(tools)
        self._broken: dict[int, list[int]] = {}  # by answer, the numbers of its calls that are not as their tools ask
        self.mends = bool(self._strict or self._form)
        self.log_probs = bool(getattr(body, "logprobs", None))
        if self.log_probs and self.forced_tools:
            self.log_probs = False  # the text of the call is not sent
            self.ignore("logprobs")
        if tools:
            self.arguments["tools"] = tools

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        return chat_messages(self.body.messages)

    def _check_audio(self) -> None:
        """Refuse audio that is in too many pieces, in another message than a user's, or not to be transcribed here."""
        messages = self.body.path("messages")
        pieces = [one for one in self.messages if parts_of([one], "audio")]
        if len(parts_of(pieces, "audio")) > MAX_AUDIO:
            raise ApiError(f"There are more than {MAX_AUDIO} pieces of audio; send fewer.", messages)
        if any(one["role"] != "user" for one in pieces):
            raise ApiError("Audio stands in another message than a user's; send it in a user's.", messages)
        if pieces:
            with as_api_errors(messages):
                audio.require()

    @cached_property
    def constraint(self) -> str | None:
        """Path of the field that says what the answer may be, if there is one."""
        return next(iter(self.body.constraints), self.body.path("tool_choice") if self.forced_tools else None)

    @property
    def withholds_text(self) -> bool:
        """Whether text is told at an answer's end alone, as `text_of` gives it."""
        return bool(self.forced_tools or self._form)

    def text_of(self, answer: FinishedAnswer) -> str:
        """The text of a whole answer: none where it is a call that had to be."""
        return "" if self.forced_tools else answer.result.text

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer."""
        schema = _call_schema(self.forced_tools) if self.forced_tools else None
        return self._prepare(engine, arguments, schema, None)

    def again(self, i: int, answer: FinishedAnswer, engine: Engine) -> Sequence[Callable[[], Request]]:
        """Requests for the calls that are not as their strict tools ask, or for the text that is not in its form."""
        arguments = {**self.arguments, "seed": self.arguments["seed"] + i, "thinking": False}
        arguments.pop("stop", None)
        calls = [call["function"] for call in self._kept(answer)]
        if calls:
            self._broken[i] = [
                k
                for k, call in enumerate(calls)
                if (schema := self._strict.get(call["name"])) is not None
                and not is_surely_valid(call["arguments"], schema)
            ]
            named = [calls[k]["name"] for k in self._broken[i]]
            tools = {tool["function"]["name"]: tool for tool in self.arguments["tools"]}
            return [
                partial(self._prepare, engine, {**arguments, "tools": [tools[name]]}, self._strict[name], None)
                for name in named
            ]
        if self._strict and is_unreadable(answer):
            return [partial(self._prepare, engine, arguments, _call_schema(self.arguments["tools"]), None)]
        schema, regex = self._form.get("schema"), self._form.get("regex")
        if not self._form or (schema is not None and is_valid_text(answer.result.text, schema)):
            return ()
        return [partial(self._prepare, engine, arguments, schema, regex)]

    def mended(self, i: int, answer: FinishedAnswer, takes: Sequence[FinishedAnswer]) -> FinishedAnswer:
        """An answer with the calls or the text that were generated again."""
        if self._broken.get(i):
            return with_calls(answer, dict(zip(self._broken[i], takes)))
        if self._strict and is_unreadable(answer):
            return with_call(answer, takes[0], self.arguments["tools"])
        return with_text(answer, takes[0])

    def _prepare(
        self, engine: Engine, arguments: dict[str, Any], schema: dict[str, Any] | None, regex: str | None
    ) -> Request:
        """Make a request whose answer is in a language though tools are declared."""
        messages, param = self.body.path("messages"), self.constraint or self.body.path("tools")
        with as_api_errors(messages, **dict.fromkeys(("schema", "pattern", "constraint"), param)):
            request = engine.prepare(self.messages, **arguments)
            constrained.constrain_answer(engine.builder, request, schema, regex, arguments["thinking"], None)
            return request

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The chunks of an event."""
        if isinstance(event, Accepted):
            yield self._delta(i, {"role": "assistant", "content": ""})
        elif isinstance(event, Block):
            if event.thinking:
                yield self._delta(i, {"reasoning_content": event.thinking})
            if event.text and not self.withholds_text:
                yield self._delta(i, {"content": event.text})
        elif isinstance(event, FinishedAnswer):
            self.answers[i] = event
            if self.withholds_text and (text := self.text_of(event)):
                yield self._delta(i, {"content": text})
            if self.body.stream and (calls := self.tool_calls(event)):
                yield self._delta(i, {"tool_calls": [{"index": k, **call} for k, call in enumerate(calls)]})
            yield self._delta(i, {}, event, stats=stats(event), **self.ignored)
        else:
            yield self.draft(i, event)

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """A whole answer as a choice of the body."""
        calls, text = self.tool_calls(answer), self.text_of(answer)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if answer.result.thinking:
            message["reasoning_content"] = answer.result.thinking
        if calls:
            message["tool_calls"] = calls
        return {"index": i, "message": message, **self._end_of(answer)}

    def tool_calls(self, answer: FinishedAnswer) -> list[dict[str, Any]]:
        """The tool calls of an answer in OpenAI's format, with their arguments as JSON text."""
        functions = [call["function"] for call in self._kept(answer)]
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

    def _kept(self, answer: FinishedAnswer) -> list[dict[str, Any]]:
        """The calls of an answer: the first alone where parallel ones are not wanted."""
        return answer.result.tool_calls[: 1 if self.body.parallel_tool_calls is False else None]

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

    def _check_constraint(self, tools: list[Message]) -> None:
        """Put schema or pattern into the arguments, or refuse what they cannot go with.

        Beside tools they hold for an answer that calls none: it is generated again where it is not in its form.
        """
        asked = self.body.constraints
        if len(asked) > 1:
            first, second, *_ = asked
            reject(first, asked[first][1], f"and {second} asks for a form of its own: leave one out")
        for path, (kind, value) in asked.items():
            form = {kind: _parsed_schema(path, value) if kind == "schema" and isinstance(value, str) else value}
            if self.forced_tools:
                self.ignore(path)  # the answer is a call
            elif tools:
                self._form = form
            else:
                self.arguments.update(form)
        if (asked or self.forced_tools) and not self._form and self.arguments.pop("stop", None):
            self.ignore("stop")  # the form says where the text ends
        if (self.forced_tools or self._form) and self.arguments.get("exact"):
            name = "tool_choice" if self.forced_tools else str(self.constraint)
            reject("exact", True, f"and {name} is given; they cannot be together: leave one out")

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
        return tools, forced


def _strict_parameters(tools: list[Message]) -> dict[str, dict[str, Any]]:
    """By their names, the schemas that calls of strict tools must be valid for."""
    functions = [tool["function"] for tool in tools]
    return {one["name"]: one["parameters"] for one in functions if one.get("strict")}


def _parsed_schema(path: str, text: str) -> dict[str, Any]:
    """A schema that came as JSON text."""
    schema = parse_json(text.encode())
    if not isinstance(schema, dict):
        reject(path, text, "it should be a JSON Schema, an object")
    return schema


def _call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a required call: a single tool's arguments, or the name and arguments of one of several tools."""
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        return functions[0]["parameters"]
    calls = [{"name": {"const": one["name"]}, "arguments": one["parameters"]} for one in functions]
    return {"anyOf": [{"type": "object", "properties": call, "required": [*call]} for call in calls]}
