"""Infill: text for a hole between texts that stay as they are, byte for byte.

The text around the hole is fixed on the canvas. A word that the hole cuts is spelt anew: its tokens belong to the
hole, whose text must then begin or end with what is left of the word.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..constraints.language import Language
from ..constraints.patterns import ALL_CODE_POINTS, SURROGATES, character_class, literal, subtract
from ..decoding.control import PARTS
from ..decoding.options import MAX_INTEGER, TOKEN_OPTIONS, GenerationOptions, OptionKeywords, whole_number
from ..decoding.request import Request
from ..errors import OptionError, PromptError, shown
from ..prompt.answer import Answer
from ..prompt.audio.transcripts import with_transcripts
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message, messages_of, reject_surrogates
from ..prompt.vocabulary import Vocabulary, text_of_tokens, vocabulary_of
from .constrained import constrain, task_options
from .hole import IN_VIEW, Hole, divide
from .mode import LENGTH, Kind, settle_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack

LONGEST = 64  # tokens of a hole whose length is not given
GAP = "[...]"
FILL_GAP = f"Write this text with something that fits in the place of {GAP}:\n\n"
CONTEXT = "These texts belong to it:"
ANY = character_class(subtract([ALL_CODE_POINTS], SURROGATES)) + "*"


@dataclass(frozen=True)
class HoleContext:
    """What stands around a hole.

    Attributes:
        before, behind: tokens that stay.
        tail, head: pieces of words that the hole cuts; its text begins with the one and ends with the other.
    """

    before: list[int]
    tail: str
    head: str
    behind: list[int]

    @classmethod
    def of(cls, tokenizer: Any, prefix: str, suffix: str) -> HoleContext:
        """Cut where whole tokens end: before the prefix's last word and the blanks behind or before it."""

        vocabulary = vocabulary_of(tokenizer)
        before, behind = vocabulary.encode(prefix), vocabulary.encode(suffix)
        most = min(_last_word(prefix), _last_word(prefix[:-1]) if prefix.endswith("\n") else len(prefix))
        least = next((i for i, one in enumerate(suffix) if not _in_word(one)), len(suffix))
        kept, start = max(one for one in _cuts(vocabulary, before) if one[1] <= most)
        taken, end = next(one for one in _cuts(vocabulary, behind) if one[1] >= least)
        return cls(before[:kept], prefix[start:], suffix[:end], behind[taken:])

    def pattern(self) -> str:
        """Of the texts that the hole may have."""
        return literal(self.tail) + ANY + literal(self.head)


def _cuts(vocabulary: Vocabulary, tokens: list[int]) -> Iterator[tuple[int, int]]:
    """Numbers of tokens that end with a whole character, and of the characters in them."""
    decoder, characters = codecs.getincrementaldecoder("utf-8")(), 0
    yield 0, 0
    for count, token in enumerate(tokens, 1):
        characters += len(decoder.decode(vocabulary.piece(token)))
        if not decoder.getstate()[0]:
            yield count, characters


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _last_word(text: str) -> int:
    """Where the last word begins, or the blanks before it; a pattern would take time in square of the length."""
    start = len(text)
    while start and _in_word(text[start - 1]):
        start -= 1
    while start and text[start - 1].isspace():
        start -= 1
    return start


