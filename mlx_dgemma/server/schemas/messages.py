"""Messages, pictures and tools of a request. No URL is fetched and no file is opened."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ...errors import PromptError
from ...prompt.images import open_file
from ...prompt.messages import Message
from .fields import MAX_ITEMS, Body, Harmless, Many, Rule, doc, only, reject

MAX_TOOLS = 512
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
MAX_NAME = 128
PICTURE = "(a picture, shown below)"
ECHO = Harmless("an echo of another server's answer")
CACHE = Annotated[Any, Harmless("prefixes are kept without being asked")]
DETAIL = Annotated[str | None, Harmless("image_tokens bounds what pictures take", ("auto",))]
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


def parse_base64(text: str) -> bytes:
    """The bytes of an audio file."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise PydanticCustomError("why", "it should be a file's bytes in base64") from None


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments of a function call, which are JSON in a string; an empty one has none."""
    try:
        arguments = json.loads(text or "{}")
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
Base64 = Annotated[str, AfterValidator(parse_base64), doc(contentEncoding="base64")]
Arguments = Annotated[str, AfterValidator(parse_arguments), doc(contentMediaType="application/json")]
FunctionOnly = Annotated[str, only("function", why="functions are the only tools here")]


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: CACHE = None
    annotations: Annotated[list[Any] | None, ECHO] = None


class ImageUrl(Body):
    url: DataUrl
    detail: DETAIL = None


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl
    cache_control: CACHE = None


class InputAudio(Body):
    data: Base64
    format: Annotated[Literal["wav", "mp3"], doc("The file itself says what it is.")]


class AudioPart(Body):
    type: Literal["input_audio"]
    input_audio: InputAudio
    cache_control: CACHE = None


Texts = Annotated[Text | PartsOf[TextPart], EITHER]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
UserPart = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


class Named(Body):
    name: str | None = None
    cache_control: CACHE = None
    id: Annotated[Any, ECHO] = None
    provider_specific_fields: Annotated[Any, ECHO] = None
    extra_content: Annotated[Any, ECHO] = None


class SystemMessage(Named):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(Named):
    role: Literal["user"]
    content: Annotated[Text | PartsOf[UserPart], EITHER]


class CalledFunction(Body):
    name: str
    arguments: Arguments = "{}"
    thought_signature: Annotated[Any, ECHO] = None
    provider_specific_fields: Annotated[Any, ECHO] = None


class ToolCall(Body):
    id: str
    function: CalledFunction
    type: FunctionOnly = "function"
    index: Any = Field(None, exclude=True)
    thought_signature: Annotated[Any, ECHO] = None
    provider_specific_fields: Annotated[Any, ECHO] = None
    extra_content: Annotated[Any, ECHO] = None
    cache_control: CACHE = None


class AssistantMessage(Named):
    role: Literal["assistant"]
    content: Texts | None = None
    reasoning_content: str | None = None
    tool_calls: Many[ToolCall] | None = None
    refusal: Annotated[str | None, ECHO] = None
    annotations: Annotated[list[Any] | None, ECHO] = None
    reasoning: Annotated[Any, ECHO] = None
    reasoning_details: Annotated[Any, ECHO] = None
    thinking_blocks: Annotated[Any, ECHO] = None
    thought_signature: Annotated[Any, ECHO] = None
    audio: Annotated[Any, only(why="there is no sound here: give the text as content")] = None
    function_call: Annotated[Any, only(why="calls are given as tool_calls: write it there")] = None


class ToolMessage(Named):
    role: Literal["tool"]
    content: Annotated[Text | PartsOf[Part], EITHER]
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


FunctionName = Annotated[
    str,
    Field(pattern=f"^[a-zA-Z0-9_.:/-]{{1,{MAX_NAME}}}$"),
    Rule(f"it should be 1 to {MAX_NAME} letters, digits, _, -, ., : or /"),
]


class Function(Body):
    name: FunctionName
    description: str = ""
    parameters: Annotated[dict[str, Any], doc("A JSON Schema.")] = Field(NO_PARAMETERS)
    strict: bool = False
    cache_control: CACHE = None


class Tool(Body):
    function: Function
    type: FunctionOnly = "function"
    cache_control: CACHE = None


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def content_of(content: str | Sequence[Any] | None) -> Any:
    """The content of a message as `Engine.prepare` takes it; a picture or audio is the bytes of its file."""
    return [_part_of(part) for part in content] if isinstance(content, list) else content


def _part_of(part: Any) -> Message:
    if (audio := getattr(part, "input_audio", None)) is not None:
        return {"type": "audio", "audio": audio.data}
    if (picture := getattr(part, "image_url", None)) is not None:
        return {"type": "image", "image": getattr(picture, "url", picture)}
    return {"type": "text", "text": part.text}


def chat_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages as `Engine.prepare` takes them.

    Raises:
        ApiError: a tool's result without the call.
    """
    found: list[Message] = []
    call_ids: set[str] = set()
    for i, message in enumerate(messages):
        given = _read_of(message)
        content = content_of(message.content)
        call_ids.update(call["id"] for call in given.get("tool_calls", ()))
        if content is None and not given.get("tool_calls"):
            content = ""
        if message.role == "tool":
            if message.tool_call_id not in call_ids:
                why = "it should be the id of a call in an earlier assistant message"
                reject(f"messages[{i}].tool_call_id", message.tool_call_id, why)
            if isinstance(content, list) and all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)  # which chat templates take as one string
        found.append({**given, "content": content})
    return pictures_behind(found)


def pictures_behind(messages: Sequence[Message]) -> list[Message]:
    """Messages with the pictures of tools' results in a user's message behind the results.

    Chat templates take a result as one string, which has `PICTURE` where a picture was.
    """
    found: list[Message] = []
    pictures: list[Message] = []
    for message in messages:
        if message["role"] != "tool" and pictures:
            found.append({"role": "user", "content": pictures})
            pictures = []
        if message["role"] == "tool" and isinstance(message["content"], list):
            pictures += [part for part in message["content"] if part["type"] == "image"]
            texts = [part.get("text", PICTURE) for part in message["content"]]
            message = {**message, "content": "\n".join(texts)}  # noqa: PLW2901
        found.append(message)
    return [*found, {"role": "user", "content": pictures}] if pictures else found


def _read_of(message: Any) -> Message:
    """What is read of a message, its content aside."""
    given: Message = message.model_dump(
        include={"role", "name", "reasoning_content", "tool_call_id"}, exclude_none=True, warnings=False
    )
    if calls := getattr(message, "tool_calls", None):
        given["tool_calls"] = [
            {
                "id": one.id,
                "type": one.type,
                "function": {"name": one.function.name, "arguments": one.function.arguments},
            }
            for one in calls
        ]
    return given


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
