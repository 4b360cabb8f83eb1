"""The body of OpenAI's Responses API. Its input items become chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ...prompt.messages import Message
from .bodies import CHOICE, Answered, Effort, JsonSchema, Name, PlainFormat, TokenLimit, Word
from .fields import Body, Harmless, Many, Unread, only, reject
from .messages import (
    CACHE,
    DETAIL,
    ECHO,
    EITHER,
    MAX_TOOLS,
    Arguments,
    AudioPart,
    DataUrl,
    Function,
    FunctionName,
    PartsOf,
    Text,
    content_of,
    pictures_behind,
)

MAX_LABELS = 16  # pairs of `metadata`
Name64 = Annotated[str, Field(max_length=64)]
Text512 = Annotated[str, Field(max_length=512)]
NO_CONVERSATIONS = "conversations are not kept here: give previous_response_id, or the whole conversation as input"
NOT_SUMMED_UP = Harmless("the whole thinking is told")
DEFERRED = Harmless("every tool is shown at once", (False,))
OWN_TOOLS = ("function", "custom", "namespace")
CUSTOM_INPUT = "input"  # the one argument of the function that a custom tool becomes


class Item(Body):
    id: Any = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputText(Body):
    type: Literal["input_text"]
    text: str
    cache_control: CACHE = None


class OutputText(Body):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Body):
    type: Literal["input_image"]
    file_id: Annotated[str | None, only(why="no files are kept here: give image_url, a data URL")] = None
    detail: DETAIL = None
    image_url: DataUrl


class Thought(Body):
    type: Literal["reasoning_text", "summary_text"] | None = None
    text: str


ItemPart = Annotated[InputText | OutputText | InputImage, Field(discriminator="type")]
MessagePart = Annotated[InputText | OutputText | InputImage | AudioPart, Field(discriminator="type")]


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    phase: Literal["commentary", "final_answer"] | None = None
    name: Annotated[str | None, Harmless("a label of the client's")] = None
    content: Annotated[Text | PartsOf[MessagePart], EITHER]


class ReasoningItem(Item):
    type: Literal["reasoning"]
    encrypted_content: Annotated[str | None, ECHO] = None
    content: Many[Thought] | None = None
    summary: Many[Thought] | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: Arguments


class CustomCallItem(Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str


class OutputItem(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Annotated[Text | PartsOf[ItemPart], EITHER]
    name: Annotated[str | None, ECHO] = None


class ReferenceItem(Body):
    type: Literal["item_reference"]
    id: str


class ForeignItem(Unread):
    type: Literal[
        "web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call", "local_shell_call",
        "local_shell_call_output", "mcp_list_tools", "tool_search_call", "tool_search_output", "additional_tools",
    ]  # fmt: skip


def _with_type(item: Any) -> Any:
    return {**item, "type": item.get("type") or "message"} if isinstance(item, dict) else item


AnyItem = Annotated[
    Annotated[
        MessageItem | ReasoningItem | CallItem | CustomCallItem | OutputItem | ReferenceItem | ForeignItem,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]


class FlatTool(Function):
    type: Literal["function"]
    defer_loading: Annotated[bool | None, DEFERRED] = None
    output_schema: Annotated[Any, Harmless("results are read as they come")] = None


class CustomTool(Body):
    """A tool that takes a text. It becomes a function with one argument."""

    type: Literal["custom"]
    name: FunctionName
    description: str = ""
    format: dict[str, Any] | None = None
    defer_loading: Annotated[bool | None, DEFERRED] = None

    def function(self, name: str) -> Function:
        """The function, whose description has the grammar of the text."""
        grammar = (self.format or {}).get("definition")
        about = self.description + (f"\nThe input follows this grammar:\n{grammar}" if grammar else "")
        parameters = {"type": "object", "properties": {CUSTOM_INPUT: {"type": "string"}}, "required": [CUSTOM_INPUT]}
        return Function.model_construct(name=name, description=about, parameters=parameters)


OwnTool = Annotated[FlatTool | CustomTool, Field(discriminator="type")]


class Namespace(Body):
    """Tools under a name. Each becomes a function NAMESPACE.NAME."""

    type: Literal["namespace"]
    name: FunctionName
    description: Annotated[str | None, Harmless("every tool has a description of its own")] = None
    tools: Annotated[list[OwnTool], Field(max_length=MAX_TOOLS)]


class HostedTool(Unread):
    """A tool that a server runs itself. There are none here."""

    type: Annotated[str, Field(json_schema_extra={"not": {"enum": [*OWN_TOOLS]}})]


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in OWN_TOOLS else "hosted"


AnyTool = Annotated[
    Annotated[FlatTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[Namespace, Tag("namespace")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_kind_of_tool),
]


class FlatNamedFunction(Name):
    type: Annotated[str, only("function", "custom", why="a function or a custom tool alone can be named")]
    namespace: str | None = None


class FlatSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextSettings(Body):
    format: Annotated[PlainFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[str | None, Harmless("a hint: ask for it in words", ("medium",))] = None


class Reasoning(Body):
    effort: Effort | None = None
    context: Annotated[str | None, Harmless("templates choose the thoughts that are shown")] = None
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
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Word | Annotated[FlatNamedFunction, Tag("object")], CHOICE] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_tool_calls: Annotated[int | None, Harmless("of tools that a server runs, and there are none")] = None
    conversation: Annotated[Any, only(why=NO_CONVERSATIONS)] = None
    background: Annotated[bool | None, only(False, why="an answer cannot be asked for later: leave it out")] = None
    include: Annotated[list[Any] | None, Harmless("there is nothing more to include", ([],))] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, Harmless("an input that does not fit is refused", ("disabled",))
    ] = None

    max_completion_tokens = property(lambda self: self.max_output_tokens)
    reasoning_effort = property(lambda self: self.reasoning and self.reasoning.effort)
    response_format = property(lambda self: self.text and self.text.format)

    @property
    def own_tools(self) -> list[tuple[str | None, Any]]:
        """(namespace or None, tool) of the tools that are no hosted ones."""
        found: list[tuple[str | None, Any]] = []
        for tool in self.tools or ():
            if isinstance(tool, Namespace):
                found += [(tool.name, one) for one in tool.tools]
            elif not isinstance(tool, HostedTool):
                found.append((None, tool))
        return found

    @property
    def functions(self) -> list[Function]:
        """The tools as functions."""
        return [
            tool.function(full_name(space, tool.name))
            if isinstance(tool, CustomTool)
            else tool.model_copy(update={"name": full_name(space, tool.name)})
            for space, tool in self.own_tools
        ]

    @property
    def named_function(self) -> str | None:
        """The function that must be called."""
        choice = self.tool_choice
        return full_name(choice.namespace, choice.name) if isinstance(choice, FlatNamedFunction) else None

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The schema of a json_schema."""
        return getattr(self.response_format, "schema_", None)


