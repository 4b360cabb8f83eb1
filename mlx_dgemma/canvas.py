"""What is asked of canvases beyond answering: texts of a language, pinned positions, drafts.

A `Control` is told of every canvas before it is denoised and of every block that came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .constrain import FRESH, THINKING, Language, Marginals, best_text
from .denoise import Layout


class Control:
    """Leaves every canvas as it is; the base of those that don't. Rows are numbered as in the whole batch."""

    def layout(self, rows: Sequence[int]) -> Layout | None:
        """What the next canvas of these rows begins with."""
        return None

    def guide(self, rows: Sequence[int], left: Sequence[int]) -> _Guide | None:
        """What chooses the text of the next canvas of these rows, which have so many tokens left."""
        return None

    def commit(self, row: int, tokens: Sequence[int]) -> None:
        """Take note of a row's finished canvas."""


class Constrained(Control):
    """Every row's text is in a language.

    Args:
        language: of the text.
        rows: how many there are.
        ends: tokens one of which ends the text.
        marks: the tokens that open and close a thought, where one may stand before the text.
    """

    def __init__(self, language: Language, rows: int, ends: Sequence[int], marks: Sequence[int] = ()):
        self._language, self._ends, self._marks = language, tuple(ends), tuple(marks)
        self._states = [FRESH if marks else 0] * rows

    def guide(self, rows: Sequence[int], left: Sequence[int]) -> _Guide:
        """The language's best text."""

        def choose(row: int, seen: Marginals) -> np.ndarray:
            return best_text(self._language, seen, self._states[rows[row]], self._ends, left[row], self._marks)

        return _Guide(self._language.anchors, self._ends, self._marks, choose)

    def commit(self, row: int, tokens: Sequence[int]) -> None:
        """Move on in the language."""
        state, given = self._states[row], list(tokens)
        if state == THINKING or (state == FRESH and given[0] == self._marks[0]):
            if self._marks[1] not in given:
                self._states[row] = THINKING
                return
            given, state = given[given.index(self._marks[1]) + 1 :], 0
        self._states[row] = self._language.after(given, max(state, 0))


class _Guide:
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
