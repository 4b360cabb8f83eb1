"""The bytes that a tokenizer's tokens stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_TOKEN_BYTES = 64  # a token of more bytes is never used in a constrained text


class TokenBytes:
    """The bytes of every token of a SentencePiece tokenizer. Special and unused tokens have none.

    Args:
        tokenizer: has `all_special_ids`, `convert_ids_to_tokens` and a length.
        vocab_size: the model's; it may differ from the tokenizer's length.
        silent: further tokens that have no bytes.

    Attributes:
        bytes: [V, MAX_TOKEN_BYTES] uint8, padded with zeros.
        length: [V] int32, how many bytes a token has; 0 if it is not text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, silent: Iterable[int] = ()):
        special = {*tokenizer.all_special_ids, *silent}
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer.get_vocab()), vocab_size))))
        self.bytes = np.zeros((vocab_size, MAX_TOKEN_BYTES), np.uint8)
        self.length = np.zeros(vocab_size, np.int32)
        is_byte_token = np.zeros(vocab_size, bool)
        for token, piece in enumerate(pieces):
            if not piece or token in special:
                continue
            text = _piece_bytes(piece)
            if len(text) <= MAX_TOKEN_BYTES:
                self.bytes[token, : len(text)] = np.frombuffer(text, np.uint8)
                self.length[token] = len(text)
                is_byte_token[token] = _BYTE.fullmatch(piece) is not None
        order = np.flatnonzero(self.length)
        order = order[np.argsort(is_byte_token[order], kind="stable")]
        self._by_first_byte = [order[self.bytes[order, 0] == byte] for byte in range(256)]

    def starting_with(self, byte: int) -> np.ndarray:
        """Tokens whose first byte is `byte`. Byte tokens such as <0x61> come last."""
        return self._by_first_byte[byte]

    def to_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a sequence of tokens."""
        return b"".join(self.bytes[token, : self.length[token]].tobytes() for token in tokens)


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNUSED = re.compile(r"<unused\d+>")


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: ▁ is a space, <0x61> is the byte 61, <unused7> is nothing."""
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    if _UNUSED.fullmatch(piece):
        return b""
    return piece.replace("▁", " ").encode()
