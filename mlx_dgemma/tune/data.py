"""Data to learn from and to be marked on: JSON lines of chats, of prompts with completions, or of plain texts.

A prompt is encoded as inference would encode it, and the answer behind it is what the chat template writes there, up to
the token that ends it. So nothing has to be marked in the template.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError, PromptError
from ..prompt.messages import Message, messages_of, parts_of

if TYPE_CHECKING:
    from ..engine import Engine


SPLITS = ("train", "valid", "test")
TURNS = ("last", "all")
FORMS = (("messages",), ("prompt", "completion"), ("text",))
PICTURES = "png jpg jpeg gif webp tif tiff bmp ppm avif".split()
NEXT = {  # the roles that may follow
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
KEYS: dict[str, dict[str, Any]] = {  # what a message of a role may hold besides role and content
    "assistant": {"tool_calls": list, "reasoning_content": str},
    "tool": {"tool_call_id": str, "name": str},
}


@dataclass(frozen=True)
class Target:
    """One answer to learn.

    Attributes:
        prompt: token ids as inference would encode the conversation up to this turn, the generation prompt and a
            placeholder for each soft token of a picture included.
        answer: token ids that the model should emit: thinking, tool calls and text, and the token that ends them.
        images: sources of the prompt's pictures in their order, paths or `data:` URLs; see `PromptBuilder.load_image`.
    """

    prompt: list[int]
    answer: list[int]
    images: list[str]


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        where: its place, such as "train.jsonl, line 3".
        targets: answers of it, one or, of a chat whose every turn is learnt, several.
        record: the JSON object.
        chat: its messages as `Engine.generate` takes them, pictures in their places; empty of a plain text.
        thinking: whether thinking is switched on.
    """

    where: str
    targets: list[Target]
    record: dict[str, Any]
    chat: list[Message] = field(default_factory=list)
    thinking: bool = False


def load(
    engine: Engine, source: str | Path, turns: str = "last", max_length: int | None = None, skip_long: bool = False
) -> dict[str, list[Example]]:
    """The splits of a data set.

    Args:
        engine: whose tokenizer and template encode them.
        source: as `find` takes it; a single file is the split "train".
        turns, max_length, skip_long: as `read` takes them.

    Returns:
        {"train": [...], "valid": [...], "test": [...]}; a split without a file is empty.

    Raises:
        DataError: there is no train.jsonl, or a file that `read` refuses.
        OptionError: as `read`.
    """
    files = find(source, ("train",))
    return {
        split: read(engine, files[split], turns, max_length, skip_long) if split in files else [] for split in SPLITS
    }


