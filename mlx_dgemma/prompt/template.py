"""The checkpoint's chat template: messages become token ids.

What users, tools and files say is text, even where it spells a marker: it is rendered with a blind character inside
every such place, and cut into tokens without markers. Only the template's own markers become tokens of that kind.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import PromptError
from .messages import Message, reject_surrogates
from .notation import PLAIN_KEY
from .vocabulary import QUOTE, Vocabulary, vocabulary_of

LARGE = 2**20  # characters of a prompt
_STRUCTURE = ("role", "type")  # keys whose values are checked words
_PRIVATE = range(0xE000, 0xF900)  # code points that stand for nothing


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict] | None = None,
    thinking: bool = False,
    media: Sequence[tuple[str, str]] = (),
    markers: Sequence[str] = (),
    check: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Token ids of the messages in the checkpoint's own chat template, ready for the answer.

    Args:
        tokenizer: mlx-lm's wrapper.
        messages: from `messages_of`.
        tools: function declarations in OpenAI's form.
        thinking: switch the template's thinking on.
        media: for each image and video part, in order, (the template's marker, the text that takes its place).
        markers: every marker that there is.
        check: told the number of characters of the whole text before it is cut into tokens; it may raise.

    Raises:
        PromptError: the checkpoint has no chat template, the template refuses these messages, or it shows
            another number of markers than there are pictures and videos.
    """
    if not tokenizer.has_chat_template:
        raise PromptError("This checkpoint has no chat template; add its chat_template.jinja to the folder.")
    given: Any = [messages, tools or None]
    blind = _unused(given) if _needs_blinding(tokenizer, given) else ""
    if blind:
        given = _blinded(given, vocabulary_of(tokenizer), blind)
    text = apply_template(tokenizer, [_with_result(one, markers) for one in given[0]], given[1], thinking)
    if len(text) > LARGE:  # a template with macros leaves its whole context behind in a cycle
        gc.collect()
    reject_surrogates("The prompt", text)
    for marker in markers:
        count = sum(one == marker for one, _ in media)
        if text.count(marker) != count:
            raise PromptError(
                f"The prompt has {text.count(marker)} {marker} placeholders, but {count} sources are given for them; "
                "they must agree."
            )
    done = ""
    for marker, shown in media:
        head, _, text = text.partition(marker)
        done += head + shown
    check(len(done) + len(text))
    if blind:
        return vocabulary_of(tokenizer).encode_marked(done + text, blind)
    return tokenizer.encode(done + text, add_special_tokens=False)


def _with_result(message: Message, markers: Sequence[str]) -> Message:
    """The message; a tool's result with pictures as one text, as templates take it, with their markers."""
    if message["role"] != "tool" or isinstance(message["content"], str):
        return message
    image, video = markers
    shown = {"image": image, "video": video}
    parts = [shown.get(part["type"]) or part["text"] for part in message["content"]]
    return {**message, "content": "\n".join(parts)}


def apply_template(tokenizer: Any, messages: list[Message], tools: list[dict] | None, thinking: bool) -> str:
    """What the template writes.

    Raises:
        PromptError: it refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=bool(thinking), tokenize=False
        )
    except Exception as error:  # templates raise what they like
        raise PromptError(f"The chat template refuses these messages: {error}") from None


def opens_thought(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether a prompt ends where its template has opened a thought."""
    opened = tokenizer.think_start_tokens
    tail = tokenizer.decode(list(tokens[-len(opened) - 1 :])) if opened else ""
    return bool(opened) and tail.rstrip().endswith(tokenizer.decode(list(opened)))


def texts_of(value: Any) -> Iterator[str]:
    """Every text in messages and tools, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts_of(key)
            yield from texts_of(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_of(inner)


def _needs_blinding(tokenizer: Any, given: Any) -> bool:
    """Whether messages or tools hold what looks like a marker, or a key that needs quotes."""
    suspects = [one for one in texts_of(given) if "<" in one or "[" in one]
    return (bool(suspects) and any(map(vocabulary_of(tokenizer).has_marker, suspects))) or _has_odd_keys(given[0])


def _unused(value: Any) -> str:
    """A private character that stands in none of the texts."""
    used = {char for text in texts_of(value) for char in set(text) if ord(char) in _PRIVATE}
    return next(chr(code) for code in _PRIVATE if chr(code) not in used)


def _blinded(value: Any, vocabulary: Vocabulary, blind: str) -> Any:
    """The same messages and tools, with the blind character inside everything that looks like a marker."""

    def text(one: str) -> str:
        return vocabulary.blinded(one, blind)

    def calls(given: Any) -> Any:
        return [
            {**_mapped(call, text), "function": {**_mapped(call["function"], text), **_arguments(call, text)}}
            for call in given
        ]

    def message(given: Message) -> Message:
        found = _mapped(given, text)
        return {**found, "tool_calls": calls(given["tool_calls"])} if given.get("tool_calls") else found

    return [list(map(message, value[0])), _mapped(value[1], text)]


def _arguments(call: Any, text: Callable[[str], str]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    return {"arguments": _mapped(arguments, text, _quoted)} if isinstance(arguments, Mapping) else {}


def _mapped(value: Any, text: Callable[[str], str], key: Callable[[str], str] = str) -> Any:
    """The same value with every text in it changed. What decides a message's or a part's form stays."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {
            key(text(name)) if isinstance(name, str) else name: inner
            if name in _STRUCTURE and isinstance(inner, str) and "<" not in inner
            else _mapped(inner, text, key)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mapped(inner, text, key) for inner in value]
    return value


def _quoted(key: str) -> str:
    """A key that the notation cannot hold bare, between its quotes."""
    return key if PLAIN_KEY.fullmatch(key) else f"{QUOTE}{key}{QUOTE}"


def _has_odd_keys(messages: list[Message]) -> bool:
    """Whether a call's arguments have keys that need quotes."""

    def odd(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(_quoted(name) != name or odd(inner) for name, inner in value.items())
        return isinstance(value, (list, tuple)) and any(map(odd, value))

    return any(odd(call["function"].get("arguments")) for one in messages for call in one.get("tool_calls") or ())
