"""Read and check the JSON objects of a data file, before anything is encoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

NEXT_ROLES = {  # {role of a message: roles that may follow}; "" is the start, "call" an answer with tool calls
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
OPTIONAL_KEYS: dict[str, dict[str, Any]] = {  # keys of a message besides role and content, with their types
    "assistant": {"tool_calls": list, "reasoning_content": str},
    "tool": {"tool_call_id": str, "name": str},
}


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for every line that is not blank; a place is "train.jsonl, line 3".

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} is 0x{line[error.start]:02x}"
            raise DataError(f"{where}: This is not UTF-8: {byte}; convert the file, for example with iconv.") from None
        if text.strip():
            yield where, text


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for every line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object.
    """
    for where, text in read_lines(path):
        try:
            record = json.loads(text)
            json.dumps(record, ensure_ascii=False).encode()  # fails on unpaired surrogates
        except UnicodeEncodeError:
            raise DataError(f"{where}: This contains an unpaired surrogate; write whole characters.") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, column {error.colno}: This is not JSON ({error.msg}); correct it.") from None
        except (ValueError, RecursionError) as error:  # a number with too many digits, or lists nested too deeply
            raise DataError(f"{where}: This cannot be read ({error}); correct it.") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: This is of type {type(record).__name__}; it should be an object.")
        yield where, record


def thinking_of(record: dict[str, Any]) -> bool:
    """True if a record switches thinking on, with `thinking` or `enable_thinking`.

    Raises:
        DataError: a value that is not a bool, or two that contradict each other.
    """
    given = {key: value for key in ("thinking", "enable_thinking") if (value := record.get(key)) is not None}
    for key, value in given.items():
        if not isinstance(value, bool):
            raise DataError(f"{key} is {value!r}; it should be true or false.")
    if len(set(given.values())) > 1:
        raise DataError("thinking and enable_thinking contradict each other; leave one out.")
    return any(given.values())


def tools_of(record: dict[str, Any]) -> list[dict] | None:
    """The tools that a record declares, or None.

    Raises:
        DataError: they are not a list of function declarations.
    """
    tools = record.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"tools is of type {type(tools).__name__}; it should be a list of function declarations.")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise DataError(
                f"Tool {i} is not a function declaration; it should be "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
            )
    return tools


def check_message(i: int, given: Any) -> dict[str, Any]:
    """Message i of a chat without the keys that are null.

    Raises:
        DataError: a key has no effect there, or a value has the wrong type.
    """
    if not isinstance(given, dict):
        raise DataError(f"Message {i} is of type {type(given).__name__}; it should be an object.")
    role = given.get("role")
    known = {"role": str, "content": (str, list), **(OPTIONAL_KEYS.get(role, {}) if isinstance(role, str) else {})}
    message = {key: value for key, value in given.items() if value is not None}
    for key, value in message.items():
        if key not in known:
            raise DataError(f"Message {i} has the key {key}, which has no effect there; leave it out.")
        if not isinstance(value, known[key]):
            kinds = {str: "a string", list: "a list"}.get(known[key], "a string or a list of parts")
            raise DataError(f"Message {i} has {key} of type {type(value).__name__}; it should be {kinds}.")
    if "reasoning_content" in message:
        message["reasoning_content"] = message["reasoning_content"].strip()
    for call in message.get("tool_calls", ()):
        if not isinstance(call, dict) or not isinstance(call.get("id", ""), (str, type(None))):
            raise DataError(f"Message {i} has a tool call that cannot be read: {call!r}.")
    return message


def join_or(words: Sequence[str]) -> str:
    """a, b or c."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