def find(source: str | Path, needed: Sequence[str] = SPLITS) -> dict[str, Path]:
    """The files of a data set by their splits; only those that are there.

    Args:
        source: a folder with train.jsonl, valid.jsonl and test.jsonl; one .jsonl file, which is every split that is
            needed; or the id of a data set on the Hub, looked for on this machine first.
        needed: splits of which one has to be there.

    Raises:
        DataError: no such source, or none of the splits in it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".jsonl":
            raise DataError(f"{path} is no .jsonl file; data are read as JSONL, one object a line.")
        return dict.fromkeys(needed, path)
    from ..checkpoint.find import fetch  # imports MLX

    patterns = [spelt for kind in ("jsonl", *PICTURES) for spelt in (f"*.{kind}", f"*.{kind.upper()}")]
    folder = fetch(
        str(source),
        patterns,
        lambda found: any((found / f"{split}.jsonl").exists() for split in needed),
        "give a folder with JSONL files, one such file, or a Hub id",
        ("file", "data set"),
        DataError,
        repo_type="dataset",
    )
    found = {split: file for split in SPLITS if (file := folder / f"{split}.jsonl").is_file()}
    if not set(found) & set(needed):
        names = " or ".join(f"{split}.jsonl" for split in needed)
        raise DataError(f"{source} has no {names}; data are read as JSONL, one object a line.")
    return found


def read(
    engine: Engine, path: str | Path, turns: str = "last", max_length: int | None = None, skip_long: bool = False
) -> list[Example]:
    """The samples of one file, each a JSON object a line; blank lines are passed over.

    Args:
        engine: whose tokenizer and template encode them.
        path: UTF-8. Relative paths of pictures start from its folder.
        turns: "last" takes a chat's last answer, "all" each of them, every one behind what stands before it.
        max_length: tokens that a sample may take, the answer rounded up to whole canvases; the context sets a limit
            of its own.
        skip_long: leave longer samples out, with a warning that counts them, instead of refusing them.

    Raises:
        DataError: what cannot be read, learnt or seen, with its line.
        OptionError: `turns` is another word, or max_length no whole number from 1.
    """
    if turns not in TURNS:
        raise OptionError(f"turns is {turns!r}; it should be one of {', '.join(TURNS)}.")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise OptionError(f"max_length is {max_length!r}; it should be a whole number, at least 1.")
    path = Path(path)
    examples, count = [], 0
    for where, record in _records(path):
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
        raise DataError(f"{path.name} holds no samples; write one JSON object a line.")
    if not examples:
        raise DataError(f"{path.name} holds {count} samples, and every one is too long; shorten them.")
    if count > len(examples):
        warnings.warn(
            f"{path.name}: {count - len(examples)} of {count} samples are too long and were left out.", stacklevel=2
        )
    return examples


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        try:
            text = line.decode()
            if not text.strip():
                continue
            record = json.loads(text)
            json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no character
        except UnicodeDecodeError as error:
            byte = f"byte {error.start} is 0x{line[error.start]:02x}"
            raise DataError(f"{where}: This is not UTF-8: {byte}; convert the file, for example with iconv.") from None
        except UnicodeEncodeError:
            raise DataError(f"{where}: This holds half of a surrogate pair; write whole characters.") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, column {error.colno}: This is no JSON ({error.msg}); mend it.") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
            raise DataError(f"{where}: This cannot be read ({error}); mend it.") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: This is of type {type(record).__name__}; it should be an object.")
        yield where, record


def _example(engine: Engine, where: str, record: dict[str, Any], folder: Path, turns: str) -> Example:
    forms = [form for form in FORMS if all(record.get(key) is not None for key in form)]
    if len(forms) != 1:
        names = " and ".join("/".join(form) for form in forms or FORMS)
        raise DataError(f"This has {'all of ' if forms else 'none of '}{names}; it should have one of them.")
    thinking, tools = _thinking(record), _tools(record)
    if forms[0] == ("text",):
        if thinking or tools or record.get("images"):
            raise DataError("This is a plain text, which takes no thinking, tools or images; write it as messages.")
        return Example(where, [_plain(engine, record["text"])], record)
    chat = _chat(record)
    sources = []
    for part in parts_of(chat, "image"):
        if not isinstance(part["image"], str):
            raise DataError(f"An image is of type {type(part['image']).__name__}; give a path or a data: URL.")
        if not part["image"].startswith(("data:", "http://", "https://")):
            part["image"] = str(folder / part["image"])
        sources.append(part["image"])
    seen = _seen(engine, chat)
    answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    targets = []
    for i in answers if turns == "all" else answers[-1:]:
        prompt, answer = _turn(engine, seen, i, thinking, tools)
        targets.append(Target(prompt, answer, sources[: len(parts_of(chat[:i], "image"))]))
    return Example(where, targets, record, chat, thinking)


def _thinking(record: dict[str, Any]) -> bool:
    given = {key: value for key in ("thinking", "enable_thinking") if (value := record.get(key)) is not None}
    for key, value in given.items():
        if not isinstance(value, bool):
            raise DataError(f"{key} is {value!r}; it should be true or false.")
    if len(set(given.values())) > 1:
        raise DataError("thinking and enable_thinking contradict each other; leave one out.")
    return any(given.values())


def _tools(record: dict[str, Any]) -> list[dict] | None:
    tools = record.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"tools is of type {type(tools).__name__}; it should be a list of function declarations.")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or not tool["function"].get("name"):
            raise DataError(
                f"Tool {i} is no function declaration; it should be "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
            )
    return tools


def _plain(engine: Engine, text: Any) -> Target:
    if not isinstance(text, str):
        raise DataError(f"text is of type {type(text).__name__}; it should be a text.")
    if not text.strip():
        raise DataError("The text is empty; there is nothing to learn.")
    _check_markers(engine, "The text", text, ())
    tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    return Target([engine.tokenizer.bos_token_id], [*tokens, engine.tokenizer.eos_token_id], [])


def _chat(record: dict[str, Any]) -> list[Message]:
    """A record's messages, checked: who speaks after whom, and that every answer says something."""
    images = [] if record.get("images") is None else record["images"]
    if record.get("messages") is None:
        for key in FORMS[1]:
            if not isinstance(record[key], str):
                raise DataError(f"{key} is of type {type(record[key]).__name__}; it should be a text.")
        chat = messages_of(record["prompt"], images=images)
        chat.append({"role": "assistant", "content": record["completion"]})
    else:
        given = record["messages"]
        if not isinstance(given, list) or not given:
            raise DataError(f"messages is {given!r}; it should be a list of messages.")
        chat = messages_of([_message(i, message) for i, message in enumerate(given)], images=images)
    before = ""
    for i, message in enumerate(chat):
        role = message["role"]
        if role not in NEXT[before]:
            stands = {"": "stands first", "call": "stands after a tool call"}.get(before, f"stands after {before}")
            raise DataError(f"Message {i} has the role {role} and {stands}; there it should be {_or(NEXT[before])}.")
        if role == "tool" and not message.get("name"):
            raise DataError(f"Message {i} answers no tool call that was made; give the call's id as tool_call_id.")
        if parts_of([message], "video"):
            raise DataError(f"Message {i} has a video, and videos are not read from data; give frames as images.")
        if role == "assistant" and parts_of([message], "image"):
            raise DataError(f"Message {i} has a picture, but the assistant answers in text alone; take it out.")
        if role == "assistant" and not said(message).strip() and not message.get("tool_calls"):
            raise DataError(f"Message {i} is an empty answer; say something or call a tool.")
        before = "call" if message.get("tool_calls") else role
    if role != "assistant":
        raise DataError(f"The last message has the role {role}; it should be the assistant's, which is the answer.")
    return chat


