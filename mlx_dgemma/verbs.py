"""Infill, templates and edits: what an engine does beyond answering. Each becomes a `Job`."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .canvas import PARTS, Constrained, Control, Drafted
from .constrain import Language, covers_lines
from .errors import OptionError, PromptError
from .infill import IN_VIEW, LONGEST, Filling, Hole, Seams, divide
from .prompt import Answer, messages_of, whole
from .regular import literal, translate
from .schema import to_regex
from .session import Job

if TYPE_CHECKING:
    from .engine import Engine
    from .generate import GenerationOptions
    from .result import Result
    from .session import Row

GAP = "[...]"
FILL_GAP = f"Write this text with something that fits in the place of {GAP}:\n\n"
FILL_TEMPLATE = "Write this text with something that fits in the place of every {name}:\n\n"
Holes = Mapping[str, int | str | Sequence[str]]


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
    least = max(language.shortest, 1)
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


def fill(
    engine: Engine,
    template: str,
    holes: Holes,
    *,
    prompt: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Job:
    """The job of `Engine.fill`."""
    if not isinstance(template, str) or not isinstance(holes, Mapping):
        raise OptionError(f"template is a text and holes a mapping of their names; these are {template!r}, {holes!r}.")
    whole("template", template)
    parts, names = _parse(template)
    if unknown := [name for name in holes if name not in names]:
        raise OptionError(f"The template has no hole {unknown[0]!r}; it has {', '.join(names) or 'none'}.")
    if missing := [name for name in names if name not in holes]:
        raise OptionError(f"holes has nothing for {missing[0]!r}, which stands in the template; give its texts.")
    patterns = {name: hole_pattern(name, holes[name]) for name in names}
    plain = "".join(f"(?:{translate(patterns[part])})" if i % 2 else literal(part) for i, part in enumerate(parts))
    effective = _effective(engine, "fill", options)
    row = engine._row(messages_of(FILL_TEMPLATE + template if prompt is None else prompt), seed, effective)
    control = constrained(engine, row, effective, engine.language(plain, "The template"), "The template")
    return Job(row, effective, control, lambda result: _with_holes(result, parts, patterns))


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


def constrained(
    engine: Engine, row: Row, options: GenerationOptions, language: Language, what: str, thinking: bool = False
) -> Constrained:
    """A text in a language; what cannot be is an error before the first step."""
    least, canvas = int(language.distance[0]) + 1, engine.config.canvas_length
    if least > options.max_tokens:
        raise OptionError(
            f"{what} needs room for {least} tokens, its end included, but max_tokens is {options.max_tokens}; raise it."
        )
    # the context must not end in the middle of a text
    room = (engine.config.text.max_position_embeddings - len(row.tokens)) // canvas * canvas
    if least > room:
        raise PromptError(
            f"{what} needs room for {least} tokens, its end included, but the context leaves room for {room} "
            "behind the prompt; shorten it."
        )
    if isinstance(row.answer, Answer):
        row.answer.max_tokens = min(row.answer.max_tokens, room)
    opened, closed = engine.tokenizer.think_start_tokens, engine.tokenizer.think_end_tokens
    begun = isinstance(row.answer, Answer) and row.answer.thinks
    marks = (opened[0], closed[0]) if (thinking or begun) and opened and closed else ()
    return Constrained(language, options.end_tokens, marks, begun)


def constraint(
    engine: Engine,
    row: Row,
    options: GenerationOptions,
    schema: dict | None,
    regex: str | None,
    thinking: bool,
    tools: list[dict] | None,
) -> Constrained | None:
    """What `schema` or `regex` of `Engine.stream` asks for, or None."""
    if schema is not None and regex is not None:
        raise OptionError("Both schema and regex are given; leave one out.")
    if schema is not None:
        if not isinstance(schema, dict):
            raise OptionError(f"schema is {schema!r}; it should be a JSON Schema as a dict.")
        name, what, pattern = "schema", "The schema", to_regex(schema)
    elif regex is not None:
        if not isinstance(regex, str):
            raise OptionError(f"regex is {regex!r}; it should be a text.")
        name, what, pattern = "regex", f"The regex {regex!r}", translate(regex)
    else:
        return None
    for other, given in (("exact", options.exact), ("stop", options.stop), ("tools", tools)):
        if given:
            raise OptionError(f"{name} is given and {other} is {given!r}; they cannot be together: leave one out.")
    language = engine.language(pattern, what)
    if regex is not None and covers_lines(language):
        raise OptionError(f"{what} matches every line of text, so it asks for nothing; leave it out.")
    return constrained(engine, row, options, language, what, thinking)


def hole_pattern(name: str, hole: int | str | Sequence[str]) -> str:
    """The pattern of a hole's texts, in `re`'s syntax.

    Args:
        hole: at most so many characters of one line, a regular expression, or the texts to choose from.

    Raises:
        OptionError: neither of these.
    """
    if isinstance(hole, int) and not isinstance(hole, bool) and hole > 0:
        return rf"[^\n]{{1,{hole}}}"
    if isinstance(hole, str):
        return hole
    if isinstance(hole, Sequence) and hole and all(isinstance(one, str) and one for one in hole):
        return "|".join(map(re.escape, hole))
    raise OptionError(
        f"The hole {name!r} is {hole!r}; give a number of characters, a list of texts, or a regular expression."
    )


def _parse(template: str) -> tuple[list[str], list[str]]:
    """(text, name, text, name, ..., text) and the names, as str.format reads a template."""
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise OptionError(f"The template {template!r} is broken ({error}); write {{{{ and }}}} for braces.") from None
    parts, names = [""], []
    for text, name, spec, conversion in found:
        parts[-1] += text
        if name is None:
            continue
        if not name or spec or conversion or name in names:
            what = "stands twice" if name in names else "should be a name alone, such as {city}"
            raise OptionError(f"The hole {{{name}}} of the template {what}; change the template.")
        names.append(name)
        parts += [name, ""]
    return parts, names


def _with_holes(result: Result, parts: list[str], patterns: dict[str, str]) -> Result:
    compiled = {name: re.compile(pattern) for name, pattern in patterns.items()}

    def split(text: str, i: int) -> dict[str, str] | None:
        """The holes of a text that the parts from `i` on make, the first ones as long as possible."""
        if not text.startswith(parts[i]):
            return None
        text = text[len(parts[i]) :]
        if i + 1 == len(parts):
            return None if text else {}
        for end in range(len(text), -1, -1):
            if compiled[parts[i + 1]].fullmatch(text[:end]) and (rest := split(text[end:], i + 2)) is not None:
                return {parts[i + 1]: text[:end], **rest}
        return None

    return replace(result, holes=split(result.text, 0) or {})


def _effective(engine: Engine, verb: str, options: dict[str, Any]) -> GenerationOptions:
    effective = engine.options.override(**options)
    if effective.exact:
        raise OptionError(f"exact is True, but the reference's sampler knows no {verb}; leave it out.")
    if effective.stop:
        raise OptionError(f"stop is {effective.stop!r}, but {verb} has an end of its own; leave it out.")
    return effective
