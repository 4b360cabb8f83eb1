"""An answer that begins with a given text."""

from __future__ import annotations

from ..decoding.request import Request
from ..prompt.answer import Answer
from ..prompt.builder import PromptBuilder
from .constrained import constrain
from .infill import HoleContext


def begun_tokens(builder: PromptBuilder, text: str) -> list[int]:
    """The tokens of a text with which an answer begins, without those of its last word, which is spelt anew.

    Raises:
        PromptError: the context has no room for so many characters.
    """
    return _context(builder, text).before


def begin_answer(builder: PromptBuilder, request: Request, text: str) -> None:
    """Let the answer of a request begin with a text, which is not told again.

    Args:
        builder: that made the request.
        request: for an answer without a thought, tools or another constraint.
        text: that the answer begins with.

    Raises:
        OptionError: `max_tokens` is too small for what is left of the text's last word.
        PromptError: the context has no room.
    """
    context, what = _context(builder, text), "The answer"
    builder.extend(request, context.before, beside=0)
    assert isinstance(request.reader, Answer)
    request.reader.skip = len(context.tail)
    constrain(builder, request, builder.language(context.pattern(), what), what)


def _context(builder: PromptBuilder, text: str) -> HoleContext:
    builder.check_characters(len(text))
    return HoleContext.of(builder.tokenizer, text, "")