def _message(i: int, given: Any) -> Message:
    """A message without what is null; what nothing would read is refused."""
    if not isinstance(given, dict):
        raise DataError(f"Message {i} is of type {type(given).__name__}; it should be an object.")
    role = given.get("role")
    known = {"role": str, "content": (str, list), **(KEYS.get(role, {}) if isinstance(role, str) else {})}
    message = {key: value for key, value in given.items() if value is not None}
    for key, value in message.items():
        if key not in known:
            raise DataError(f"Message {i} has the key {key}, which has no effect there; leave it out.")
        if not isinstance(value, known[key]):
            kinds = {str: "a text", list: "a list"}.get(known[key], "a text or a list of parts")
            raise DataError(f"Message {i} has {key} of type {type(value).__name__}; it should be {kinds}.")
    if "reasoning_content" in message:
        message["reasoning_content"] = message["reasoning_content"].strip()
    for call in message.get("tool_calls", ()):
        if not isinstance(call, dict) or not isinstance(call.get("id", ""), (str, type(None))):
            raise DataError(f"Message {i} has a tool call that cannot be read: {call!r}.")
    return message


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def said(message: Message) -> str:
    """A message's text, the texts of its parts one behind the other."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in parts_of([message], "text"))


def _seen(engine: Engine, chat: list[Message]) -> list[Message]:
    """The same chat with every picture decoded, which is done once however many turns are encoded."""

    def seen(part: Message) -> Message:
        if "image" not in part:
            return part
        return {**part, "image": engine.builder.load_image(part["image"], engine.options.image_tokens)}

    return [
        {**message, "content": [seen(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]


def _turn(
    engine: Engine, chat: list[Message], i: int, thinking: bool, tools: list[dict] | None
) -> tuple[list[int], list[int]]:
    """(prompt, answer) of message i, an assistant's."""
    message, tokenizer = chat[i], engine.tokenizer
    thought = message.get("reasoning_content", "")
    if thought and not (thinking and tokenizer.has_thinking):
        way = 'add "thinking": true or leave' if tokenizer.has_thinking else "this checkpoint cannot think, so leave"
        raise DataError(f"Message {i} has thinking, which is not switched on; {way} reasoning_content out.")
    texts = [said(message), thought, json.dumps(message.get("tool_calls") or [], ensure_ascii=False)]
    marks = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else ()
    _check_markers(engine, f"Message {i}", "\n".join(texts), marks)
    answer = _answer(engine, i, message, thinking, tools)
    if thought and answer[0] != tokenizer.think_start_tokens[0]:  # the template shows a thought only before a call
        text = f"{tokenizer.think_start}\n{thought}\n{tokenizer.think_end}"
        answer = [*tokenizer.encode(text, add_special_tokens=False), *answer]
    prompt = engine.builder.prompt_tokens(chat[:i], thinking, tools).tokens
    begun = _empty_thought(tokenizer, prompt)
    end = list(tokenizer.think_end_tokens or ())
    if begun and begun[-len(end) :] != end:  # the template opens the thought that the model goes on with
        answer = answer[len(begun) :] if answer[: len(begun)] == begun else [*end, *answer]
    return prompt, answer


