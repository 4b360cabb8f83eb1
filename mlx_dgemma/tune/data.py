"""Training and evaluation data: JSON lines with chats, with prompts and completions, or with plain texts.

A prompt is encoded exactly as in inference. The answer is what the chat template writes after it, up to the end token.
Templates therefore need no marks for the trained tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError, PromptError
from ..prompt.messages import Message, messages_of, parts_of
from .records import NEXT_ROLES, check_message, join_or, read_records, thinking_of, tools_of

if TYPE_CHECKING:
    from ..engine import Engine


SPLITS = ("train", "valid", "test")
TURNS = ("last", "all")
FORMS = (("messages",), ("prompt", "completion"), ("text",))
IMAGES = "png jpg jpeg gif webp tif tiff bmp ppm avif".split()


@dataclass(frozen=True)
class Target:
    """One answer to train on.

    Attributes:
        prompt: token ids of the conversation up to this turn as inference encodes them, with the generation prompt and
            a placeholder for each soft token of an image.
        answer: token ids to generate: thinking, tool calls, text, and the end token.
        images: the prompt's images in order, as paths or `data:` URLs; see `PromptBuilder.load_image`.
    """

    prompt: list[int]
    answer: list[int]
    images: list[str]


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        where: its place, such as "train.jsonl, line 3".
        targets: its answers: one, or several if all turns of a chat are used.
        record: the JSON object.
        chat: its messages in the form that `Engine.generate` takes, with images; empty for a plain text.
        thinking: True if thinking is switched on.
    """

    where: str
    targets: list[Target]
    record: dict[str, Any]
    chat: list[Message] = field(default_factory=list)
    thinking: bool = False


def load(
    engine: Engine, source: str | Path, turns: str = "last", max_length: int | None = None, skip_long: bool = False
) -> dict[str, list[Example]]:
    """Read all splits of a data set.

    Args:
        engine: with the tokenizer and the chat template.
        source: see `find`; a single file is the split "train".
        turns, max_length, skip_long: see `read`.

    Returns:
        {"train": [...], "valid": [...], "test": [...]}; a split without a file is empty.

    Raises:
        DataError: there is no train.jsonl, or see `read`.
        OptionError: see `read`.
    """
    files = find(source, ("train",))
    return {
        split: read(engine, files[split], turns, max_length, skip_long) if split in files else [] for split in SPLITS
    }