def full_name(namespace: str | None, name: str) -> str:
    """The name of a namespace's tool as a function."""
    return name if namespace is None else f"{namespace}.{name}"


def _message(item: Any) -> Message:
    """An item as a chat message."""
    if isinstance(item, MessageItem):
        return {"role": item.role, "content": content_of(item.content)}
    if isinstance(item, OutputItem):
        content = content_of(item.output)
        if isinstance(content, list) and all(part["type"] == "text" for part in content):
            content = "\n".join(part["text"] for part in content)
        return {"role": "tool", "tool_call_id": item.call_id, "content": content}
    said: Message = {"role": "assistant", "content": ""}
    if isinstance(item, ReasoningItem):
        return {**said, "reasoning_content": "\n".join(part.text for part in item.content or item.summary or ())}
    arguments = {CUSTOM_INPUT: item.input} if isinstance(item, CustomCallItem) else item.arguments
    function = {"name": full_name(item.namespace, item.name), "arguments": arguments}
    return {**said, "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}


def input_items(body: Response) -> list[Any]:
    """The items of `input`. A text is a user's message."""
    if isinstance(body.input, str):
        return [MessageItem(role="user", content=body.input)]
    return list(body.input)


def input_messages(body: Response, earlier: Sequence[Any] = (), items: Sequence[Any] | None = None) -> list[Message]:
    """`instructions`, earlier items and `input` as chat messages for `Engine.prepare`.

    The items of one turn of the model (thinking, text, calls) become one message.

    Args:
        body: the request.
        earlier: items of the responses that it goes on from.
        items: those of `input`, if they were looked up already.

    Raises:
        ApiError: a call's output without the call.
    """
    messages: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    call_ids: set[str] = set()
    turn: Message | None = None  # the model's current turn, while its items are consecutive
    all_items = [*earlier, *(input_items(body) if items is None else items)]
    for i, item in enumerate(all_items, -len(earlier)):
        if isinstance(item, ForeignItem):
            continue
        message = _message(item)
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
    return pictures_behind(messages)


def _continues(turn: Message, message: Message) -> bool:
    """Whether a message belongs to the turn. A turn is thinking, then text, then calls; each part is optional."""
    if message.get("tool_calls"):
        return True
    return "reasoning_content" not in message and not turn["content"] and not turn.get("tool_calls")
