"""Infill, templates and edits: what an engine does beyond answering. Each becomes a `Job`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..constraints.language import Language, accepts_every_line
from ..constraints.patterns import python_regex_to_plain
from ..constraints.schema import to_regex
from ..constraints.search import FRESH, THINKING, Marginals, best_text
from ..decoding.control import Control
from ..errors import OptionError, PromptError
from ..prompt.answer import Answer

if TYPE_CHECKING:
    from ..decoding.options import GenerationOptions
    from ..decoding.request import Row
    from ..engine import Engine


class Constrained(Control):
    """The text is in a language.

    Args:
        language: of the text.
        ends: tokens one of which ends the text.
        marks: the tokens that open and close a thought, where one may stand before the text.
        begun: whether the prompt has opened it.
    """

    def __init__(self, language: Language, ends: Sequence[int], marks: Sequence[int] = (), begun: bool = False):
        self._language, self._ends, self._marks = language, tuple(ends), tuple(marks)
        self._state = (THINKING if begun else FRESH) if marks else 0

    def guide(self, left: int) -> Guide:
        """The language's best text."""

        def choose(row: int, seen: Marginals) -> np.ndarray:
            return best_text(self._language, seen, self._state, self._ends, left, self._marks)

        return Guide(self._language.always_scored_tokens, self._ends, self._marks, choose)

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on in the language."""
        state, given = self._state, list(tokens)
        if state == THINKING or (state == FRESH and given[0] == self._marks[0]):
            if self._marks[1] not in given:
                self._state = THINKING
                return
            given, state = given[given.index(self._marks[1]) + 1 :], 0
        self._state = self._language.state_after(given, max(state, 0))


class Guide:
    """A `denoise.Guide`: asks for anchors, end tokens and marks, and chooses by a function of a row's `Marginals`."""

    def __init__(
        self,
        anchors: np.ndarray,
        ends: Sequence[int],
        marks: Sequence[int],
        choose: Callable[[int, Marginals], np.ndarray],
    ):
        self.tokens = mx.array([*anchors.tolist(), *ends, *marks], mx.int32)
        self._cuts, self._choose = [len(anchors), len(anchors) + len(ends)], choose

    def choose(self, row: int, reading: dict[str, np.ndarray]) -> np.ndarray:
        """The text of a row, [C] int32."""
        asked = np.split(reading["asked"], self._cuts, axis=1)
        return self._choose(row, Marginals(*(reading[n] for n in ("likely", "log_p", "best", "top")), *asked))


def constrained(
    engine: Engine, row: Row, options: GenerationOptions, language: Language, what: str, thinking: bool = False
) -> Constrained:
    """A text in a language; what cannot be is an error before the first step."""
    least, canvas = int(language.distance[0]) + 1, engine.config.canvas_length
    if least > options.max_tokens:
        raise OptionError(
            f"{what} needs room for {least} tokens, its end included, but max_tokens is {options.max_tokens}; raise it."
        )
    # the context must not end in the middle of a text
    room = (engine.config.text.max_position_embeddings - len(row.tokens)) // canvas * canvas
    if least > room:
        raise PromptError(
            f"{what} needs room for {least} tokens, its end included, but the context leaves room for {room} "
            "behind the prompt; shorten it."
        )
    if isinstance(row.answer, Answer):
        row.answer.max_tokens = min(row.answer.max_tokens, room)
    opened, closed = engine.tokenizer.think_start_tokens, engine.tokenizer.think_end_tokens
    begun = isinstance(row.answer, Answer) and row.answer.thinks
    marks = (opened[0], closed[0]) if (thinking or begun) and opened and closed else ()
    return Constrained(language, options.end_tokens, marks, begun)


def constraint(
    engine: Engine,
    row: Row,
    options: GenerationOptions,
    schema: dict | None,
    regex: str | None,
    thinking: bool,
    tools: list[dict] | None,
) -> Constrained | None:
    """What `schema` or `regex` of `Engine.stream` asks for, or None."""
    if schema is not None and regex is not None:
        raise OptionError("Both schema and regex are given; leave one out.")
    if schema is not None:
        if not isinstance(schema, dict):
            raise OptionError(f"schema is {schema!r}; it should be a JSON Schema as a dict.")
        name, what, pattern = "schema", "The schema", to_regex(schema)
    elif regex is not None:
        if not isinstance(regex, str):
            raise OptionError(f"regex is {regex!r}; it should be a text.")
        name, what, pattern = "regex", f"The regex {regex!r}", python_regex_to_plain(regex)
    else:
        return None
    for other, given in (("exact", options.exact), ("stop", options.stop), ("tools", tools)):
        if given:
            raise OptionError(f"{name} is given and {other} is {given!r}; they cannot be together: leave one out.")
    language = engine.language(pattern, what)
    if regex is not None and accepts_every_line(language):
        raise OptionError(f"{what} matches every line of text, so it asks for nothing; leave it out.")
    return constrained(engine, row, options, language, what, thinking)


def _effective(engine: Engine, verb: str, options: dict[str, Any]) -> GenerationOptions:
    effective = engine.options.override(**options)
    if effective.exact:
        raise OptionError(f"exact is True, but the reference's sampler knows no {verb}; leave it out.")
    if effective.stop:
        raise OptionError(f"stop is {effective.stop!r}, but {verb} has an end of its own; leave it out.")
    return effective
