"""Quick Actions as data: what is asked of the model, of what, and where the answer goes."""

from __future__ import annotations

import re
import unicodedata
import zlib
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import DgemmaError, shown

INPUTS = ("text", "pictures", "files")  # the selection in any app; picture files or any files in Finder
OUTPUTS = ("replace", "clipboard")
VERBS = ("edit", "generate")
_NOT_IN_A_LINE = r"/:\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_TITLE = re.compile(rf"[^.{_NOT_IN_A_LINE}][^{_NOT_IN_A_LINE}]{{0,79}}")
_TITLE_BYTES = 200  # file systems allow 255 in a name
_NOT_IN_A_PLIST = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML has none of them


@dataclass(frozen=True)
class Action:
    """One Quick Action.

    Attributes:
        key: a short name, unique.
        title: the menu item.
        instruction: what is asked; None asks the user for it in a dialog.
        input: one of `INPUTS`.
        output: one of `OUTPUTS`; only text can be replaced.
        verb: "edit" begins from the text, "generate" answers about it. Files are answered about.
        strength: of `edit`: the share of the text that begins as noise; None is its default.

    Raises:
        DgemmaError: a field has another value.
    """

    key: str
    title: str
    instruction: str | None
    input: str = "text"
    output: str = "replace"
    verb: str = "edit"
    strength: float | None = None

    def __post_init__(self):
        name = f"The action {shown(self.key)}"
        if not isinstance(self.key, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.key):
            raise DgemmaError(f"{name} should have a key of small letters, digits and -, such as make-formal.")
        # A Services menu drops what stands before a slash, and a bundle has the title as its name.
        right = isinstance(self.title, str) and _TITLE.fullmatch(self.title)
        if not right or len(self.title.encode()) > _TITLE_BYTES:
            raise DgemmaError(f"{name} has the title {shown(self.title)}; it should be a short line without / and :.")
        if self.instruction is not None and (not isinstance(self.instruction, str) or not self.instruction.strip()):
            raise DgemmaError(f"{name} has the instruction {shown(self.instruction)}; it should be text.")
        if self.instruction is not None and (odd := _NOT_IN_A_PLIST.search(self.instruction)):
            raise DgemmaError(
                f"{name} has {odd[0]!a} in its instruction, which no property list can hold; leave it out."
            )
        for field, allowed in (("input", INPUTS), ("output", OUTPUTS), ("verb", VERBS)):
            if getattr(self, field) not in allowed:
                raise DgemmaError(
                    f"{name} has {field} {shown(getattr(self, field))}; it should be one of {', '.join(allowed)}."
                )
        if self.input != "text" and (self.output == "replace" or self.verb == "edit"):
            raise DgemmaError(f"{name} takes {self.input}, so its output should be clipboard and its verb generate.")
        if self.strength is not None and (
            self.verb != "edit" or isinstance(self.strength, bool) or not isinstance(self.strength, Real)
            or not 0 <= self.strength <= 1
        ):  # fmt: skip
            raise DgemmaError(
                f"{name} has strength {shown(self.strength)}; it should be from 0 to 1, of the verb edit."
            )


# Most of a text changes where it is rewritten, so its canvas begins as noise alone.
ACTIONS = (
    Action("rewrite", "Rewrite (mlx-dgemma)", "Rewrite this text so that it reads well.", strength=1),
    Action("grammar", "Fix Grammar (mlx-dgemma)", "Correct spelling, grammar and punctuation. Change nothing else."),
    Action("shorten", "Shorten (mlx-dgemma)", "Shorten this text to half its length. Keep its meaning.", strength=1),
    Action("translate", "Translate to English (mlx-dgemma)", "Translate this text to English.", strength=1),
    Action("explain", "Explain (mlx-dgemma)", "Explain this in plain words.", output="clipboard", verb="generate"),
    Action(
        "describe",
        "Describe Picture (mlx-dgemma)",
        "Describe this picture; if there are several, describe each of them.",
        "pictures",
        "clipboard",
        "generate",
    ),
    Action("ask", "Ask About File (mlx-dgemma)", None, "files", "clipboard", "generate"),
)


def read_actions(path: Path) -> tuple[Action, ...]:
    """Actions from a YAML file: a list of mappings with the fields of `Action`.

    `key` may be left out: it is made from the title. `instruction: null` asks.

    Raises:
        DgemmaError: the file is no such list.
    """
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DgemmaError(f"{path} is not valid YAML ({' '.join(str(error).split())}); fix it.") from None
    if not isinstance(content, list) or not content:
        raise DgemmaError(f"{path} holds {shown(content)}; it should be a list of actions with title and instruction.")
    found = tuple(_read_action(one, path) for one in content)
    keys = [action.key for action in found]
    for action in found:
        if keys.count(action.key) > 1:
            raise DgemmaError(f"{path} has several actions with the key {action.key}; give each its own key.")
    return found


def _read_action(one: Any, path: Path) -> Action:
    known = [field.name for field in fields(Action)]
    if not isinstance(one, dict):
        raise DgemmaError(f"{path} holds {shown(one)}; each action should have a title and an instruction.")
    for name in one:
        if name not in known:
            raise DgemmaError(
                f"{path} gives an action the field {shown(name)}; it should be one of {', '.join(known)}."
            )
    for name in ("title", "instruction"):
        if name not in one:
            raise DgemmaError(f"{path} has an action without {name}; give it one.")
    defaults: dict[str, Any] = {"key": _key(str(one["title"]))}
    if one.get("input", "text") != "text":
        defaults |= {"output": "clipboard", "verb": "generate"}
    elif one.get("output") == "clipboard":
        defaults["verb"] = "generate"
    return Action(**{**defaults, **one})


def _key(title: str) -> str:
    """A key made from a title; where that has no Latin letters, a number that stays the same."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or f"action-{zlib.crc32(title.encode('utf-8', 'replace')):08x}"
