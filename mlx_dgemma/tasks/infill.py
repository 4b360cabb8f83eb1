"""Infill: text for a hole between texts that stay as they are, byte for byte.

The text around the hole is pinned on the canvas. A word that the hole cuts is spelt anew: its tokens belong to the
hole, whose text must then begin or end with what is left of the word. How many tokens the hole takes is not known, so
likely lengths are read in one denoising step each, several in a batch; where the length is right, what follows the
hole is what the model expects there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..constraints.language import Language
from ..constraints.patterns import ALL_CODE_POINTS, SURROGATES, character_class, literal, subtract
from ..constraints.search import Marginals, exact_text
from ..constraints.tokens import TokenBytes
from ..decoding.canvas import denoise_block
from ..decoding.control import PARTS, Control, Layout, fitting_size
from ..decoding.request import Job
from ..errors import OptionError, PromptError
from ..prompt.answer import Answer
from ..prompt.messages import messages_of, whole
from .constrained import Guide, _effective, constrained

if TYPE_CHECKING:
    from ..decoding.options import GenerationOptions
    from ..engine import Engine
    from ..model.diffusion_gemma import DiffusionGemma
    from ..model.kv_cache import Prefix


LONGEST = 64  # tokens of a hole whose length is not given
TOGETHER = 8  # lengths read in one pass
CERTAIN, APART = -1.0, 5.0  # nats: a length is taken that is this likely and so far ahead of every other
IN_VIEW = 16  # tokens behind the hole by which lengths are compared
BROKEN = "\ufffd"  # what a tokenizer makes of a character that is cut
ANY = character_class(subtract([ALL_CODE_POINTS], SURROGATES)) + "*"


@dataclass(frozen=True)
class Seams:
    """A hole between tokens: what stays before and behind it, and the pieces of words that it begins and ends with."""

    before: list[int]
    tail: str
    head: str
    behind: list[int]

    @classmethod
    def of(cls, tokenizer: Any, prefix: str, suffix: str) -> Seams:
        """Cut where whole tokens end: before the prefix's last word and the blanks behind or before it."""

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False) if text else []

        before, behind = encode(prefix), encode(suffix)
        last = re.search(r"\s*\w*$", prefix)
        keep = last.start() if last else len(prefix)
        while before and (len(text := tokenizer.decode(before)) > keep or text.endswith(BROKEN)):
            before.pop()
        first = re.match(r"\w*", suffix)
        need, taken, head = len(first[0]) if first else 0, 0, ""
        while taken < len(behind) and (len(head) < need or head.endswith(BROKEN)):
            taken += 1
            head = tokenizer.decode(behind[:taken])
        tail = prefix[len(tokenizer.decode(before)) if before else 0 :]
        return cls(before, tail, suffix[: len(head)], behind[taken:])

    def pattern(self) -> str:
        """Of the texts that the hole may have."""
        return literal(self.tail) + ANY + literal(self.head)


