"""Text that is in a language: a JSON Schema's, a regular expression's, or a template's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..constraints.language import Language, accepts_every_line
from ..constraints.next_token import NextTokens
from ..constraints.patterns import python_regex_to_plain
from ..constraints.schema import to_regex
from ..constraints.search import FRESH, THINKING, Marginals, best_text
from ..constraints.spelling import Spelling
from ..decoding.control import Control
from ..decoding.options import GenerationOptions, OptionKeywords
from ..decoding.request import Request
from ..errors import OptionError, PromptError
from ..prompt.answer import Answer
from ..prompt.builder import PromptBuilder


class LanguageGuide:
    """A `Guide` that chooses by the log-probabilities of some tokens at every position.

    Args:
        always_scored: tokens of the language that are scored at every position.
        end_tokens: tokens that may end the text.
        thought_tokens: tokens that open and close a thought.
        choose: text [C] of a row by its number and its `Marginals`.
    """

    def __init__(
        self,
        always_scored: np.ndarray,
        end_tokens: Sequence[int],
        thought_tokens: Sequence[int],
        choose: Callable[[int, Marginals], np.ndarray],
    ):
        self.tokens = mx.array([*always_scored.tolist(), *end_tokens, *thought_tokens], mx.int32)
        self._cuts = [len(always_scored), len(always_scored) + len(end_tokens)]
        self._choose = choose

    def choose(self, row: int, seen: dict[str, np.ndarray]) -> np.ndarray:
        """The text of a row, [C] int32."""
        always, ends, thoughts = np.split(seen.pop("asked"), self._cuts, axis=1)
        marginals = Marginals(**seen, always_scored_log_p=always, end_log_p=ends, thought_log_p=thoughts)
        return self._choose(row, marginals)


class Constrained(Control):
    """The text is in a language.

    Args:
        language: of the text.
        ends: tokens one of which ends the text.
        marks: the tokens that open and close a thought, where one may stand before the text.
        thinks: whether the prompt has opened a thought.
    """

    def __init__(self, language: Language, ends: Sequence[int], marks: Sequence[int] = (), thinks: bool = False):
        self._language, self._ends, self._marks = language, tuple(ends), tuple(marks)
        self._state = (THINKING if thinks else FRESH) if marks else 0

    def guide(self, left: int) -> LanguageGuide:
        """Chooses the most probable text of the language."""

        def choose(row: int, seen: Marginals) -> np.ndarray:
            return best_text(self._language, seen, self._state, self._ends, left, self._marks)

        return LanguageGuide(self._language.always_scored_tokens, self._ends, self._marks, choose)

    def next_tokens(self) -> NextTokens:
        """The tokens that may come next, where text comes token by token."""
        return NextTokens(self._language, self._ends, self._marks, self._state)

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on in the language."""
        state, text = self._state, list(tokens)
        if state == THINKING or (state == FRESH and text[0] == self._marks[0]):
            if self._marks[1] not in text:
                self._state = THINKING
                return
            text, state = text[text.index(self._marks[1]) + 1 :], 0
        self._state = self._language.state_after(text, max(state, 0))


def constrain(builder: PromptBuilder, request: Request, language: Language, what: str, thinking: bool = False) -> None:
    """Let the text of a request be in a language; what cannot be is an error before the first step.

    Args:
        builder: that made the request.
        request: gets a control.
        language: of the text.
        what: how an error names it.
        thinking: whether a thought may stand before the text.

    Raises:
        OptionError: `max_tokens` is too small for any text of the language.
        PromptError: the context is.

    While it is generated, a text that would leave the language is a `LanguageError`.
    """
    options, answer = request.options, request.reader
    if not options.end_tokens:
        raise OptionError(f"{what} needs an end token, but end_tokens is (); give one.")
    # A thought that the prompt has opened takes a token to close it.
    thinks = isinstance(answer, Answer) and answer.thinks
    least, canvas = int(language.distance[0]) + 1 + thinks, builder.config.canvas_length
    if least > options.max_tokens:
        raise OptionError(
            f"{what} needs room for {least} tokens, its end included, but max_tokens is {options.max_tokens}; raise it."
        )
    # The context must not end in the middle of a text.
    room = (builder.config.text.max_position_embeddings - len(request.prompt.tokens)) // canvas * canvas
    if least > room:
        raise PromptError(
            f"{what} needs room for {least} tokens, its end included, but the context leaves room for {room} "
            "behind the prompt; shorten it."
        )
    if isinstance(answer, Answer):
        answer.max_tokens, answer.spelling = min(answer.max_tokens, room), Spelling(language, what)
    opened, closed = builder.tokenizer.think_start_tokens, builder.tokenizer.think_end_tokens
    marks = (opened[0], closed[0]) if (thinking or thinks) and opened and closed else ()
    request.control = Constrained(language, options.end_tokens, marks, thinks)


def constrain_answer(
    builder: PromptBuilder,
    request: Request,
    schema: dict | None,
    regex: str | None,
    thinking: bool,
    tools: list[dict] | None,
) -> None:
    """Let an answer be what `schema` or `regex` of `Engine.generate` ask for, if anything.

    Raises:
        OptionError: both are given, one is malformed, matches nothing or everything, or is together with an option
            that it excludes.
        PromptError: the context has no room for any such text.
    """
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
        return
    for other, given in (("exact", request.options.exact), ("stop", request.options.stop), ("tools", tools)):
        if given:
            raise OptionError(f"{name} is given and {other} is {given!r}; they cannot be together: leave one out.")
    language = builder.language(pattern, what)
    if regex is not None and accepts_every_line(language):
        raise OptionError(f"{what} matches every line of text, so it asks for nothing; leave it out.")
    constrain(builder, request, language, what, thinking)


def task_options(builder: PromptBuilder, task: str, options: OptionKeywords) -> GenerationOptions:
    """The options in force for a task that ends its text itself and is unknown to the reference.

    Raises:
        OptionError: an unknown or malformed option, `exact` or `stop`.
    """
    effective = builder.options.override(**options)
    if effective.exact:
        raise OptionError(f"exact is True, but the reference's sampler knows no {task}; leave it out.")
    if effective.stop:
        raise OptionError(f"stop is {effective.stop!r}, but {task} has an end of its own; leave it out.")
    return effective
