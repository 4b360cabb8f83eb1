"""Where the slow parts of preparing a request run: here, unless a server gives them lanes of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from ..constraints.language import Language, accepts_every_line
from ..constraints.patterns import literal, python_regex_to_plain
from ..constraints.schema import translate
from ..constraints.tokens import TokenBytes
from ..errors import OptionError

T = TypeVar("T")


def make_language(kind: str, source: Any, token_bytes: TokenBytes, what: str) -> Language:
    """The language of a constraint.

    Args:
        kind: "schema", "regex" (Python's syntax), "template" or "plain" (what `Language` takes).
        source: the schema, the pattern, the expression, or of a template text, pattern, text, pattern, ..., text.
        token_bytes: of the tokenizer.
        what: how an error names the constraint.

    Raises:
        OptionError: it is malformed, matches nothing or everything, or is too large.
    """
    if kind == "schema":
        translation = translate(source)
        language = Language(translation.expression, token_bytes, what)
        language.returns = translation.returns
        return language
    if kind == "template":
        parts = [f"(?:{python_regex_to_plain(one)})" if i % 2 else literal(one) for i, one in enumerate(source)]
        return Language("".join(parts), token_bytes, what)
    if kind == "plain":
        return Language(source, token_bytes, what)
    language = Language(python_regex_to_plain(source), token_bytes, what)
    if accepts_every_line(language):
        raise OptionError(f"{what} matches every line of text, so it asks for nothing; leave it out.")
    return language


class Lanes:
    """Does the slow parts where it is called."""

    def language(self, kind: str, source: Any, token_bytes: TokenBytes, what: str) -> Language:
        """As `make_language`."""
        return make_language(kind, source, token_bytes, what)

    def picture(self, decode: Callable[[], T]) -> T:
        """What a function returns that decodes a picture."""
        return decode()

    def wait(self, call: Callable[[], T]) -> T:
        """What a function returns that waits for another process."""
        return call()


HERE = Lanes()
LANES: ContextVar[Lanes] = ContextVar("LANES")  # of the thread that prepares a request, where it has some