class Hole(Control):
    """One row with a hole, or while its length is looked for several rows that differ in it.

    Args:
        language: of the hole.
        before: tokens on the canvas before it.
        behind: tokens behind it, the end token among them.
        lengths: that the hole may have, tokens.
        canvas_length: of the model.

    Attributes:
        found: the hole's tokens so far.
        score: log-probability of each row's hole and of up to `IN_VIEW` tokens behind it, in the last step.
    """

    def __init__(
        self,
        language: Language,
        before: Sequence[int],
        behind: Sequence[int],
        lengths: Sequence[int],
        canvas_length: int,
    ):
        self._language, self._before, self._behind = language, list(before), list(behind)
        self._lengths, self._canvas = list(lengths), canvas_length
        self._asked = sorted(set(self._behind[:IN_VIEW]))
        self._begin, self._state = 0, 0  # of the canvas: its first position, and where the hole's text stands
        self.found: list[int] = []
        self.score = [float("-inf")] * len(self._lengths)

    @property
    def full(self) -> bool:
        """Whether the hole is filled."""
        return len(self.found) == self._lengths[0]

    @property
    def spelt(self) -> bool:
        """Whether it begins and ends as it must."""
        return bool(self._language.accepting[self._state])

    def prepare(self, model: DiffusionGemma, prefix: Prefix, options: GenerationOptions, key: mx.array) -> int:
        """Choose the length at which hole and surroundings are most probable after a single denoising step."""
        scores: dict[int, float] = {}
        once, positions = options.override(max_denoising_steps=1), 0
        for start in range(0, len(self._lengths) if len(self._lengths) > 1 else 0, TOGETHER):
            group = self._lengths[start : start + TOGETHER]
            tried = Hole(self._language, self._before, self._behind, group, self._canvas)
            if prefix.batch_size != len(group):
                prefix.select_rows([0] * len(group))
            keys, layout = mx.stack([key] * len(group)), tried.layout()
            for _ in denoise_block(model, prefix, once, keys, None, layout, tried.guide(0)):
                positions += layout.tokens.size
            scores.update(zip(group, tried.score))
            best, *others = sorted(scores.values(), reverse=True)
            if best > CERTAIN and best - max(others, default=-np.inf) > APART:
                break
        if scores:
            prefix.select_rows([0])
            self._lengths = [max(scores, key=scores.__getitem__)]
        begin, canvases = 0, 1
        while begin + (size := self._size(begin)) < len(self._before) + self._lengths[0]:
            begin, canvases = begin + size, canvases + 1
        if canvases > 1:
            warnings.warn(
                f"The hole of {self._lengths[0]} tokens takes {canvases} canvases of {self._canvas}; only the last one "
                "sees what stands behind it.",
                stacklevel=2,
            )
        return positions

    def layout(self) -> Layout:
        """Everything but the hole is pinned; a row for each length."""
        size = self._size(self._begin)
        rows = len(self._lengths)
        tokens, pinned = np.zeros((rows, size), np.int32), np.ones((rows, size), bool)
        for row, length in enumerate(self._lengths):
            stream = [*self._before, *[0] * length, *self._behind][self._begin : self._begin + size]
            tokens[row, : len(stream)] = stream
            pinned[row, slice(*self._window(row, size))] = False
        return Layout(mx.array(tokens), mx.array(pinned), mx.zeros(pinned.shape, mx.bool_))

    def guide(self, left: int) -> Guide:
        """The most probable text of the hole that fits."""

        def choose(row: int, seen: Marginals) -> np.ndarray:
            tokens, size = seen.argmax.copy(), len(seen.argmax)
            start, stop = self._window(row, size)
            room = self._lengths[row] - len(self.found) - (stop - start)  # in later canvases
            tokens[start:stop], score = exact_text(self._language, seen, start, stop, self._state, room)
            view = [self._asked.index(token) for token in self._behind[: min(IN_VIEW, size - stop)]]
            self.score[row] = score + float(seen.end_log_p[np.arange(stop, stop + len(view)), view].sum())
            return tokens

        return Guide(self._language.always_scored_tokens, self._asked, (), choose)

    def take(self, tokens: Sequence[int]) -> None:
        """Take the hole's part of a finished canvas."""
        start, stop = self._window(0, len(tokens))
        self.found += tokens[start:stop]
        self._state = self._language.state_after(tokens[start:stop], self._state)
        self._begin += len(tokens)

    def _size(self, begin: int) -> int:
        """Positions of the canvas that begins there; the last one has a view of what stands behind the hole."""
        left, view = len(self._before) + max(self._lengths) - begin, min(len(self._behind), IN_VIEW)
        if left + view <= self._canvas or left > self._canvas:
            shown = view if len(self._lengths) > 1 else len(self._behind)  # lengths are compared on short canvases
            return fitting_size(left + shown, self._canvas)
        return self._canvas // 2

    def _window(self, row: int, size: int) -> tuple[int, int]:
        """The hole's part of a canvas."""
        start = max(len(self._before) - self._begin, 0)
        return start, min(len(self._before) + self._lengths[row] - self._begin, size)