class HoleReader:
    """Reads canvases into the text of a hole."""

    def __init__(self, hole: Hole, builder: PromptBuilder, context: HoleContext):
        self._hole, self._builder, self._context = hole, builder, context
        self.text, self.thinking, self.left = "", "", 2**30  # the canvas has no room but for the hole
        self.tool_calls: list[dict] = []
        self.finish_reason: str | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens of the hole."""
        return [one.token for one in self._hole.found]

    @property
    def log_probs(self) -> list[float]:
        """Their log-probabilities, in nats."""
        return [one.log_prob for one in self._hole.found]

    def close_thought(self, tokens: Sequence[int], log_probs: Sequence[float]) -> tuple[list[int], list[float]]:
        """The canvas as it is: a hole has no thoughts."""
        return list(tokens), list(log_probs)

    def feed(self, tokens: Sequence[int], log_probs: Sequence[float]) -> str | None:
        """Take a canvas; returns "stop" once the hole is full.

        Raises:
            OptionError: the hole is full and does not begin or end with the pieces of words that it cuts.
        """
        self._hole.take(tokens, log_probs)
        if self._hole.full:
            if not self._hole.spelt:
                raise OptionError(
                    f"length is {len(self.tokens)}, but no likely text of so many tokens has the pieces of words "
                    "at the hole's ends; give more."
                )
            text = self._builder.token_bytes.to_bytes(self.tokens).decode()
            self.text = text[len(self._context.tail) : len(text) - len(self._context.head)]
            self.finish_reason = "stop"
        return self.finish_reason

    def cut(self, reason: str) -> None:
        """End here: the context is full."""
        self.finish_reason = reason

    def take(self) -> tuple[str, str]:
        """The text, which is whole or nothing, and no thinking."""
        return self.text, ""

    def preview(self, tokens: Sequence[int]) -> str:
        """The text of the canvas, with what stands around the hole on it."""
        return text_of_tokens(self._builder.tokenizer, tokens, self._builder.options.end_tokens)


class InfillKeywords(OptionKeywords, total=False):
    """Keyword arguments of `infill`."""

    prompt: str | Sequence[Message] | None
    context: Sequence[str]
    length: int | None
    seed: int | None


def infill(
    builder: PromptBuilder,
    prefix: str,
    suffix: str,
    *,
    prompt: str | Sequence[Message] | None = None,
    context: Sequence[str] = (),
    length: int | None = None,
    seed: int | None = None,
    **options: Unpack[OptionKeywords],
) -> Request:
    """The request of `Engine.infill`, whose arguments it takes."""
    for name, text in (("prefix", prefix), ("suffix", suffix), *(("context", one) for one in context)):
        if not isinstance(text, str):
            raise OptionError(f"{name} is {text!r}; it should be a text.")
        reject_surrogates(name, text)
    if not prefix + suffix and prompt is None:
        raise PromptError("There is no text before or behind the hole, and no prompt; give one of them.")
    if length is not None:
        number = whole_number(length)
        if number is None or not 1 <= number < MAX_INTEGER:
            raise OptionError(f"length is {shown(length)}; it should be a whole number of tokens, at least 1.")
        length = number
    effective = task_options(builder, "infill", options)
    if suffix and length is not None and options.get("max_tokens") is not None:
        raise OptionError(
            f"max_tokens is {options['max_tokens']}, but length says {length} for a hole with text behind it; "
            "give one of them."
        )
    builder.check_characters(len(prefix) + len(suffix) + sum(map(len, context)))
    if suffix and effective.mode == "auto":
        effective = effective.override(mode="diffusion")
    ahead = bool(suffix) and effective.mode == "causal" and (length or 0) > builder.config.canvas_length
    if ahead:
        effective = _of_canvases(effective)
    if suffix and effective.causal:
        raise OptionError(
            f"mode is {effective.mode!r}, but a hole with text behind it needs a canvas; leave the mode or suffix out."
        )
    hole = HoleContext.of(builder.tokenizer, prefix, suffix)
    language = builder.language(hole.pattern(), "The hole")
    least = max(language.shortest_length, 1)
    if length is not None and length < least:
        raise OptionError(
            f"length is {length}, but the pieces of words at the hole's ends take {least} tokens; give that many."
        )
    around, room = len(hole.before) + len(hole.behind), builder.config.text.max_position_embeddings
    if around > room:
        raise PromptError(
            f"The texts before and behind the hole have {around} tokens, but the context has {room}; shorten them."
        )
    if prompt is None:
        prompt = "\n\n".join([*([CONTEXT, *context] if context else []), FILL_GAP + prefix + GAP + suffix])
    request = builder.request(messages_of(with_transcripts(prompt)), seed, effective)
    if not suffix:
        builder.extend(request, hole.before, beside=0)
        request.options = effective.override(max_tokens=length and length + 1)  # and the end token
        most, skip = request.options.max_tokens, len(hole.tail)
        request.reader = Answer(builder.tokenizer, effective.end_tokens, most, skip=skip, notes=request.notes)
        constrain(builder, request, language, "The hole")
        settle_mode(builder, request, Kind(length or LENGTH))
        return request
    longest = LONGEST if options.get("max_tokens") is None else min(LONGEST, effective.max_tokens)
    _set_hole(builder, request, hole, language, length, longest, ahead)
    return request


def _of_canvases(options: GenerationOptions) -> GenerationOptions:
    """Options of causal mode as those of the canvas that a long hole ends with.

    Raises:
        OptionError: they say how tokens are drawn.
    """
    for name in TOKEN_OPTIONS:
        value = getattr(options, name)
        if value is not None and (name, value) != ("temperature", 0):
            raise OptionError(
                f"{name} is {value!r}, but the tokens of a hole with text behind it are the most probable ones; "
                "leave it out."
            )
    unset: dict[str, Any] = dict.fromkeys(TOKEN_OPTIONS)
    return replace(options, mode="diffusion", **unset)


def _set_hole(
    builder: PromptBuilder,
    request: Request,
    hole: HoleContext,
    language: Language,
    length: int | None,
    longest: int,
    ahead: bool,
) -> None:
    """Let a request fill a hole with text behind it, of `longest` tokens at most if its length is not given."""
    canvas, behind = builder.config.canvas_length, [*hole.behind, builder.turn_end]
    cut = divide(hole.before, len(behind), length or canvas // PARTS, canvas)
    on_canvas, least = hole.before[cut:], max(language.shortest_length, 1)
    builder.extend(request, hole.before[:cut], beside=len(on_canvas) + (length or least) + len(behind))
    # From `certain` on always scored tokens have a text of any length; shorter ones need luck with the likely ones.
    certain = max(int(language.distance[0]), 1)
    most = max(min(longest, canvas - len(on_canvas) - min(len(behind), IN_VIEW)), least)
    lengths = [length] if length else range(least, most + 1)
    otherwise = certain if certain > most and not length else None
    control = Hole(language, on_canvas, behind, lengths, canvas, otherwise, request.notes, ahead)
    request.control, request.reader = control, HoleReader(control, builder, hole)
