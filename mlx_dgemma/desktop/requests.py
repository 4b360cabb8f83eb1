"""A request of a Quick Action or a Shortcut as a command line of `generate` or `edit`, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import DgemmaError, OptionError, PromptError, shown
from .actions import VERBS

PICTURES = frozenset(".avif .bmp .gif .heic .heif .jpeg .jpg .jp2 .png .tif .tiff .webp".split())
TEXTS = {"action", "text", "instruction", "model", "system"}
FIELDS = (*sorted(TEXTS), "files", "images", "seed", "max_tokens", "strength")


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Attributes:
        action: one of `VERBS`.
        text: what it is about; of `edit` the text to rewrite.
        instruction: what to do with it.
        files: paths; pictures among them are seen, others are read as text.
        images: paths of pictures, whatever their names are.
        options: {option of the command line: value}.
    """

    action: str
    text: str = ""
    instruction: str = ""
    files: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    images: tuple[str, ...] = ()

    def __post_init__(self):
        if self.action == "edit":
            if not self.text.strip():
                raise PromptError("There is no text to edit; select some, or give it as text.")
            if not self.instruction.strip():
                raise PromptError("There is no instruction; say what to do with the text.")
            if self.files or self.images:
                raise PromptError("edit takes no files; give the text, or take the action generate.")
        elif not (self.text.strip() or self.instruction.strip()):
            raise PromptError("There is no prompt; give an instruction or a text.")

    def arguments(self, file: Path) -> list[str]:
        """The words of the command line, with `file` holding the text."""
        words = [self.action, "--json", *(word for pair in self.options for word in pair)]
        if self.action == "edit":
            return [*words, "--", self.instruction, str(file)]
        for name in self.images:
            words += ["--image", _of_file(name)]
        for name in self.files:
            words += ["--image" if Path(name).suffix.lower() in PICTURES else "--file", _of_file(name)]
        if self.text.strip():
            words += ["--file", str(file)]
        return [*words, "--", self.instruction] if self.instruction.strip() else words


def read_request(data: bytes) -> Asked:
    """A request in JSON: an object with `FIELDS`, of which `action` must be there.

    Raises:
        OptionError: it is no such object.
        PromptError: nothing is asked.
    """
    try:
        content: Any = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"The request is not JSON ({error}); give an object with action and text.") from None
    if not isinstance(content, dict):
        raise OptionError(f"The request is {shown(content)}; it should be an object with action and text.")
    for name, value in content.items():
        if name not in FIELDS:
            raise OptionError(f"The request has the field {shown(name)}; it should be one of {', '.join(FIELDS)}.")
        if value is not None:
            _check(name, value)
    if content.get("action") not in VERBS:
        raise OptionError(f"action is {shown(content.get('action'))}; it should be one of {', '.join(VERBS)}.")
    given = {name: value for name, value in content.items() if value is not None}
    options = [
        (f"--{name.replace('_', '-')}", str(given[name]))
        for name in ("model", "seed", "max_tokens", "strength", "system")
        if name in given
    ]
    files, images = tuple(given.get("files", ())), tuple(given.get("images", ()))
    return Asked(given["action"], given.get("text", ""), given.get("instruction", ""), files, tuple(options), images)


def read_answer(action: str, printed: str) -> str:
    """The text of what `--json` printed.

    Raises:
        DgemmaError: it is empty, was interrupted, or is an edited text whose end is missing.
    """
    answer = json.loads(printed)
    text, reason = answer["text"], answer["finish_reason"]
    if reason == "interrupted":
        raise DgemmaError("The answer was interrupted; ask again.")
    if not text.strip():
        raise DgemmaError("The model gave no text; ask again, or in other words.")
    if action == "edit" and reason == "length":
        raise DgemmaError("The new text was cut before its end, so it is not taken; select less text, or ask again.")
    return text


def _of_file(name: str) -> str:
    """A path as the command line takes it, where - is stdin."""
    return "./-" if name == "-" else name


def _check(name: str, value: Any) -> None:
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
            raise OptionError(
                f"{name} has half of a surrogate pair, which is no character, in {shown(text)}; leave it out."
            )
        if isinstance(text, str) and "\0" in text and name in ("files", "images", "model"):
            raise OptionError(f"{name} is {shown(text)}, which has a zero byte; no file has such a name.")
    if name in TEXTS:
        right, kind = isinstance(value, str), "text"
    elif name in ("files", "images"):
        right, kind = isinstance(value, Sequence) and all(isinstance(one, str) for one in value), "a list of paths"
        right = right and not isinstance(value, str)
    elif name == "strength":
        right, kind = isinstance(value, Real) and not isinstance(value, bool), "a number"
    else:
        right, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    if not right:
        raise OptionError(f"{name} is {shown(value)}; it should be {kind}.")
