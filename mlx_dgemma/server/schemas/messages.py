"""Messages, pictures and tools of a request. No URL is fetched and no file is opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ...errors import PromptError
from ...prompt.images import open_file
from ...prompt.messages import Message
from .fields import MAX_ITEMS, Body, Many, Rule, doc, only, reject, reject_missing

MAX_TOOLS = 512
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
NO_DETAIL = "pictures take image_tokens instead: leave it out, or give auto"
T = TypeVar("T")


def parse_data_url(url: str) -> bytes:
    """The bytes in a `data:` URL, the only source of pictures that the server accepts.

    Raises:
        PydanticCustomError: a web address, a file name, or invalid base64.
    """
    if url[:5].lower() != "data:":
        why = "nothing is fetched and no file is opened: send a data URL, such as data:image/png;base64,iVBORw0..."
        raise PydanticCustomError("why", why)  # type: ignore[arg-type]
    try:
        with open_file(url)[1] as file:
            return file.read()
    except PromptError as error:
        raise PydanticCustomError("sentence", "{text}", {"text": str(error)}) from None


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments of a function call, which are JSON in a string."""
    try:
        arguments = json.loads(text)
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # raises for a lone surrogate
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PydanticCustomError("why", "it should be a JSON object, written as a string")
    return arguments


def _text_or_parts(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) and value else None


EITHER = Discriminator(
    _text_or_parts, custom_error_type="why", custom_error_message="it should be a string or a list that is not empty"
)
Text = Annotated[str, Tag("text"), doc(pattern="\\S")]
PartsOf = Annotated[list[T], Field(min_length=1, max_length=MAX_ITEMS), Tag("parts")]
DataUrl = Annotated[str, AfterValidator(parse_data_url), doc("A data URL.", pattern="^[dD][aA][tT][aA]:")]
Arguments = Annotated[str, AfterValidator(parse_arguments), doc(contentMediaType="application/json")]
FunctionOnly = Annotated[str, only("function", why="functions are the only tools here")]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: DataUrl
    detail: Annotated[str | None, only("auto", why=NO_DETAIL)] = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Texts = Annotated[Text | PartsOf[TextPart], EITHER]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Named(Body):
    name: str | None = None


class SystemMessage(Named):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(Named):
    role: Literal["user"]
    content: Annotated[Text | PartsOf[Part], EITHER]


class CalledFunction(Body):
    name: str
    arguments: Arguments = "{}"


class ToolCall(Body):
    id: str
    function: CalledFunction
    type: FunctionOnly = "function"
    index: Any = Field(None, exclude=True)


class AssistantMessage(Named):
    role: Literal["assistant"]
    content: Texts | None = None
    reasoning_content: str | None = None
    tool_calls: Many[ToolCall] | None = None


class ToolMessage(Named):
    role: Literal["tool"]
    content: Texts
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    name: Annotated[
        str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$"), Rule("it should be 1 to 64 letters, digits, _, - or .")
    ]
    description: str = ""
    parameters: Annotated[dict[str, Any], doc("A JSON Schema.")] = Field(NO_PARAMETERS)
    strict: bool = False


class Tool(Body):
    function: Function
    type: FunctionOnly = "function"


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def content_of(content: str | Sequence[Any] | None) -> Any:
    """The content of a message as `Engine.prepare` takes it; a picture is the bytes of its file."""
    if not isinstance(content, list):
        return content
    pictures = [getattr(part, "image_url", None) for part in content]
    return [
        {"type": "image", "image": getattr(picture, "url", picture)} if picture else {"type": "text", "text": part.text}
        for part, picture in zip(content, pictures)
    ]


def chat_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages as `Engine.prepare` takes them.

    Raises:
        ApiError: an assistant's message without content or calls, or a tool's result without the call.
    """
    found: list[Message] = []
    call_ids: set[str] = set()
    for i, message in enumerate(messages):
        given = message.model_dump(exclude_none=True, exclude={"content"}, warnings=False)
        content = content_of(message.content)
        call_ids.update(call["id"] for call in given.get("tool_calls", ()))
        if content is None and not given.get("tool_calls"):
            reject_missing(f"messages[{i}].content")
        if message.role == "tool":
            if message.tool_call_id not in call_ids:
                why = "it should be the id of a call in an earlier assistant message"
                reject(f"messages[{i}].tool_call_id", message.tool_call_id, why)
            if isinstance(content, list):  # chat templates take a tool result as one string
                content = "".join(part["text"] for part in content)
        found.append({**given, "content": content})
    return found


def tool_declarations(functions: Sequence[Function], path: str) -> list[Message]:
    """Functions as `Engine.prepare` takes tools.

    Args:
        functions: of the request.
        path: of a function's name in the request, with {} for its index.

    Raises:
        ApiError: a duplicate name.
    """
    names: set[str] = set()
    for i, function in enumerate(functions):
        if function.name in names:
            reject(path.format(i), function.name, "it stands twice: give every function a name of its own")
        names.add(function.name)
    shown = [{"name", "description", "parameters", *(["strict"] if one.strict else [])} for one in functions]
    return [{"type": "function", "function": one.model_dump(include=part)} for one, part in zip(functions, shown)]
