"""What is asked of canvases beyond answering: texts of a language, pinned positions, drafts.

A `Control` is told of every canvas before it is denoised and of every block that came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .constrain import FRESH, THINKING, Language, Marginals, best_text
from .denoise import Layout

if TYPE_CHECKING:
    from .generate import GenerationOptions
    from .model import DiffusionGemma
    from .prefix import Prefix


PARTS = 4  # a canvas may be shorter by whole quarters
GROWTH = 4  # a draft's canvas has room for a text that is longer by a quarter


def fitting_size(count: int, canvas_length: int) -> int:
    """Positions of the shortest canvas that holds so many, in quarters of the model's."""
    part = max(canvas_length // PARTS, 1)
    return min(-(-count // part) * part, canvas_length)


class Control:
    """Leaves every canvas of a job as it is; the base of those that don't."""

    def layout(self) -> Layout | None:
        """What the next canvas begins with."""
        return None

    def guide(self, left: int) -> Guide | None:
        """What chooses the text of the next canvas, where there is room for so many tokens."""
        return None

    def commit(self, tokens: Sequence[int]) -> None:
        """Take note of a finished canvas."""

    def prepare(self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array) -> int:
        """Find out what must be known before the first canvas; returns how many positions were denoised for it.

        Args:
            prefix: the encoded prompt.
            key: [2], random key of the first row.
        """
        return 0


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

        return Guide(self._language.anchors, self._ends, self._marks, choose)

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on in the language."""
        state, given = self._state, list(tokens)
        if state == THINKING or (state == FRESH and given[0] == self._marks[0]):
            if self._marks[1] not in given:
                self._state = THINKING
                return
            given, state = given[given.index(self._marks[1]) + 1 :], 0
        self._state = self._language.after(given, max(state, 0))


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


class Drafted(Control):
    """Canvases begin with a draft, some of it noised.

    Args:
        draft: tokens of the text to begin with.
        end: the token behind it.
        strength: the share of positions that begin as noise instead.
        canvas_length: of the model; a short draft takes less of it.
        seed: of what is noised.
    """

    def __init__(self, draft: Sequence[int], end: int, strength: float, canvas_length: int, seed: int):
        self._draft, self._end, self._strength, self._length = list(draft), end, strength, canvas_length
        self._random = np.random.default_rng(seed)

    def layout(self) -> Layout | None:
        """The next part of the draft, its end token, and fillers behind it."""
        if not self._draft:
            return None
        given = [*self._draft, self._end][: self._length]
        size = fitting_size(len(given) + len(given) // GROWTH, self._length)
        tokens = np.zeros(size, np.int32)
        tokens[: len(given)] = given
        kept = self._random.random(size) >= self._strength
        return Layout(mx.array(tokens[None]), mx.zeros((1, size), mx.bool_), mx.array(kept[None]))

    def commit(self, tokens: Sequence[int]) -> None:
        """Go on behind that part of the draft which the canvas answers."""
        matcher = SequenceMatcher(None, self._draft[: 2 * self._length], list(tokens), autojunk=False)
        blocks = [block for block in matcher.get_matching_blocks() if block.size]
        # What follows the last match on the canvas was rewritten, and stands for as much of the draft.
        done = blocks[-1].a + len(tokens) - blocks[-1].b if blocks else len(tokens)
        del self._draft[:done]
