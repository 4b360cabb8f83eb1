"""What is asked of canvases beyond answering: texts of a language, pinned positions, drafts.

A `Control` is told of every canvas before it is denoised and of every block that came of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..decoding.control import GROWTH, Control, Layout, fitting_size
from ..decoding.request import Job
from ..errors import OptionError
from ..prompt.messages import messages_of, whole
from .constrained import _effective

if TYPE_CHECKING:
    from ..engine import Engine


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


def edit(
    engine: Engine,
    text: str,
    instruction: str,
    *,
    strength: float = 0.5,
    seed: int | None = None,
    **options: Any,
) -> Job:
    """The job of `Engine.edit`."""
    for name, given in (("text", text), ("instruction", instruction)):
        if not isinstance(given, str) or not given.strip():
            raise OptionError(f"{name} is {given!r}; it should be a text that is not empty.")
        whole(name, given)
    if not isinstance(strength, (int, float)) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise OptionError(f"strength is {strength!r}; it should be a number from 0 (the draft) to 1 (all noise).")
    effective = _effective(engine, "edit", options)
    draft = engine.tokenizer.encode(text.rstrip(), add_special_tokens=False)
    if "max_tokens" not in options:
        effective = effective.override(max_tokens=max(effective.max_tokens, 2 * len(draft)))
    row = engine._row(messages_of(f"{instruction.rstrip().removesuffix(':')}: {text}"), seed, effective)
    control = Drafted(draft, engine.turn_end, strength, engine.config.canvas_length, row.seed)
    return Job(row, effective, control)
