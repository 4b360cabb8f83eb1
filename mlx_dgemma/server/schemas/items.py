"""The body of OpenAI's Responses API. Its input items become chat messages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag

from ...prompt.messages import Message
from .bodies import CHOICE, Answered, Effort, JsonSchema, Name, PlainFormat, TokenLimit, Word
from .fields import Body, Many, only, reject
from .messages import EITHER, MAX_TOOLS, Arguments, DataUrl, Function, FunctionOnly, PartsOf, Text, content_of

MAX_LABELS = 16  # pairs of `metadata`
Name64 = Annotated[str, Field(max_length=64)]
Text512 = Annotated[str, Field(max_length=512)]
NOT_STORED = "nothing is stored here: send the whole conversation as input"
NOT_SUMMED_UP = only(why="nothing is summed up: the whole thinking is told, leave it out")


class Item(Body):
    id: Any = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputText(Body):
    type: Literal["input_text"]
    text: str


class OutputText(Body):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Body):
    type: Literal["input_image"]
    file_id: Annotated[str | None, only(why="no files are kept here: give image_url, a data URL")] = None
    detail: Annotated[str | None, only("auto", why="image_tokens bounds what pictures take: leave detail out")] = None
    image_url: DataUrl


class Thought(Body):
    type: Literal["reasoning_text", "summary_text"] | None = None
    text: str


ItemPart = Annotated[InputText | OutputText | InputImage, Field(discriminator="type")]


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    phase: Literal["commentary", "final_answer"] | None = None
    content: Annotated[Text | PartsOf[ItemPart], EITHER]


class ReasoningItem(Item):
    type: Literal["reasoning"]
    encrypted_content: Annotated[str | None, only(why="only whoever encrypted it can read it: send content")] = None
    content: Many[Thought] | None = None
    summary: Many[Thought] | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments


class OutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[Text | PartsOf[InputText], EITHER]


def _with_type(item: Any) -> Any:
    return {**item, "type": item.get("type") or "message"} if isinstance(item, dict) else item


AnyItem = Annotated[
    Annotated[MessageItem | ReasoningItem | CallItem | OutputItem, Field(discriminator="type")],
    BeforeValidator(_with_type),
]


class FlatTool(Function):
    type: FunctionOnly


class FlatNamedFunction(Name):
    type: Annotated[str, only("function", why="a function alone can be named")]


class FlatSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextSettings(Body):
    format: Annotated[PlainFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[str | None, only("medium", why="it cannot be chosen: leave it out, or ask in words")] = None


class Reasoning(Body):
    effort: Effort | None = None
    summary: Annotated[str | None, NOT_SUMMED_UP] = None
    generate_summary: Annotated[str | None, NOT_SUMMED_UP] = None


class Response(Answered):
    """A body of /v1/responses. The properties are what `Chat` has under other names."""

    NAMES: ClassVar[dict[str, str]] = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "tools[{}].function.name": "tools[{}].name",
        "tool_choice.function.name": "tool_choice.name",
    }

    input: Annotated[Text | PartsOf[AnyItem], EITHER]
    instructions: str | None = None
    metadata: Annotated[dict[Name64, Text512], Field(max_length=MAX_LABELS)] | None = None
    max_output_tokens: TokenLimit = None
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Word | Annotated[FlatNamedFunction, Tag("object")], CHOICE] | None = None
    previous_response_id: Annotated[str | None, only(why=NOT_STORED)] = None
    conversation: Annotated[str | None, only(why=NOT_STORED)] = None
    background: Annotated[
        bool | None, only(False, why="nothing is stored here that could be asked for later: leave it out")
    ] = None
    include: Annotated[list[Any] | None, only([], why="there is nothing more to include: leave it out")] = None
    truncation: Annotated[str | None, only("disabled", why="nothing is left out of a long input: shorten it")] = None

    max_completion_tokens = property(lambda self: self.max_output_tokens)
    reasoning_effort = property(lambda self: self.reasoning and self.reasoning.effort)
    response_format = property(lambda self: self.text and self.text.format)
    functions = property(lambda self: self.tools or [])

    @property
    def named_function(self) -> str | None:
        """The function that must be called."""
        return self.tool_choice.name if isinstance(self.tool_choice, FlatNamedFunction) else None

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The schema of a json_schema."""
        return getattr(self.response_format, "schema_", None)


def _message(item: Any) -> Message:
    """An item as a chat message."""
    if isinstance(item, MessageItem):
        return {"role": item.role, "content": content_of(item.content)}
    if isinstance(item, OutputItem):
        text = item.output if isinstance(item.output, str) else "\n".join(part.text for part in item.output)
        return {"role": "tool", "tool_call_id": item.call_id, "content": text}
    said: Message = {"role": "assistant", "content": ""}
    if isinstance(item, ReasoningItem):
        return {**said, "reasoning_content": "\n".join(part.text for part in item.content or item.summary or ())}
    function = {"name": item.name, "arguments": item.arguments}
    return {**said, "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}


def input_messages(body: Response) -> list[Message]:
    """`instructions` and `input` as chat messages for `Engine.prepare`.

    The items of one turn of the model (thinking, text, calls) become one message.

    Raises:
        ApiError: a system message that is not the first, or a call's output without the call.
    """
    messages: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    call_ids: set[str] = set()
    turn: Message | None = None  # the model's current turn, while its items are consecutive
    for i, item in enumerate(body.input):
        message = _message(item)
        if message["role"] in ("system", "developer") and messages:
            why = "a chat has one such message, its first: put all of it into instructions or there"
            reject(f"input[{i}].role", message["role"], why)
        call_ids.update(call["id"] for call in message.get("tool_calls", ()))
        if isinstance(item, OutputItem) and item.call_id not in call_ids:
            why = "no function_call before it has this call_id: send the whole conversation"
            reject(f"input[{i}].call_id", item.call_id, why)
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
    return messages


def _continues(turn: Message, message: Message) -> bool:
    """Whether a message belongs to the turn. A turn is thinking, then text, then calls; each part is optional."""
    if message.get("tool_calls"):
        return True
    return "reasoning_content" not in message and not turn["content"] and not turn.get("tool_calls")