def _answer(engine: Engine, i: int, message: Message, thinking: bool, tools: list[dict] | None) -> list[int]:
    """What the chat template makes of an assistant's message, from where a prompt ends to an end token.

    It is read behind a question of its own: behind a tool's response templates begin a turn that a prompt goes on with.
    """
    ends, question = engine.options.end_tokens, {"role": "user", "content": "-"}

    def tokens(*messages: Message) -> list[int]:
        return engine.builder.prompt_tokens([question, *messages], thinking, tools).tokens

    prompt, whole = tokens(), tokens(message)
    start = len(prompt) - len(_empty_thought(engine.tokenizer, prompt))
    if whole[:start] != prompt[:start]:
        raise DataError(
            f"Message {i} cannot be told from its prompt, which the chat template writes differently before an answer; "
            "use another template."
        )
    end = next((at + 1 for at in range(start, len(whole)) if whole[at] in ends), 0)
    if not end and (calls := message.get("tool_calls")):  # left open for a response, whose mark ends the answer
        name, identifier = calls[0]["function"]["name"], calls[0].get("id")
        longer = tokens(message, {"role": "tool", "content": "-", "name": name, "tool_call_id": identifier})
        shared = next((at for at, pair in enumerate(zip(whole, longer)) if len(set(pair)) > 1), len(whole))
        whole, end = longer, shared + 1 if set(longer[shared : shared + 1]) & set(ends) else 0
    if not end:
        names = ", ".join(engine.tokenizer.convert_ids_to_tokens(list(ends)))
        raise DataError(f"Message {i} is not ended by the chat template with one of {names}; use another template.")
    return whole[start:end]


def _empty_thought(tokenizer: Any, prompt: list[int]) -> list[int]:
    """The thought without words that a prompt ends with: closed where thinking is off, open to be gone on with."""
    at = tokenizer.rfind_think_start(prompt) if tokenizer.has_thinking else -1
    if at < 0:
        return []
    words, end = prompt[at + len(tokenizer.think_start_tokens) :], list(tokenizer.think_end_tokens)
    words = words[: -len(end)] if words[-len(end) :] == end else words
    return [] if tokenizer.decode(words).strip() else prompt[at:]


def _check_markers(engine: Engine, what: str, text: str, thinking: Sequence[str]) -> None:
    """Refuse text that would be read as the end of an answer, or as thinking."""
    names = engine.tokenizer.convert_ids_to_tokens(list(engine.options.end_tokens))
    if name := next((name for name in names if name in text), None):
        raise DataError(f"{what} holds {name}, which ends an answer; leave it out.")
    if name := next((name for name in thinking if name in text), None):
        raise DataError(f"{what} holds {name}; give its thinking as reasoning_content.")


def _too_long(engine: Engine, example: Example, max_length: int | None) -> str:
    """Why an example has no room, or nothing."""
    canvas, room = engine.config.canvas_length, engine.config.text.max_position_embeddings
    for target in example.targets:
        answer = -(-len(target.answer) // canvas) * canvas
        total = len(target.prompt) + answer
        if total > min(room, max_length or room):
            limit = f"the context has room for {room}" if total > room else f"max_length is {max_length}"
            return (
                f"This takes {total} tokens, {len(target.prompt)} of prompt and {answer} of answer in whole canvases, "
                f"but {limit}; shorten it or leave it out."
            )
    return ""
