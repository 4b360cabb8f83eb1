"""The body of Anthropic's Messages API. Its content blocks become chat messages."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ...prompt.messages import Message
from .bodies import LABEL, MAX_STOPS, Regex, Shared, StopString, String, TokenLimit
from .fields import MAX_ITEMS, Body, Harmless, Many, Rule, doc, only, reject, whole
from .messages import EITHER, MAX_TOOLS, Function, PartsOf, Text

CACHED = Harmless("what a prompt shares with an earlier one is reused without it")
DECLINED = Harmless("nothing is declined here")
ELSEWHERE = Harmless("there is one place and one pace here")
SIGNED = Harmless("nothing is signed here")
NO_CITATIONS = only(False, why="answers have no citations here: leave it out, or give false")
NO_PDF = "no PDF is read, nothing is fetched and no files are kept here: send its text"
NO_URL = "nothing is fetched and no files are kept here: send base64"
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh"}
CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "required"}  # as `Chat` calls them
REMINDER = "<system-reminder>\n{}\n</system-reminder>"  # which agents of this API know already


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise PydanticCustomError("why", "it should be a file in base64, without a data: before it") from None


class Block(Body):
    cache_control: Annotated[dict[str, Any] | None, CACHED] = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Annotated[list[Any] | None, Harmless("an echo of an answer")] = None


class ImageSource(Body):
    type: Annotated[str, only("base64", why=NO_URL)]
    media_type: String = None
    data: Annotated[str, AfterValidator(_decoded), doc(contentEncoding="base64")]


class ImageBlock(Block):
    type: Literal["image"]
    source: ImageSource


class Citations(Body):
    enabled: Annotated[bool | None, NO_CITATIONS] = None


class DocumentSource(Body):
    type: Annotated[Literal["text", "content"], Rule(NO_PDF)]
    media_type: String = None
    data: String = None
    content: Annotated[Text | PartsOf[TextBlock], EITHER] | None = None


class DocumentBlock(Block):
    type: Literal["document"]
    source: DocumentSource
    title: String = None
    context: String = None
    citations: Citations | None = None


class SearchResultBlock(Block):
    type: Literal["search_result"]
    title: str
    source: str
    content: Many[TextBlock]
    citations: Citations | None = None


class ToolReferenceBlock(Block):
    type: Literal["tool_reference"]
    tool_name: str


ResultPart = Annotated[
    TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock, Field(discriminator="type")
]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultPart], Field(max_length=MAX_ITEMS)] | None = None
    is_error: bool | None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Annotated[dict[str, Any] | None, Harmless("an echo of an answer")] = None


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: Annotated[String, SIGNED] = None


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: Annotated[str, Harmless("only whoever encrypted it can read it")]


UserPart = Annotated[
    TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolResultBlock, Field(discriminator="type")
]
AssistantPart = Annotated[TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class UserMessage(Body):
    role: Literal["user"]
    content: Annotated[Text | PartsOf[UserPart], EITHER]


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantPart], Field(max_length=MAX_ITEMS)]


class SystemMessage(Body):
    role: Literal["system"]
    content: Annotated[Text | PartsOf[TextBlock], EITHER]
    clear_at: Literal["next_user_message", "never"] | None = None


AnyMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


class CustomTool(Block):
    name: Annotated[
        str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$"), Rule("it should be 1 to 128 letters, digits, _, - or .")
    ]
    type: Literal["custom"] = "custom"
    description: str = ""
    input_schema: Annotated[dict[str, Any], doc("A JSON Schema.")]
    strict: bool = False
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: Annotated[bool | None, Harmless("a call is sent once it is whole")] = None
    defer_loading: Annotated[bool | None, Harmless("every tool is told at once")] = None
    allowed_callers: Annotated[list[str] | None, Harmless("the model alone calls tools")] = None

    @property
    def function(self) -> Function:
        """The tool as `Chat` has it, its examples in the description. Its name may be longer than OpenAI's."""
        examples = [json.dumps(one, ensure_ascii=False) for one in self.input_examples or ()]
        text = "\n".join([self.description, "Examples:", *examples]) if examples else self.description
        given: dict[str, Any] = {
            "name": self.name,
            "description": text,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return Function.model_construct(**given)


class ServerTool(Body):
    model_config = ConfigDict(extra="allow", strict=True)

    type: Annotated[str, Harmless("a tool of Anthropic's own, which nobody runs here")]


def _kind_of_tool(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return "custom" if not isinstance(kind, str) or kind == "custom" else "server"


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[ServerTool, Tag("server")], Discriminator(_kind_of_tool)
]


class ToolChoice(Body):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedTool(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


AnyChoice = Annotated[ToolChoice | NamedTool, Field(discriminator="type")]


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int | None, whole(1)] = None
    display: Annotated[Literal["summarized", "omitted", "updates"] | None, doc("omitted: a thought has no text.")] = (
        None
    )
    block_binding: Annotated[dict[str, Any] | None, SIGNED] = None


class Format(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema"), doc("A JSON Schema.")]


Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS)]


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None
    task_budget: Annotated[dict[str, Any] | None, Harmless("a hint: max_tokens is the bound")] = None


