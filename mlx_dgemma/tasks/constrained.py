"""Text that is in a language: a JSON Schema's, a regular expression's, or a template's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..constraints.language import Language
from ..constraints.next_token import NextTokens
from ..constraints.search import FRESH, THINKING, Marginals, best_text
from ..constraints.spelling import Spelling
from ..decoding.control import Control
from ..decoding.options import GenerationOptions, OptionKeywords
from ..decoding.request import Request
from ..errors import OptionError, PromptError
from ..prompt.answer import Answer
from ..prompt.builder import PromptBuilder

MOST_CUTS = 64  # places in a text where it went too far and was changed


class _Cut(NamedTuple):
    """Where a chosen text goes too far: the position of a token, and the byte behind it, counted from the text's begin.

    `change` is as in `Excess`.
    """

    place: int
    change: bool
    stop: int


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
        self._scanner = language.scanner()

    def guide(self, left: int) -> LanguageGuide:
        """Chooses the most probable text of the language."""

        def choose(row: int, seen: Marginals) -> np.ndarray:
            chosen = best_text(self._language, seen, self._state, self._ends, left, self._marks)
            return chosen if self._scanner is None else self._checked(chosen, seen, left)

        return LanguageGuide(self._language.always_scored_tokens, self._ends, self._marks, choose)

    def next_tokens(self) -> NextTokens:
        """The tokens that may come next, where text comes token by token."""
        return NextTokens(self._language, self._ends, self._marks, self._state)

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on in the language."""
        begin = self._begin(tokens)
        if begin is None:
            self._state = THINKING
            return
        text = list(tokens)[begin:]
        if self._scanner is not None:
            self._scanner.feed(self._language.token_bytes.to_bytes(text))
        self._state = self._language.state_after(text, max(self._state, 0))

    def _begin(self, tokens: Sequence[int]) -> int | None:
        """Where the text begins or goes on, behind a thought; None: the thought does not end."""
        text, state = list(tokens), self._state
        if state == THINKING or (state == FRESH and text[0] == self._marks[0]):
            return text.index(self._marks[1]) + 1 if self._marks[1] in text else None
        return 0

    def _checked(self, chosen: np.ndarray, seen: Marginals, left: int) -> np.ndarray:
        """The chosen text; where it goes too far the same up to there, and then the best one that does not."""
        tried: dict[int, int] = {}  # for each position where a text went too far, the one where it was changed
        given_up: dict[int, list[bytes]] = {}  # and what was written from there on
        for _ in range(MOST_CUTS):
            begin = self._begin(chosen.tolist())
            cut = None if begin is None else self._cut(chosen, begin)
            if begin is None or cut is None:
                return chosen
            first = cut.place if cut.change else tried.get(cut.place, cut.place + 1) - 1
            for place in range(first, begin - 1, -1):
                if (other := self._otherwise(chosen, begin, place, cut, seen, left, given_up)) is not None:
                    break
            else:
                return chosen
            chosen, tried[cut.place] = other, place
        return chosen

    def _cut(self, chosen: np.ndarray, begin: int) -> _Cut | None:
        """Where a chosen text goes too far."""
        to_bytes = self._language.token_bytes.to_bytes
        stop = next((i for i in range(begin, len(chosen)) if chosen[i] in self._ends), len(chosen))
        scanner, tokens = copy.deepcopy(self._scanner), chosen[begin:stop].tolist()
        assert scanner is not None
        if (excess := scanner.feed(to_bytes(tokens))) is None:
            return None
        behind = np.cumsum(self._language.token_bytes.length[chosen[begin:stop]])
        return _Cut(begin + int(np.searchsorted(behind, excess.at, "right")), excess.change, excess.at + 1)

    def _otherwise(
        self,
        chosen: np.ndarray,
        begin: int,
        place: int,
        cut: _Cut,
        seen: Marginals,
        left: int,
        given_up: dict[int, list[bytes]],
    ) -> np.ndarray | None:
        """The chosen text with another token at a place, and the best text behind it; None if there is no such token.

        The token ends what goes too far, or makes it another text.
        """
        language, to_bytes = self._language, self._language.token_bytes.to_bytes
        before = chosen[begin:place].tolist()
        state = language.state_after(before, max(self._state, 0))
        tokens = np.concatenate([language.always_scored_tokens, seen.likely[place]])
        log_p = np.concatenate([seen.always_scored_log_p[place], seen.likely_log_p[place]])
        behind = language.states_after(tokens, state, not cut.change)
        log_p = np.where(language.distance[behind] + 1 <= left - place - 1, log_p, -np.inf)
        written = given_up.setdefault(place, [])
        if cut.change:
            written.append(to_bytes(chosen[begin:].tolist())[len(to_bytes(before)) : cut.stop])
        for best in np.argsort(-log_p, kind="stable").tolist():
            if log_p[best] == -np.inf:
                return None
            spelt = to_bytes([int(tokens[best])])
            if not any(text.startswith(spelt) or spelt.startswith(text) for text in written):
                break
        else:
            return None
        found = chosen.copy()
        found[place] = tokens[best]
        if place + 1 < len(chosen):
            rest = Marginals(**{name: value[place + 1 :] for name, value in vars(seen).items()})
            found[place + 1 :] = best_text(language, rest, int(behind[best]), self._ends, left - place - 1)
        return found


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
) -> Language | None:
    """Let an answer be what `schema` or `regex` of `Engine.generate` ask for, if anything; returns its language.

    Raises:
        OptionError: both are given, one is malformed, matches nothing or everything, or is together with an option
            that it excludes.
        PromptError: the context has no room for any such text.
    """
    if schema is not None and regex is not None:
        raise OptionError("Both schema and regex are given; leave one out.")
    source: Any
    if schema is not None:
        if not isinstance(schema, dict):
            raise OptionError(f"schema is {schema!r}; it should be a JSON Schema as a dict.")
        name, what, source = "schema", "The schema", schema
    elif regex is not None:
        if not isinstance(regex, str):
            raise OptionError(f"regex is {regex!r}; it should be a text.")
        name, what, source = "regex", f"The regex {regex!r}", regex
    else:
        return None
    for other, given in (("exact", request.options.exact), ("stop", request.options.stop), ("tools", tools)):
        if given:
            raise OptionError(f"{name} is given and {other} is {given!r}; they cannot be together: leave one out.")
    language = builder.language(source, what, name)
    if language.returns:
        warnings.warn(
            f"The schema refers to itself; answers follow it {language.returns} levels deep at most.", stacklevel=3
        )
    constrain(builder, request, language, what, thinking)
    return language


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
