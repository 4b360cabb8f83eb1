"""Templates: a text whose holes are filled, each with a text of its own language."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from ..constraints.matching import Pattern, PatternError, Steps
from ..decoding.events import Result
from ..decoding.options import MAX_INTEGER, OptionKeywords, whole_number
from ..decoding.request import Request
from ..errors import LanguageError, OptionError, shown
from ..prompt.audio.transcripts import with_transcripts
from ..prompt.builder import PromptBuilder
from ..prompt.messages import Message, messages_of, reject_surrogates
from .constrained import constrain, task_options
from .mode import Kind, settle_mode
from .templates import split_template

if TYPE_CHECKING:
    from typing_extensions import Unpack

FILL_TEMPLATE = "Write this text with something that fits in the place of every {name}:\n\n"
DIVIDE_STEPS = 300_000  # of matching, for which the scheduler's thread waits
Holes = Mapping[str, int | str | Sequence[str]]


class FillKeywords(OptionKeywords, total=False):
    """Keyword arguments of `fill`."""

    prompt: str | Sequence[Message] | None
    seed: int | None


def fill(
    builder: PromptBuilder,
    template: str,
    holes: Holes,
    *,
    prompt: str | Sequence[Message] | None = None,
    seed: int | None = None,
    **options: Unpack[OptionKeywords],
) -> Request:
    """The request of `Engine.fill`, whose arguments it takes."""
    if not isinstance(template, str) or not isinstance(holes, Mapping):
        raise OptionError(f"template is a text and holes a mapping of their names; these are {template!r}, {holes!r}.")
    reject_surrogates("template", template)
    parts, names = _parse(template)
    if unknown := [name for name in holes if name not in names]:
        raise OptionError(f"The template has no hole {unknown[0]!r}; it has {', '.join(names) or 'none'}.")
    if missing := [name for name in names if name not in holes]:
        raise OptionError(f"holes has nothing for {missing[0]!r}, which stands in the template; give its texts.")
    patterns = {name: hole_pattern(name, holes[name]) for name in names}
    source = [patterns[part] if i % 2 else part for i, part in enumerate(parts)]
    messages = messages_of(FILL_TEMPLATE + template if prompt is None else with_transcripts(prompt))
    request = builder.request(messages, seed, task_options(builder, "fill", options))
    language = builder.language(source, "The template", "template")
    constrain(builder, request, language, "The template")
    settle_mode(builder, request, Kind(2 * int(language.distance[0]), "rigid"))
    request.postprocess = lambda result: _with_holes(result, parts, patterns)
    return request


def hole_pattern(name: str, hole: int | str | Sequence[str]) -> str:
    """The pattern of a hole's texts, in `re`'s syntax.

    Args:
        hole: at most so many characters of one line, a regular expression, or the texts to choose from.

    Raises:
        OptionError: neither of these.
    """
    number = whole_number(hole)
    if number is not None and 0 < number <= MAX_INTEGER:
        return rf"[^\n]{{1,{number}}}"
    if isinstance(hole, str):
        return hole
    if isinstance(hole, Sequence) and hole and all(isinstance(one, str) and one for one in hole):
        return "|".join(map(re.escape, hole))
    raise OptionError(
        f"The hole {name!r} is {shown(hole)}; give a number of characters, a list of texts, or a regular expression."
    )


def _parse(template: str) -> tuple[list[str], list[str]]:
    """(text, name, text, name, ..., text) and the names, as str.format reads a template."""
    try:
        texts, slots = split_template(template)
    except ValueError as error:
        raise OptionError(f"The template {template!r} is broken ({error}); write {{{{ and }}}} for braces.") from None
    parts, names = texts[:1], []
    for slot, text in zip(slots, texts[1:]):
        if not slot.name or slot.formatting or slot.name in names:
            what = "stands twice" if slot.name in names else "should be a name alone, such as {city}"
            raise OptionError(f"The hole {{{slot.name}}} of the template {what}; change the template.")
        names.append(slot.name)
        parts += [slot.name, text]
    return parts, names


def _with_holes(result: Result, parts: list[str], patterns: dict[str, str]) -> Result:
    try:
        holes = divide(result.text, parts, patterns)
    except PatternError as error:
        raise LanguageError(f"The text cannot be divided into its holes: {error}; simplify their patterns.") from None
    if holes is None:
        raise LanguageError("The text is not the template with its holes filled; this is a fault, please report it.")
    return replace(result, holes=holes)


def divide(text: str, parts: list[str], patterns: dict[str, str]) -> dict[str, str] | None:
    """The holes of a text, the first ones as long as possible; None if it is not made of these parts.

    Args:
        text: the filled template.
        parts: text, name, text, name, ..., text of the template.
        patterns: of the names, in `re`'s syntax.

    Raises:
        PatternError: it takes too many steps, for which the scheduler's thread would wait.
    """
    steps = Steps(DIVIDE_STEPS)
    compiled = {name: Pattern(pattern, steps) for name, pattern in patterns.items()}

    @cache
    def divided(i: int, at: int) -> tuple[tuple[str, str], ...] | None:
        """The names and texts of the holes from part `i` on, which begins at a place in the text."""
        if not text.startswith(parts[i], at):
            return None
        start = at + len(parts[i])
        if i + 1 == len(parts):
            return () if start == len(text) else None
        for end in _ends(compiled[parts[i + 1]], text, start):
            if (rest := divided(i + 2, end)) is not None:
                return (parts[i + 1], text[start:end]), *rest
        return None

    try:
        found = divided(0, 0)
    except RecursionError:
        raise PatternError("they are too many") from None
    return None if found is None else dict(found)


def _ends(pattern: Pattern, text: str, start: int) -> Iterator[int]:
    """Where a hole may end that begins at a place in a text, the last one first. It is matched as a text of its own."""
    if not pattern.looks_around:
        yield from reversed(pattern.ends(text, [start]))
        return
    for end in range(len(text), start - 1, -1):
        if pattern.fullmatch(text[start:end]):
            yield end
