"""`Spelling`: the tokens of a constrained answer become its text, byte for byte, checked against the language."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np

from ..errors import LanguageError
from .language import Language


class Spelling:
    """Reads tokens into a text of a language.

    Args:
        language: of the text.
        what: how an error names it.
    """

    def __init__(self, language: Language, what: str):
        self._language, self._what, self._state = language, what, 0
        self._scanner = language.scanner()
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, token: int) -> str:
        """The characters that a token completes.

        Raises:
            LanguageError: no text of the language goes on like this.
        """
        text = self._language.token_bytes.to_bytes([token])
        self._state = self._language.state_after([token], self._state)
        if not text or not np.isfinite(self._language.distance[self._state]):
            raise self._error(f"token {token}")
        if self._scanner is not None and self._scanner.feed(text) is not None:
            raise LanguageError(
                f"{self._what} has an array or a text that became too long or repeats itself, and no way was found to "
                "end it; ask again with another seed, or with smaller bounds."
            )
        return self._decoder.decode(text)

    def finish(self) -> None:
        """The text ends here.

        Raises:
            LanguageError: it is no text of the language.
        """
        if not self._language.accepting[self._state]:
            raise self._error("an end that came too early")

    def preview(self, tokens: Sequence[int]) -> str:
        """The text of tokens that are not final."""
        return self._language.token_bytes.to_bytes(tokens).decode(errors="replace")

    def _error(self, why: str) -> LanguageError:
        return LanguageError(f"{self._what} has no text with {why}, which was chosen; this is a fault, report it.")