def find(source: str | Path, needed: Sequence[str] = SPLITS) -> dict[str, Path]:
    """The files of a data set by split. Splits that do not exist are left out.

    Args:
        source: a folder with train.jsonl, valid.jsonl and test.jsonl; one .jsonl file, which is used for every split
            in `needed`; or the id of a data set on the Hub. Downloads on this machine are used first.
        needed: at least one of these splits must exist.

    Raises:
        DataError: the source does not exist, or has none of the splits.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".jsonl":
            raise DataError(f"{path} is not a .jsonl file; data files are JSON Lines, one object per line.")
        return dict.fromkeys(needed, path)
    from ..checkpoint.find import fetch  # imports MLX

    patterns = [pattern for kind in ("jsonl", *IMAGES) for pattern in (f"*.{kind}", f"*.{kind.upper()}")]
    folder = fetch(
        str(source),
        patterns,
        lambda folder: any((folder / f"{split}.jsonl").exists() for split in needed),
        "give a folder with .jsonl files, one such file, or a Hub id",
        ("file", "data set"),
        DataError,
        repo_type="dataset",
    )
    found = {split: file for split in SPLITS if (file := folder / f"{split}.jsonl").is_file()}
    if not set(found) & set(needed):
        names = " or ".join(f"{split}.jsonl" for split in needed)
        raise DataError(f"{source} has no {names}; data files are JSON Lines, one object per line.")
    return found


def read(
    engine: Engine, path: str | Path, turns: str = "last", max_length: int | None = None, skip_long: bool = False
) -> list[Example]:
    """Read the samples of one file, one JSON object per line. Blank lines are skipped.

    Args:
        engine: with the tokenizer and the chat template.
        path: a UTF-8 file. Relative paths of images start in its folder.
        turns: "last" uses the last answer of a chat, "all" every answer after the messages before it.
        max_length: largest number of tokens of a sample, with the answer rounded up to whole canvases. The context
            length is a limit as well.
        skip_long: leave longer samples out, with a warning, instead of refusing them.

    Raises:
        DataError: a line cannot be used; the message names it.
        OptionError: another value of `turns`, or max_length is not a whole number of at least 1.
    """
    if turns not in TURNS:
        raise OptionError(f"turns is {turns!r}; it should be one of {', '.join(TURNS)}.")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise OptionError(f"max_length is {max_length!r}; it should be a whole number, at least 1.")
    path = Path(path)
    examples, count = [], 0
    for where, record in read_records(path):
        count += 1
        try:
            example = _example(engine, where, record, path.parent, turns)
            too_long = _too_long(engine, example, max_length)
            if too_long and not skip_long:
                raise DataError(too_long)
        except (DataError, PromptError) as error:
            raise DataError(f"{where}: {error}") from None
        if not too_long:
            examples.append(example)
    if not count:
        raise DataError(f"{path.name} contains no samples; write one JSON object per line.")
    if not examples:
        raise DataError(f"All {count} samples of {path.name} are too long; shorten them.")
    if count > len(examples):
        warnings.warn(
            f"{path.name}: {count - len(examples)} of {count} samples are too long and were left out.", stacklevel=2
        )
    return examples


def _example(engine: Engine, where: str, record: dict[str, Any], folder: Path, turns: str) -> Example:
    """Encode a record; relative paths of images start in `folder`."""
    forms = [form for form in FORMS if all(record.get(key) is not None for key in form)]
    if len(forms) != 1:
        names = " and ".join("/".join(form) for form in forms or FORMS)
        raise DataError(f"This has {'all of ' if forms else 'none of '}{names}; it should have one of them.")
    thinking, tools = thinking_of(record), tools_of(record)
    if forms[0] == ("text",):
        if thinking or tools or record.get("images"):
            raise DataError("This is a plain text, which cannot have thinking, tools or images; write it as messages.")
        return Example(where, [_text_target(engine, record["text"])], record)
    chat = _chat(record)
    sources = []
    for part in parts_of(chat, "image"):
        if not isinstance(part["image"], str):
            raise DataError(f"An image is of type {type(part['image']).__name__}; give a path or a data: URL.")
        if not part["image"].startswith(("data:", "http://", "https://")):
            part["image"] = str(folder / part["image"])
        sources.append(part["image"])
    decoded = _with_decoded_images(engine, chat)
    answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    targets = []
    for i in answers if turns == "all" else answers[-1:]:
        prompt, answer = _encode_turn(engine, decoded, i, thinking, tools)
        targets.append(Target(prompt, answer, sources[: len(parts_of(chat[:i], "image"))]))
    return Example(where, targets, record, chat, thinking)


def _text_target(engine: Engine, text: Any) -> Target:
    if not isinstance(text, str):
        raise DataError(f"text is of type {type(text).__name__}; it should be a string.")
    if not text.strip():
        raise DataError("The text is empty; there is nothing to train on.")
    _check_markers(engine, "The text", text, ())
    tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    return Target([engine.tokenizer.bos_token_id], [*tokens, engine.tokenizer.eos_token_id], [])


def _chat(record: dict[str, Any]) -> list[Message]:
    """The messages of a record.

    Raises:
        DataError: the roles do not alternate as they should, an answer is empty, or a part is not supported.
    """
    images = [] if record.get("images") is None else record["images"]
    if record.get("messages") is None:
        for key in FORMS[1]:
            if not isinstance(record[key], str):
                raise DataError(f"{key} is of type {type(record[key]).__name__}; it should be a string.")
        chat = messages_of(record["prompt"], images=images)
        chat.append({"role": "assistant", "content": record["completion"]})
    else:
        given = record["messages"]
        if not isinstance(given, list) or not given:
            raise DataError(f"messages is {given!r}; it should be a list of messages.")
        chat = messages_of([check_message(i, message) for i, message in enumerate(given)], images=images)
    before = ""
    for i, message in enumerate(chat):
        role = message["role"]
        if role not in NEXT_ROLES[before]:
            place = {"": "is the first one", "call": "follows a tool call"}.get(before, f"follows {before}")
            expected = join_or(NEXT_ROLES[before])
            raise DataError(f"Message {i} has the role {role} and {place}; its role should be {expected}.")
        if role == "tool" and not message.get("name"):
            raise DataError(f"Message {i} does not belong to a tool call; give the call's id as tool_call_id.")
        if parts_of([message], "video"):
            raise DataError(f"Message {i} has a video, but videos are not supported here; give its frames as images.")
        if role == "assistant" and parts_of([message], "image"):
            raise DataError(f"Message {i} has an image, but the assistant can only answer with text; remove it.")
        if role == "assistant" and not text_of(message).strip() and not message.get("tool_calls"):
            raise DataError(f"Message {i} is an empty answer; give it text or a tool call.")
        before = "call" if message.get("tool_calls") else role
    if role != "assistant":
        raise DataError(f"The last message has the role {role}; it should be assistant, to be the answer.")
    return chat


def text_of(message: Message) -> str:
    """The text of a message; the texts of several parts are concatenated."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in parts_of([message], "text"))


