"""Fill-in-the-middle prompts of other models, whose markers stand in the text: prefix, suffix and other files.

This model has no such markers. Editors put those of the model whose name they know into a prompt; its parts make an
infill. A prompt in which a marker is missing or stands in another order is a text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

PREFIX, SUFFIX, MIDDLE = "prefix", "suffix", "middle"


class Parts(NamedTuple):
    """What a fill-in-the-middle prompt holds.

    Attributes:
        prefix, suffix: around the hole; without a suffix the prefix is to be continued.
        files: texts of other files, each with its name in the first line where the prompt gives one.
    """

    prefix: str
    suffix: str
    files: tuple[str, ...] = ()


class _Family(NamedTuple):
    """The markers of a family of models."""

    prefix: str
    suffix: str
    middle: str
    files: tuple[str, ...] = ()  # each stands before another file
    blanks: tuple[str, str, str] = ("", "", "")  # that belong to the marker: behind prefix, before suffix and middle


FAMILIES = (
    # Qwen, CodeGemma, Granite 4, Mercury
    _Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|filename|>"),
    ),
    # StarCoder, StableCode, Mellum
    _Family("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<repo_name>", "<reponame>", "<file_sep>", "<filename>")),
    _Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<reponame>", "<filename>")),  # SantaCoder, Granite 3
    _Family("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", ("<filename>",)),  # Seed-Coder
    _Family("<PRE>", "<SUF>", "<MID>", blanks=(" ", " ", " ")),  # CodeLlama
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<｜fim▁file｜>",)),  # DeepSeek
    _Family("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", ("###REFERENCE:",)),  # GLM, CodeGeeX
)
FRAMES = ("<|user|>", "<|assistant|>", "<bos>", "<s>", "<|endoftext|>", "<｜begin▁of▁sentence｜>")  # around it all
CODESTRAL = _Family("[PREFIX]", "[SUFFIX]", "[MIDDLE]")
CODESTRAL_FILE = re.compile(r"^\+\+\+\+\+ .*\n", re.MULTILINE)  # the line with a file's name


def parts_of_prompt(prompt: str) -> Parts | None:
    """The parts of a fill-in-the-middle prompt; None: it is none."""
    for family in FAMILIES:
        if (found := _framed(prompt, family)) is not None:
            return found
    return _codestral(prompt) or _whole_files(prompt)


def _framed(prompt: str, family: _Family) -> Parts | None:
    """What stands between the markers of a family, in either order of prefix and suffix."""
    kinds = {family.prefix: PREFIX, family.suffix: SUFFIX, family.middle: MIDDLE}
    found = [(one.start(), kinds[one[0]]) for one in re.finditer("|".join(map(re.escape, kinds)), prompt)]
    order = _outermost(found)
    if order is None:
        return None
    lengths = {kind: len(marker) for marker, kind in kinds.items()}
    ends = [start for start, _ in order[1:]] + [len(prompt)]
    text = {kind: prompt[start + lengths[kind] : end] for (start, kind), end in zip(order, ends)}
    before = prompt[: order[0][0]]
    behind_prefix, before_suffix, before_middle = family.blanks
    if PREFIX in text:
        files = _files(before, family)
        first = text[PREFIX].removeprefix(behind_prefix)
        prefix_first = order[0][1] == PREFIX
        first = first.removesuffix(before_suffix if prefix_first else before_middle)
    else:  # the text before the suffix is the prefix, behind other files where there are some
        prefix_first, (files, first) = True, _last_file(before, family)
    suffix = text[SUFFIX].removesuffix(before_middle if prefix_first else "")
    begun = _without_frames(text[MIDDLE], at_end=True)
    return Parts(first + begun if first else begun.removeprefix(behind_prefix), suffix, tuple(files))


def _outermost(found: Sequence[tuple[int, str]]) -> list[tuple[int, str]] | None:
    """The three markers (or suffix and middle) around everything; those inside of them are text that is edited."""
    if not found or found[0][1] == MIDDLE or found[-1][1] != MIDDLE:
        return None
    (_, opening), depth, inner = found[0], 0, []
    closing = SUFFIX if opening == PREFIX else PREFIX
    for i, (start, kind) in enumerate(found):
        if kind == opening:
            depth += 1
        elif kind == closing and depth == 1:
            inner.append((start, kind))
        elif kind == MIDDLE:
            depth -= 1
            if depth == 0 and i < len(found) - 1:
                return None
    if depth or len(inner) > 1 or (not inner and opening == PREFIX):
        return None
    return [found[0], *inner, found[-1]]


def _files(before: str, family: _Family) -> list[str]:
    """The texts of other files before a prefix. A last line by itself is the name of the file that is edited."""
    sections = _sections(before, family)
    named = len(sections) > 1 and "\n" not in sections[-1].strip()
    return [one.strip() for one in (sections[:-1] if named else sections) if one.strip()]


def _sections(text: str, family: _Family) -> list[str]:
    """A text cut at the markers of files, without the name of a repository."""
    if not family.files:
        return [_without_frames(text)]
    pieces = re.split(f"({'|'.join(map(re.escape, family.files))})", text)
    sections = [one for marker, one in zip(pieces[1::2], pieces[2::2]) if "repo" not in marker]
    return [_without_frames(pieces[0]), *sections]


def _last_file(text: str, family: _Family) -> tuple[list[str], str]:
    """Other files, and the text of the last one."""
    *files, last = _sections(text, family)
    return [one.strip() for one in files if one.strip()], last.partition("\n")[2] if files else last


def _without_frames(text: str, at_end: bool = False) -> str:
    """A text without the markers that wrap a whole prompt; at its end they must stand by themselves."""
    if at_end:
        return "" if text.strip() in FRAMES else text
    for frame in FRAMES:
        text = text.replace(frame, "")
    return text


def _codestral(prompt: str) -> Parts | None:
    """[SUFFIX]...[PREFIX]..., with the names of files in lines of their own."""
    before, found, rest = prompt.partition(CODESTRAL.suffix)
    suffix, also, prefix = rest.rpartition(CODESTRAL.prefix)
    if not found or not also or CODESTRAL.prefix in before or CODESTRAL.prefix in suffix:
        return None
    prefix = prefix.removesuffix(CODESTRAL.middle)
    names = [*CODESTRAL_FILE.finditer(prefix)]
    files = [before.strip()] if _without_frames(before).strip() else []
    if names:
        starts = [one.start() for one in names]
        bounds = zip([0, *starts], starts)
        files += [text for start, end in bounds if (text := prefix[start:end].removeprefix("+++++ ").strip())]
        prefix = prefix[names[-1].end() :]
    return Parts(prefix, suffix, tuple(files))


def _whole_files(prompt: str) -> Parts | None:
    """A repository's files, the last of which is to be continued."""
    for family in FAMILIES[:2]:
        repository, *separators = family.files
        if prompt.lstrip().startswith(repository) and any(one in prompt for one in separators):
            files, last = _last_file(prompt, family)
            return Parts(last, "", tuple(files))
    return None
