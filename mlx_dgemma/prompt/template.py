"""The checkpoint's chat template: messages become token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import PromptError
from .messages import Message, reject_surrogates


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict] | None = None,
    thinking: bool = False,
    media: Sequence[tuple[str, str]] = (),
    markers: Sequence[str] = (),
    check: Callable[[int], None] | None = None,
) -> list[int]:
    """Token ids of the messages in the checkpoint's own chat template, ready for the answer.

    Args:
        tokenizer: mlx-lm's wrapper.
        messages: from `messages_of`.
        tools: function declarations in OpenAI's form.
        thinking: switch the template's thinking on.
        media: for each image and video part, in order, (the template's marker, the text that takes its place).
        markers: every marker that there is.
        check: told how many characters the whole text has before it is cut into tokens; raises if they are too many.

    Raises:
        PromptError: the checkpoint has no chat template, the template refuses these messages, or it shows
            another number of markers than there are pictures and videos.
    """
    if not tokenizer.has_chat_template:
        raise PromptError("This checkpoint has no chat template; add its chat_template.jinja to the folder.")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, enable_thinking=bool(thinking), tokenize=False
        )
    except Exception as error:  # templates raise what they like
        raise PromptError(f"The chat template refuses these messages: {error}") from None
    reject_surrogates("The prompt", text)
    for marker in markers:
        given = sum(one == marker for one, _ in media)
        if text.count(marker) != given:
            raise PromptError(
                f"The prompt has {text.count(marker)} {marker} placeholders, but {given} sources are given for them; "
                "they must agree."
            )
    done = ""
    for marker, shown in media:
        head, _, text = text.partition(marker)
        done += head + shown
    text = done + text
    if check is not None:
        check(len(text))
    return tokenizer.encode(text, add_special_tokens=False)


def opens_thought(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether a prompt ends where its template has opened a thought."""
    opened = tokenizer.think_start_tokens
    tail = tokenizer.decode(list(tokens[-len(opened) - 1 :])) if opened else ""
    return bool(opened) and tail.rstrip().endswith(tokenizer.decode(list(opened)))
