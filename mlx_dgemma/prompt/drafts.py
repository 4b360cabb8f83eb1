"""The text of a canvas that is not final."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .vocabulary import TokenText, plain, vocabulary_of

if TYPE_CHECKING:
    from ..decoding.events import Draft


def uncertain_text(draft: Draft, tokenizer: Any, end_tokens: Iterable[int]) -> list[tuple[str, float]]:
    """The text of a draft in pieces of whole characters, each with the highest entropy of its tokens in nats.

    Args:
        draft: the draft; special tokens and everything after an end token are omitted.
        tokenizer: the checkpoint's tokenizer.
        end_tokens: the tokens that end a text.
    """
    tokens: Any = draft.tokens.tolist()
    entropy: Any = draft.entropy.tolist()
    ends, found, highest = set(end_tokens), [], 0.0
    vocabulary = vocabulary_of(tokenizer)
    reader = TokenText(vocabulary)
    for token, nats in zip(tokens, entropy):
        if token in ends:
            break
        if vocabulary.sign(token) is None:
            highest = max(highest, nats)
        if text := plain(reader.add(token)):
            found.append((text, highest))
            highest = 0.0
    return found
