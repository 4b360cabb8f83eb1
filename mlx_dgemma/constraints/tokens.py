"""Regular languages over the canvas: the most probable text of a language, given every position's distribution.

A denoiser's positions are independent given the canvas, so the best string of a language is found by dynamic
programming over positions and automaton states (DINGO, arXiv 2505.23061). The automaton reads bytes; tokens walk
through it. Only tokens that matter are looked at: the likely ones of each position, and for every state the tokens
that a narrow way through the language is spelt with, so that there is always a way to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_TOKEN_BYTES = 64  # bytes of a token; longer ones are not taken in a constrained text


class TokenBytes:
    """The bytes that a tokenizer's tokens stand for, in SentencePiece's notation; special ones stand for none."""

    def __init__(self, tokenizer: Any, vocab_size: int, silent: Iterable[int] = ()):
        special = {*tokenizer.all_special_ids, *silent}
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
        self.bytes = np.zeros((vocab_size, MAX_TOKEN_BYTES), np.uint8)
        self.length = np.zeros(vocab_size, np.int32)  # 0: not a text
        fallback = np.zeros(vocab_size, bool)
        for token, piece in enumerate(pieces):
            if not piece or token in special:
                continue
            marked = piece[0] == "<" and re.fullmatch(r"<(?:0x([0-9A-F]{2})|unused\d+)>", piece)
            if marked and not marked[1]:
                continue
            byte = marked or None
            spelt = bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
            if len(spelt) <= MAX_TOKEN_BYTES:
                self.bytes[token, : len(spelt)] = np.frombuffer(spelt, np.uint8)
                self.length[token] = len(spelt)
                fallback[token] = byte is not None
        order = np.flatnonzero(self.length)
        order = order[np.argsort(fallback[order], kind="stable")]
        self._by_first = [order[self.bytes[order, 0] == byte] for byte in range(256)]

    def starting_with(self, byte: int) -> np.ndarray:
        """Tokens whose text begins with a byte; a token of the bare byte comes last."""
        return self._by_first[byte]

    def to_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a sequence of tokens."""
        return b"".join(self.bytes[t, : self.length[t]].tobytes() for t in tokens)
