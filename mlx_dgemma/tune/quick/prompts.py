"""Prompts without answers: one a line, as text or as JSON objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, PromptError
from ...prompt.messages import Message, messages_of, parts_of
from ..records import check_message, read_lines, read_records, thinking_of, tools_of

if TYPE_CHECKING:
    from ...engine import Engine
    from ...prompt.opened import Opened


@dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
        where: its place, such as "prompts.jsonl, line 3".
        messages: the conversation that is to be answered.
        tokens: the same as token ids, with the generation prompt.
        thinking: True if thinking is switched on.
        tools: function declarations, or None.
        family: what its record says of its family, or "".
    """

    where: str
    messages: list[Message]
    tokens: list[int]
    thinking: bool = False
    tools: list[dict[str, Any]] | None = None
    family: str = ""


def read_prompts(engine: Engine | Opened, source: str | Path, by: str | None = None) -> list[Question]:
    """Read a file of prompts. Blank lines are skipped, answers that it has are not looked at.

    Args:
        engine: with the tokenizer and the chat template; the weights are not needed.
        source: a .jsonl file with `prompt` or `messages` (and `tools`, `thinking`) in every line; of any other file
            each line is a prompt.
        by: field of the records that names the family; None for none.

    Raises:
        DataError: the file or a line cannot be used; the message names it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; give a file with one prompt a line.")
    if by and path.suffix != ".jsonl":
        raise DataError(f"{path} has no field {by}, since it is no .jsonl file; give one, or leave the families out.")
    found, records = [], read_records(path)
    if path.suffix != ".jsonl":
        records = ((where, {"prompt": text.strip()}) for where, text in read_lines(path))
    for where, record in records:
        try:
            found.append(_question(engine, where, record, by))
        except (DataError, PromptError) as error:
            raise DataError(f"{where}: {error}") from None
    if not found:
        raise DataError(f"{path.name} contains no prompts; write one a line.")
    return found


def _question(engine: Engine | Opened, where: str, record: dict[str, Any], by: str | None) -> Question:
    prompt, given = record.get("prompt"), record.get("messages")
    if (prompt is None) == (given is None):
        raise DataError(f"This has {'neither' if given is None else 'both'} of prompt and messages; give one of them.")
    if record.get("images"):
        raise DataError("This has pictures, which cannot be learned from here; leave it out.")
    thinking, tools = thinking_of(record), tools_of(record)
    if given is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"prompt is {prompt!r}; it should be a text.")
        chat = messages_of(prompt)
    else:
        if not isinstance(given, list) or not given:
            raise DataError(f"messages is {given!r}; it should be a list of messages.")
        chat = messages_of([check_message(i, message) for i, message in enumerate(given)])
        if chat[-1]["role"] == "assistant":  # an expected answer
            chat = chat[:-1]
        if not chat or chat[-1]["role"] not in ("user", "tool"):
            raise DataError("The messages end without a question; the last one but an answer should be a user's.")
        if parts_of(chat, "image", "video"):
            raise DataError("This has pictures, which cannot be learned from here; leave it out.")
    if by is not None and record.get(by) is None:
        raise DataError(f"This has no field {by}, which is to name its family; add it, or leave the families out.")
    tokens = engine.builder.prompt_tokens(chat, thinking, tools).tokens
    engine.builder.check_room(len(tokens))
    return Question(where, chat, tokens, thinking, tools, "" if by is None else str(record[by]))
