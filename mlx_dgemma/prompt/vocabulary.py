"""`Vocabulary`: what a tokenizer's tokens are as text, and which of them are markers.

Inside this room an answer is a string in which every marker is one character of its own, a *sign*: half of a surrogate
pair, which no text can hold. So a marker is never confused with a text that spells it.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer

PADDING = "<pad>"
THOUGHT, THOUGHT_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
TURN_END, HAND_OFF = "<turn|>", "<|tool_response>"

_FIRST_SIGN, _LAST_SIGN = 0xDC00, 0xDFFF
SIGNS = f"{chr(_FIRST_SIGN)}-{chr(_LAST_SIGN)}"  # for a class of a regular expression
QUOTE_SIGN, THOUGHT_SIGN, THOUGHT_END_SIGN, CALL_SIGN, CALL_END_SIGN = map(chr, range(_FIRST_SIGN, _FIRST_SIGN + 5))
_NAMED = (QUOTE, THOUGHT, THOUGHT_END, CALL, CALL_END)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches of one need no threads, nor warnings at forks

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNUSED = re.compile(r"<unused\d+>")


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the names. A common first character makes the search for it fast."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        groups.setdefault(name[0], []).append(re.escape(name[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in groups.items()) or r"(?!)")


class Vocabulary:
    """The markers of a tokenizer, and its way from text to tokens and back.

    Args:
        tokenizer: mlx-lm's wrapper.

    Attributes:
        markers: {marker: token id}: every added token that is special.
    """

    def __init__(self, tokenizer: Any):
        added = {one.content: token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
        known = tokenizer.get_vocab()
        self.markers: dict[str, int] = {**{name: known[name] for name in _NAMED if name in known}, **added}
        self._tokenizer = tokenizer
        others = [name for name in self.markers if name not in _NAMED and name != PADDING]
        signs = zip([*_NAMED, *others], map(chr, range(_FIRST_SIGN, _LAST_SIGN + 1)))
        self._sign_of = dict(signs)  # a marker without a sign is nothing: padding is
        self._name_of = {sign: name for name, sign in self._sign_of.items()}
        self._signs = {token: self._sign_of.get(name, "") for name, token in self.markers.items()}
        self._pattern = _any_of(self.markers)
        self._pieces: dict[int, bytes] = {}

    def __getitem__(self, marker: str) -> int | None:
        """The token id of a marker, or None."""
        return self.markers.get(marker)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without its markers."""
        backend = self._tokenizer.backend_tokenizer
        plain = Tokenizer(backend.model)
        plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        others = [one for _, one in sorted(self._tokenizer.added_tokens_decoder.items()) if not one.special]
        plain.add_tokens(others)
        return plain

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is a marker. Other threads run meanwhile, as they do in batches alone."""
        return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_marked(self, text: str, blind: str) -> list[int]:
        """Tokens of a text with markers.

        Args:
            text: the text.
            blind: a character inside what only looks like a marker; it is taken out.
        """
        tokens, at = [], 0
        for found in self._pattern.finditer(text):
            if found.start() > at:
                tokens += self.encode(text[at : found.start()].replace(blind, ""))
            tokens.append(self.markers[found[0]])
            at = found.end()
        return tokens + self.encode(text[at:].replace(blind, ""))

    def has_marker(self, text: str) -> bool:
        """Whether a text spells a marker, or ends in the beginning of one that a next text may complete."""
        return self._pattern.search(text) is not None or self._begun(text) >= 0

    def _begun(self, text: str) -> int:
        """Where the beginning of a marker stands at a text's end, blanks left out; -1: there is none."""
        end = len(text.rstrip())
        for at in range(max(end - max(map(len, self.markers), default=0), 0), end):
            if any(name.startswith(text[at:end]) for name in self.markers):
                return at
        return -1

    def blinded(self, text: str, blind: str) -> str:
        """The text with a character inside everything that looks like a marker."""
        begun = self._begun(text)
        if begun >= 0:
            text = text[: begun + 1] + blind + text[begun + 1 :]
        return self._pattern.sub(lambda found: found[0][0] + blind + found[0][1:], text)

    def signed(self, text: str) -> str:
        """A text that spells its markers, with signs for them."""
        return self._pattern.sub(lambda found: self._sign_of.get(found[0], ""), text)

    def sign(self, token: int) -> str | None:
        """A marker's sign, "" if it means nothing at all; None: the token is no marker."""
        return self._signs.get(token)

    def spelt(self, signed: str) -> str:
        """A text with its signs spelt out."""
        return re.sub(f"[{SIGNS}]", lambda found: self._name_of.get(found[0], ""), signed)

    def piece(self, token: int) -> bytes:
        """The bytes of a token that is text; none of a marker."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = b"" if token in self._signs else self._bytes(token)
        return found

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not piece or _UNUSED.fullmatch(piece):
            return b""
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of mlx-lm's wrapper, made once."""
    return Vocabulary(tokenizer)


class TokenText:
    """Tokens to text, one after the other: the only way from tokens to what a user reads.

    A character is given once it is whole. Bytes that are no character are left out: of an emoji that was cut, nothing
    shows.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def add(self, token: int) -> str:
        """The characters that a token completes, or a marker's sign."""
        sign = self._vocabulary.sign(token)
        if sign is None:
            return self._decoder.decode(self._vocabulary.piece(token))
        self._decoder.reset()
        return sign


def plain(signed: str) -> str:
    """What a user reads of a text with signs: the notation's quotes as quotes, no other marker."""
    return re.sub(f"[{SIGNS}]", "", signed.replace(QUOTE_SIGN, '"'))


def text_of_tokens(tokenizer: Any, tokens: Sequence[int], end_tokens: Sequence[int] = ()) -> str:
    """What a user reads of tokens, up to the first end token."""
    text = TokenText(vocabulary_of(tokenizer))
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return plain("".join(map(text.add, tokens[:end])))