class Messages(Shared):
    """A body of /v1/messages. The properties are what `Chat` has under other names."""

    NAMES: ClassVar[dict[str, str]] = {
        "stop": "stop_sequences",
        "response_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "tools[{}].function.name": "tools[{}].name",
        "tool_choice.function.name": "tool_choice.name",
    }

    messages: Many[AnyMessage]
    system: Annotated[Text | PartsOf[TextBlock], EITHER] | None = None
    max_tokens: TokenLimit = None
    stop: Annotated[Stops | None, Field(alias="stop_sequences")] = None
    thought: Annotated[Thinking | None, Field(alias="thinking")] = None
    output_config: OutputConfig | None = None
    output_format: Annotated[Format | None, doc("An older name of output_config.format.")] = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    choice: Annotated[AnyChoice | None, Field(alias="tool_choice")] = None
    regex: Regex = None
    cache_control: Annotated[dict[str, Any] | None, CACHED] = None
    context_management: Annotated[dict[str, Any] | None, Harmless("nothing is cleared: all is read")] = None
    metadata: Annotated[dict[str, Any] | None, LABEL] = None
    billing_policy: Annotated[Any, LABEL] = None
    user_profile_id: Annotated[String, LABEL] = None
    workspace_id: Annotated[String, LABEL] = None
    diagnostics: Annotated[dict[str, Any] | None, LABEL] = None
    betas: Annotated[list[Any] | None, LABEL] = None
    anthropic_beta: Annotated[list[Any] | None, LABEL] = None
    anthropic_version: Annotated[String, LABEL] = None
    fallbacks: Annotated[Any, DECLINED] = None
    fallback_credit_token: Annotated[Any, DECLINED] = None
    inference_geo: Annotated[String, ELSEWHERE] = None
    service_tier: Annotated[String, ELSEWHERE] = None
    speed: Annotated[String, ELSEWHERE] = None
    container: Annotated[Any, only(why="there are no containers here: leave it out")] = None
    mcp_servers: Annotated[list[Any] | None, only([], why="no other server is asked: leave it out")] = None
    compaction: Annotated[Any, only(why="nothing is summed up here: leave it out")] = None
    thread: Annotated[Any, only(why="nothing is stored here: send the whole conversation")] = None

    @property
    def thinking(self) -> bool | None:
        """Whether to think."""
        return None if self.thought is None else self.thought.type != "disabled"

    @property
    def thinking_budget(self) -> int | None:
        """Tokens after which a thought is ended."""
        return self.thought.budget_tokens if self.thought and self.thinking else None

    @property
    def reasoning_effort(self) -> str | None:
        """How much to think. It switches no thinking on, as it does in `Chat`."""
        effort = self.output_config.effort if self.output_config and self.thinking else None
        return EFFORTS[effort] if effort else None

    @property
    def response_format(self) -> Format | None:
        """The form of the answer."""
        return (self.output_config and self.output_config.format) or self.output_format

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The schema of the answer."""
        return self.response_format.schema_ if self.response_format else None

    @property
    def constraints(self) -> dict[str, tuple[str, Any]]:
        """By their paths the schema and the pattern of the answer."""
        given = {"regex": ("regex", self.regex), self.path("response_format"): ("schema", self.schema_asked)}
        return {path: one for path, one in given.items() if one[1] is not None}

    @property
    def functions(self) -> list[Function]:
        """The tools that the model may call."""
        return [tool.function for tool in self.tools or () if isinstance(tool, CustomTool)]

    @property
    def tool_choice(self) -> str | None:
        """Whether to call, in a word of `Chat`'s."""
        return CHOICES[self.choice.type] if self.choice else None

    @property
    def named_function(self) -> str | None:
        """The tool that must be called."""
        return self.choice.name if isinstance(self.choice, NamedTool) else None

    @property
    def parallel_tool_calls(self) -> bool | None:
        """Whether there may be several calls."""
        off = self.choice.disable_parallel_tool_use if self.choice else None
        return None if off is None else not off