class Filling:
    """Reads canvases into the text of a hole: an `Answer` without thinking or tools."""

    thinking = ""

    def __init__(self, hole: Hole, spelling: TokenBytes, seams: Seams):
        self._hole, self._spelling, self._seams = hole, spelling, seams
        self.tool_calls: list[dict] = []
        self.text, self.left = "", 2**30  # the canvas has no room but for the hole
        self.finish_reason: str | None = None

    @property
    def tokens(self) -> list[int]:
        """Of the hole."""
        return self._hole.found

    def feed(self, tokens: Sequence[int]) -> str | None:
        """Take a canvas; returns "stop" once the hole is full."""
        self._hole.take(tokens)
        if self._hole.full:
            if not self._hole.spelt:
                raise OptionError(
                    f"length is {len(self._hole.found)}, but no likely text of so many tokens has the pieces of words "
                    "at the hole's ends; give more."
                )
            text = self._spelling.to_bytes(self._hole.found).decode()
            self.text = text[len(self._seams.tail) : len(text) - len(self._seams.head)]
            self.finish_reason = "stop"
        return self.finish_reason

    def cut(self, reason: str) -> None:
        """The context is full."""
        self.finish_reason = reason

    def take(self) -> tuple[str, str]:
        """The text, which is whole or nothing, and no thinking."""
        return self.text, ""


def divide(before: Sequence[int], behind: int, longest: int, canvas_length: int) -> int:
    """How many tokens before the hole are encoded rather than pinned on the canvas.

    Canvases begin at multiples of their length, as the model learned it, unless the hole and what is in view behind
    it would not fit.
    """
    aligned = len(before) // canvas_length * canvas_length
    room = canvas_length - min(longest, canvas_length // 2) - min(behind, IN_VIEW)
    return max(aligned, len(before) - max(room, 0))


GAP = "[...]"
FILL_GAP = f"Write this text with something that fits in the place of {GAP}:\n\n"


def infill(
    engine: Engine,
    prefix: str,
    suffix: str,
    *,
    prompt: Any = None,
    length: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> Job:
    """The job of `Engine.infill`."""
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            raise OptionError(f"{name} is {text!r}; it should be a text.")
        whole(name, text)
    if not prefix + suffix and prompt is None:
        raise PromptError("There is no text before or behind the hole, and no prompt; give one of them.")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise OptionError(f"length is {length!r}; it should be a whole number of tokens, at least 1.")
    effective = _effective(engine, "infill", options)
    if suffix and options.get("max_tokens") is not None:
        raise OptionError(
            f"max_tokens is {options['max_tokens']}, but a hole with text behind it is as long as length says; "
            "give length instead."
        )
    seams = Seams.of(engine.tokenizer, prefix, suffix)
    language = engine.language(seams.pattern(), "The hole")
    least = max(language.shortest_length, 1)
    if length is not None and length < least:
        raise OptionError(
            f"length is {length}, but the pieces of words at the hole's ends take {least} tokens; give that many."
        )
    around, room = len(seams.before) + len(seams.behind), engine.config.text.max_position_embeddings
    if around > room:
        raise PromptError(
            f"The texts before and behind the hole have {around} tokens, but the context has {room}; shorten them."
        )
    row = engine._row(messages_of(FILL_GAP + prefix + GAP + suffix if prompt is None else prompt), seed, effective)
    control: Control
    if not suffix:
        engine._extend(row, seams.before, beside=0)
        effective = effective.override(max_tokens=length and length + 1)  # and the end token
        row.answer = Answer(engine.tokenizer, effective.end_tokens, effective.max_tokens, skip=len(seams.tail))
        control = constrained(engine, row, effective, language, "The hole")
        return Job(row, effective, control)
    canvas, behind = engine.config.canvas_length, [*seams.behind, engine.turn_end]
    cut = divide(seams.before, len(behind), length or canvas // PARTS, canvas)
    on_canvas = seams.before[cut:]
    engine._extend(row, seams.before[:cut], beside=len(on_canvas) + (length or least) + len(behind))
    most = max(min(LONGEST, canvas - len(on_canvas) - min(len(behind), IN_VIEW)), least)
    control = Hole(language, on_canvas, behind, [length] if length else range(least, most + 1), canvas)
    row.answer = Filling(control, engine.spelling, seams)
    return Job(row, effective, control)
