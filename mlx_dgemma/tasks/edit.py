"""Edits: a text is rewritten from itself, with some of it noised, rather than from noise alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from numbers import Real
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..decoding.control import Control, Layout, fitting_size
from ..decoding.options import OptionKeywords
from ..decoding.request import Request
from ..errors import OptionError, shown
from ..prompt.builder import PromptBuilder
from ..prompt.messages import messages_of, reject_surrogates
from ..prompt.vocabulary import vocabulary_of
from .constrained import task_options
from .lines import MARK, FileText
from .mode import Kind, settle_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack

GROWTH = 4  # a draft's canvas has room for a text that is longer by a quarter


def canvas_for(count: int, canvas_length: int) -> int:
    """Positions of the canvas for a draft of so many tokens."""
    return fitting_size(count + count // GROWTH, canvas_length)


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
        """The next part of the draft, its end token, and padding behind it."""
        if not self._draft:
            return None
        given = [*self._draft, self._end][: self._length]
        size = canvas_for(len(given), self._length)
        tokens = np.zeros(size, np.int32)
        tokens[: len(given)] = given
        kept = self._random.random(size) >= self._strength
        return Layout(mx.array(tokens[None]), mx.zeros((1, size), mx.bool_), mx.array(kept[None]))

    def commit(self, tokens: Sequence[int]) -> None:
        """Go on behind that part of the draft which the canvas answers."""
        matcher = SequenceMatcher(None, self._draft[: 2 * self._length], list(tokens), autojunk=False)
        blocks = [block for block in matcher.get_matching_blocks() if block.size]
        # Text behind the last common part replaces as many tokens of the draft.
        done = blocks[-1].a + len(tokens) - blocks[-1].b if blocks else len(tokens)
        del self._draft[:done]


class EditKeywords(OptionKeywords, total=False):
    """Keyword arguments of `edit`."""

    strength: float
    seed: int | None


def edit(
    builder: PromptBuilder,
    text: str,
    instruction: str,
    *,
    strength: float = 0.5,
    seed: int | None = None,
    **options: Unpack[OptionKeywords],
) -> Request:
    """The request of `Engine.edit`, whose arguments it takes."""
    for name, given in (("text", text), ("instruction", instruction)):
        if not isinstance(given, str) or not given.removeprefix(MARK).strip():
            raise OptionError(f"{name} is {given!r}; it should be a text that is not empty.")
        reject_surrogates(name, given)
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise OptionError(f"strength is {shown(strength)}; it should be a number from 0 (the draft) to 1 (all noise).")
    effective = task_options(builder, "edit", options)
    file = FileText(text)
    asked = messages_of(f"{instruction.rstrip().removesuffix(':')}: {file.plain}")
    builder.check_texts(asked)  # before the draft is cut into tokens
    draft = vocabulary_of(builder.tokenizer).encode(file.plain.rstrip())
    if options.get("max_tokens") is None:
        effective = effective.override(max_tokens=max(effective.max_tokens, 2 * len(draft)))
    request = builder.request(asked, seed, effective)
    settle_mode(builder, request, Kind(len(draft), "copy", canvas_for(len(draft), builder.config.canvas_length)))
    if request.options.causal:
        request.likely = [*draft, builder.turn_end]
    else:
        request.control = Drafted(draft, builder.turn_end, strength, builder.config.canvas_length, request.seed)
    request.postprocess = lambda result: replace(
        result, text=file.restored(result.text, whole=result.finish_reason != "length")
    )
    return request