def _with_decoded_images(engine: Engine, chat: list[Message]) -> list[Message]:
    """The same chat with decoded images, so that they are decoded only once for all turns."""

    def decoded(part: Message) -> Message:
        if "image" not in part:
            return part
        return {**part, "image": engine.builder.load_image(part["image"], engine.options.image_tokens)}

    return [
        {**message, "content": [decoded(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]


def _encode_turn(
    engine: Engine, chat: list[Message], i: int, thinking: bool, tools: list[dict] | None
) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids, where the answer is message i, an assistant's.

    Raises:
        DataError: the message has markers or thinking that it must not have, or the template does not fit.
    """
    message, tokenizer = chat[i], engine.tokenizer
    thought = message.get("reasoning_content", "")
    if thought and not (thinking and tokenizer.has_thinking):
        advice = 'add "thinking": true or' if tokenizer.has_thinking else "this checkpoint does not support it, so"
        raise DataError(
            f"Message {i} has reasoning_content, but thinking is not switched on; {advice} remove reasoning_content."
        )
    texts = [text_of(message), thought, json.dumps(message.get("tool_calls") or [], ensure_ascii=False)]
    markers = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else ()
    _check_markers(engine, f"Message {i}", "\n".join(texts), markers)
    answer = _encode_answer(engine, i, message, thinking, tools)
    if thought and answer[0] != tokenizer.think_start_tokens[0]:  # templates may only write it before a tool call
        text = f"{tokenizer.think_start}\n{thought}\n{tokenizer.think_end}"
        answer = [*tokenizer.encode(text, add_special_tokens=False), *answer]
    prompt = engine.builder.prompt_tokens(chat[:i], thinking, tools).tokens
    opened = _empty_thought(tokenizer, prompt)
    end = list(tokenizer.think_end_tokens or ())
    if opened and opened[-len(end) :] != end:  # the prompt opens a thought, which the answer has to continue
        answer = answer[len(opened) :] if answer[: len(opened)] == opened else [*end, *answer]
    return prompt, answer


def _encode_answer(engine: Engine, i: int, message: Message, thinking: bool, tools: list[dict] | None) -> list[int]:
    """The token ids that the chat template writes for an assistant's message, from the end of a prompt to an end token.

    The message is encoded after a short question, because after a tool's response templates start a new turn that a
    prompt continues.

    Raises:
        DataError: the template writes the prompt differently before an answer, or does not end the answer.
    """
    ends, question = engine.options.end_tokens, {"role": "user", "content": "-"}

    def tokens(*messages: Message) -> list[int]:
        return engine.builder.prompt_tokens([question, *messages], thinking, tools).tokens

    prompt, full = tokens(), tokens(message)
    start = len(prompt) - len(_empty_thought(engine.tokenizer, prompt))
    if full[:start] != prompt[:start]:
        raise DataError(
            f"Message {i} cannot be separated from its prompt, because the chat template writes the prompt differently "
            "before an answer; use another template."
        )
    end = next((at + 1 for at in range(start, len(full)) if full[at] in ends), 0)
    if not end and (calls := message.get("tool_calls")):
        # The answer ends with the marker of the tool's response, which is only written with a response.
        name, identifier = calls[0]["function"]["name"], calls[0].get("id")
        longer = tokens(message, {"role": "tool", "content": "-", "name": name, "tool_call_id": identifier})
        shared = next((at for at, pair in enumerate(zip(full, longer)) if len(set(pair)) > 1), len(full))
        full, end = longer, shared + 1 if set(longer[shared : shared + 1]) & set(ends) else 0
    if not end:
        names = ", ".join(engine.tokenizer.convert_ids_to_tokens(list(ends)))
        raise DataError(f"The chat template does not end message {i} with one of {names}; use another template.")
    return full[start:end]


def _empty_thought(tokenizer: Any, prompt: list[int]) -> list[int]:
    """The empty thought at the end of a prompt, or nothing.

    Templates write a closed thought if thinking is off, or an open one that the answer continues.
    """
    at = tokenizer.rfind_think_start(prompt) if tokenizer.has_thinking else -1
    if at < 0:
        return []
    words, end = prompt[at + len(tokenizer.think_start_tokens) :], list(tokenizer.think_end_tokens)
    words = words[: -len(end)] if words[-len(end) :] == end else words
    return [] if tokenizer.decode(words).strip() else prompt[at:]


def _check_markers(engine: Engine, what: str, text: str, thinking: Sequence[str]) -> None:
    """Refuse text with markers that end an answer or delimit thinking.

    Args:
        engine: with the tokenizer and the end tokens.
        what: name of the text, for the error message.
        text: the text to check.
        thinking: markers of thinking that the text must not contain.

    Raises:
        DataError: the text contains one of them.
    """
    names = engine.tokenizer.convert_ids_to_tokens(list(engine.options.end_tokens))
    if name := next((name for name in names if name in text), None):
        raise DataError(f"{what} contains {name}, which ends an answer; remove it.")
    if name := next((name for name in thinking if name in text), None):
        raise DataError(f"{what} contains {name}; give its thinking as reasoning_content.")


def _too_long(engine: Engine, example: Example, max_length: int | None) -> str:
    """An error message if an example is too long; else an empty string."""
    canvas, room = engine.config.canvas_length, engine.config.text.max_position_embeddings
    for target in example.targets:
        answer = -(-len(target.answer) // canvas) * canvas
        total = len(target.prompt) + answer
        if total > min(room, max_length or room):
            limit = f"the context length is {room}" if total > room else f"max_length is {max_length}"
            return (
                f"This has {total} tokens, {len(target.prompt)} of the prompt and {answer} of the answer in whole "
                f"canvases, but {limit}; shorten it or leave it out."
            )
    return ""