def conversation(body: Messages) -> tuple[list[Message], str]:
    """`system` and `messages` as chat messages for `Engine.prepare`, and the text with which the answer begins.

    That is the text of an assistant's message at the end. A system message that is not at the beginning stays where
    it is, as a marked text of the user's, so that what was read before it needs not be read again.

    Raises:
        ApiError: a tool's result without the call, or a call at the end without its result.
    """
    found: list[Message] = [{"role": "system", "content": [_text(body.system)]}] if body.system else []
    last, begun = len(body.messages) - 1, ""
    last_user = max((i for i, one in enumerate(body.messages) if one.role == "user"), default=-1)
    call_ids: set[str] = set()
    for i, message in enumerate(body.messages):
        if isinstance(message, SystemMessage):
            if not (message.clear_at == "next_user_message" and i < last_user):
                _add_system(found, _text(message.content))
        elif isinstance(message, UserMessage):
            _add_user(found, message.content, call_ids, f"messages[{i}].content")
        elif i == last:
            begun = _beginning(message.content, f"messages[{i}].content")
        else:
            found.append(_said(message.content))
            call_ids.update(call["id"] for call in found[-1].get("tool_calls", ()))
    return [_joined(one) for one in found], begun


def _joined(message: Message) -> Message:
    """A message whose texts and parts were collected; they are joined once, which takes time in their length."""
    if message["role"] == "system":
        return {**message, "content": "\n\n".join(message["content"])}
    return {**message, "content": _merged(message["content"])} if message["role"] == "user" else message


def _add_system(found: list[Message], text: str) -> None:
    if not found:
        found.append({"role": "system", "content": [text]})
    elif found[-1]["role"] == "system":
        found[-1]["content"].append(text)
    else:
        _add_parts(found, [{"type": "text", "text": REMINDER.format(text)}])


def _add_user(found: list[Message], content: str | Sequence[Any], call_ids: set[str], path: str) -> None:
    if isinstance(content, str):
        _add_parts(found, [{"type": "text", "text": content}])
        return
    for i, block in enumerate(content):
        if not isinstance(block, ToolResultBlock):
            _add_parts(found, _parts([block]))
            continue
        if block.tool_use_id not in call_ids:
            why = "it should be the id of a tool_use in an earlier assistant message"
            reject(f"{path}[{i}].tool_use_id", block.tool_use_id, why)
        text = [TextBlock(type="text", text=block.content)] if isinstance(block.content, str) else block.content or []
        failed = [{"type": "text", "text": "Error:"}] if block.is_error else []
        result = _merged([*failed, *_parts(text)])
        found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})


def _add_parts(found: list[Message], parts: list[Message]) -> None:
    """Add to what the user says. The parts of a turn become one message, as this API reads them."""
    if not found or found[-1]["role"] != "user":
        found.append({"role": "user", "content": []})
    found[-1]["content"] += parts


def _merged(parts: list[Message]) -> str | list[Message]:
    """Parts with a line break between texts that follow each other, which templates would leave out."""
    merged: list[Message] = []
    for is_text, grouped in groupby(parts, lambda part: part["type"] == "text"):
        group = list(grouped)
        merged += [{"type": "text", "text": "\n".join(part["text"] for part in group)}] if is_text else group
    if len(merged) == 1 and merged[0]["type"] == "text":
        return str(merged[0]["text"])
    return merged or ""


def _parts(blocks: Iterable[Any]) -> list[Message]:
    """Blocks as parts of a message's content; a picture is the bytes of its file."""
    return [
        {"type": "image", "image": block.source.data}
        if isinstance(block, ImageBlock)
        else {"type": "text", "text": _block_text(block)}
        for block in blocks
    ]


def _block_text(block: Any) -> str:
    if isinstance(block, DocumentBlock):
        text = block.source.data if block.source.type == "text" else _text(block.source.content)
        return "\n".join(one for one in (block.title, block.context, text) if one)
    if isinstance(block, SearchResultBlock):
        return "\n".join([block.title, block.source, _text(block.content)])
    return f"The tool {block.tool_name}." if isinstance(block, ToolReferenceBlock) else block.text


def _text(content: str | Sequence[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


def _said(content: str | Sequence[Any]) -> Message:
    """A turn of the model as a message."""
    blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else content
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    said: Message = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    return {**said, "tool_calls": calls} if calls else said


def _beginning(content: str | Sequence[Any], path: str) -> str:
    said = _said(content)
    if said.get("tool_calls"):
        reject(path, content, "its calls have no results: add a user message with a tool_result for each")
    return str(said["content"])
