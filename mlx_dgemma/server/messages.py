"""Chat messages and tools of a request, validated. No URL is fetched and no file is opened."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import PromptError
from ..prompt.images import open_file
from ..prompt.messages import Message
from .errors import ApiError
from .fields import Fields, format_value
from .settings import Settings


def parse_messages(fields: Fields, settings: Settings) -> list[Message]:
    """Read `messages` in the form that `Engine.prepare` takes, with each picture as the bytes of its file.

    Raises:
        ApiError: a part that is neither text nor picture, a picture that is not a data URL, too many pictures, or a
            tool result without the tool call.
    """
    fields.require("messages")
    parser = _MessageParser(settings.pictures)
    return [parser.parse(one) for one in fields.objects("messages")]


class _MessageParser:
    def __init__(self, max_pictures: int):
        self._max_pictures, self._pictures_left = max_pictures, max_pictures
        self._call_ids: set[str] = set()

    def parse(self, message: Fields) -> Message:
        message.require("role")
        role = message.choice("role", "system", "developer", "user", "assistant", "tool")
        parsed: Message = {"role": role}
        if role == "assistant":
            self._assistant(message, parsed)
        else:
            message.require("content")
        if role == "tool":
            message.require("tool_call_id")
            parsed["tool_call_id"] = message.text("tool_call_id")
            if parsed["tool_call_id"] not in self._call_ids:
                message.reject("tool_call_id", "it should be the id of a call in an earlier assistant message")
        parsed["content"] = self._content(message, role)
        message.reject_unknown()
        return parsed

    def _assistant(self, message: Fields, parsed: Message) -> None:
        if thought := message.text("reasoning_content"):
            parsed["reasoning_content"] = thought
        calls = message.objects("tool_calls")
        if calls:
            parsed["tool_calls"] = [self._call(call) for call in calls]
        else:
            message.require("content")

    def _call(self, call: Fields) -> Message:
        for name in ("id", "function"):
            call.require(name)
        call.allow_only("type", "function", why="functions alone can be called")
        call.get("index")
        self._call_ids.add(call_id := call.text("id"))
        function = call.object("function")
        assert function is not None
        function.require("name")
        name, text = function.text("name"), function.text("arguments", "{}")
        try:
            arguments = json.loads(text)
            json.dumps(arguments, ensure_ascii=False).encode()  # raises for a lone surrogate
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            function.reject("arguments", "it should be a JSON object, written as a string")
        function.reject_unknown()
        call.reject_unknown()
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _content(self, message: Fields, role: str) -> Any:
        content = message.get("content")
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list) or not content:
            message.reject("content", "it should be a string or a list of parts")
        parts = [self._part(part, role) for part in message.objects("content")]
        # Chat templates take a tool result as one string.
        return "".join(part["text"] for part in parts) if role == "tool" else parts

    def _part(self, part: Fields, role: str) -> Message:
        kind = part.text("type")
        if kind == "text":
            part.require("text")
            parsed = {"type": "text", "text": part.text("text")}
        elif kind == "image_url" and role == "user":
            parsed = {"type": "image", "image": self._picture(part)}
        elif kind in ("video", "video_url"):
            part.reject("type", "videos are not taken here: send some of their frames as image_url parts")
        else:
            part.reject("type", f"it should be text{' or image_url' if role == 'user' else ''}")
        part.reject_unknown()
        return parsed

    def _picture(self, part: Fields) -> bytes:
        part.require("image_url")
        picture = part.object("image_url")
        assert picture is not None
        picture.require("url")
        picture.allow_only("detail", "auto", why="pictures take image_tokens instead: leave it out, or give auto")
        data = decode_data_url(picture.text("url"), picture.path("url"))
        picture.reject_unknown()
        if not self._pictures_left:
            raise ApiError(f"There are more than {self._max_pictures} pictures; send fewer.", "messages")
        self._pictures_left -= 1
        return data


def decode_data_url(url: str, path: str) -> bytes:
    """The bytes in a `data:` URL, the only source of pictures that the server accepts.

    Args:
        url: the field's value.
        path: the field's path, for error messages.

    Raises:
        ApiError: a web address, a file name, or invalid base64.
    """
    if url[:5].lower() != "data:":
        raise ApiError(
            f"{path} is {format_value(url)}; nothing is fetched and no file is opened: send a data URL, such as "
            "data:image/png;base64,iVBORw0...",
            path,
        )
    try:
        with open_file(url)[1] as file:
            return file.read()
    except PromptError as error:
        raise ApiError(str(error), path) from None


def parse_tools(fields: Fields) -> list[Message]:
    """Read `tools`, each with a description and parameters; an empty list if there are none.

    Raises:
        ApiError: a tool that is not a function, or a duplicate name.
    """
    tools: dict[str, Message] = {}
    for tool in fields.objects("tools"):
        tool.require("function")
        tool.allow_only("type", "function", why="functions are the only tools here")
        function = tool.object("function")
        assert function is not None
        parsed = parse_function(function)
        tool.reject_unknown()
        if parsed["name"] in tools:
            function.reject("name", "it stands twice: give every function a name of its own")
        tools[parsed["name"]] = {"type": "function", "function": parsed}
    return list(tools.values())


def parse_function(function: Fields) -> Message:
    """Read a function declaration: {"name", "description", "parameters"}, and "strict" if it is true."""
    function.require("name")
    name = function.text("name")
    if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name):
        function.reject("name", "it should be 1 to 64 letters, digits, _, - or .")
    parsed = {
        "name": name,
        "description": function.text("description", ""),
        "parameters": {"type": "object", "properties": {}},
    }
    if parameters := function.object("parameters"):
        parsed["parameters"] = parameters.data
    if function.flag("strict", False):
        parsed["strict"] = True
    function.reject_unknown()
    return parsed
