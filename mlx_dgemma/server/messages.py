"""Chat messages and tools as clients send them, checked; nothing a client names is opened."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import PromptError
from ..prompt.images import open_file
from .errors import ApiError
from .fields import Fields, shown
from .settings import Settings

Message = dict[str, Any]


def messages_of(fields: Fields, settings: Settings) -> list[Message]:
    """The body's `messages`, as `Engine.prepare` takes them; pictures are the bytes of their files.

    Raises:
        ApiError: something else than texts and pictures, a picture that is no data URL, too many of them, or an answer
            of a tool that was not called.
    """
    fields.need("messages")
    reader = _Messages(settings.pictures)
    return [reader.read(one) for one in fields.objects("messages")]


class _Messages:
    def __init__(self, pictures: int):
        self._pictures, self._left = pictures, pictures
        self._called: set[str] = set()  # ids

    def read(self, message: Fields) -> Message:
        message.need("role")
        role = message.choice("role", "system", "developer", "user", "assistant", "tool")
        read: Message = {"role": role}
        if role == "assistant":
            self._answer(message, read)
        else:
            message.need("content")
        if role == "tool":
            message.need("tool_call_id")
            read["tool_call_id"] = message.text("tool_call_id")
            if read["tool_call_id"] not in self._called:
                message.refuse("tool_call_id", "it should be the id of a call in an earlier assistant message")
        read["content"] = self._content(message, role)
        message.done()
        return read

    def _answer(self, message: Fields, read: Message) -> None:
        if thought := message.text("reasoning_content"):
            read["reasoning_content"] = thought
        calls = message.objects("tool_calls")
        if calls:
            read["tool_calls"] = [self._call(call) for call in calls]
        else:
            message.need("content")

    def _call(self, call: Fields) -> Message:
        for name in ("id", "function"):
            call.need(name)
        call.only("type", "function", why="functions alone can be called")
        call.take("index")
        self._called.add(key := call.text("id"))
        function = call.object("function")
        assert function is not None
        function.need("name")
        name, text = function.text("name"), function.text("arguments", "{}")
        try:
            arguments = json.loads(text)
            json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair is no character
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            function.refuse("arguments", "it should be a JSON object, written as a string")
        function.done()
        call.done()
        return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _content(self, message: Fields, role: str) -> Any:
        content = message.take("content")
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list) or not content:
            message.refuse("content", "it should be a string or a list of parts")
        parts = [self._part(part, role) for part in message.objects("content")]
        # Templates take an answer of a tool as one text.
        return "".join(part["text"] for part in parts) if role == "tool" else parts

    def _part(self, part: Fields, role: str) -> Message:
        kind = part.text("type")
        if kind == "text":
            part.need("text")
            read = {"type": "text", "text": part.text("text")}
        elif kind == "image_url" and role == "user":
            read = {"type": "image", "image": self._picture(part)}
        elif kind in ("video", "video_url"):
            part.refuse("type", "videos are not taken here: send some of their frames as image_url parts")
        else:
            part.refuse("type", f"it should be text{' or image_url' if role == 'user' else ''}")
        part.done()
        return read

    def _picture(self, part: Fields) -> bytes:
        part.need("image_url")
        picture = part.object("image_url")
        assert picture is not None
        picture.need("url")
        picture.only("detail", "auto", why="pictures take image_tokens instead: leave it out, or give auto")
        data = data_url(picture.text("url"), picture.path("url"))
        picture.done()
        if not self._left:
            raise ApiError(f"There are more than {self._pictures} pictures; send fewer.", "messages")
        self._left -= 1
        return data


def data_url(url: str, path: str) -> bytes:
    """The bytes in a `data:` URL; nothing else is a picture's source here.

    Args:
        path: of the field, for errors.

    Raises:
        ApiError: a web address, a file's name, or broken base64.
    """
    if url[:5].lower() != "data:":
        raise ApiError(
            f"{path} is {shown(url)}; nothing is fetched and no file is opened: send a data URL, such as "
            "data:image/png;base64,iVBORw0...",
            path,
        )
    try:
        with open_file(url)[1] as file:
            return file.read()
    except PromptError as error:
        raise ApiError(str(error), path) from None


def tools_of(fields: Fields) -> list[Message]:
    """The body's `tools`, each with a description and parameters; empty where there are none.

    Raises:
        ApiError: something else than functions, or a name twice.
    """
    tools: dict[str, Message] = {}
    for tool in fields.objects("tools"):
        tool.need("function")
        tool.only("type", "function", why="functions are the only tools here")
        function = tool.object("function")
        assert function is not None
        read = read_function(function)
        tool.done()
        if read["name"] in tools:
            function.refuse("name", "it stands twice: give every function a name of its own")
        tools[read["name"]] = {"type": "function", "function": read}
    return list(tools.values())


def read_function(function: Fields) -> Message:
    """A function's declaration: {"name", "description", "parameters"}, and "strict" where that is true."""
    function.need("name")
    name = function.text("name")
    if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name):
        function.refuse("name", "it should be 1 to 64 letters, digits, _, - or .")
    read = {
        "name": name,
        "description": function.text("description", ""),
        "parameters": {"type": "object", "properties": {}},
    }
    if parameters := function.object("parameters"):
        read["parameters"] = parameters.given
    if function.flag("strict", False):
        read["strict"] = True
    function.done()
    return read
