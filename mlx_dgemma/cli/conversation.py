"""A chat's conversation: its messages, what is attached to the next turn, and the file that it is saved in."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DgemmaError, OptionError, PromptError
from ..files import atomic_file
from ..prompt.messages import Message, messages_of, parts_of
from ..prompt.paths import local_path

if TYPE_CHECKING:
    from ..decoding.session import Picture
    from ..engine import Engine

KIND = "mlx-dgemma conversation"


@dataclass
class Conversation:
    """What was said, and what is attached to the next turn.

    Attributes:
        engine: answers.
        options: of every answer.
        system: the system message.
        messages: those so far, with pictures and videos as absolute paths.
        parts: pictures and videos of the next turn, as parts of its message.
        said: transcripts of the next turn.
    """

    engine: Engine
    options: dict[str, Any]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    parts: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pictures: dict[str, Picture] = {}  # by path, decoded

    def add_image(self, path: str) -> str:
        """Attach a picture.

        Returns:
            Its absolute path.

        Raises:
            PromptError: it does not exist or cannot be decoded.
        """
        path = absolute(path)
        self._picture(path)
        self.parts.append({"type": "image", "image": path})
        return path

    def add_video(self, path: str) -> str:
        """Attach a video; its beginning is decoded. Returns and raises as `add_image`."""
        from ..prompt.video import sample_frames

        path = absolute(path)
        if not os.path.exists(path):
            raise PromptError(f"{path} does not exist.")
        given = {name: self.options[name] for name in ("fps", "max_frames") if name in self.options}
        next(iter(sample_frames(path, **given)), None)
        self.parts.append({"type": "video", "video": path})
        return path

    def ask(self, text: str) -> list[Message]:
        """Begin a turn; `answer` or `withdraw` ends it.

        Returns:
            All messages for `Engine.stream`.

        Raises:
            PromptError: the conversation cannot be encoded; it is then as it was.
        """
        whole = "\n\n".join(filter(str.strip, [*self.said, text]))
        part = {"type": "text", "text": whole, **({"transcripts": [*self.said]} if self.said else {})}
        content: Any = [*self.parts, part] if self.parts or self.said else whole
        messages = messages_of([*self.messages, {"role": "user", "content": content}])
        for one in parts_of(messages, "image"):
            one["image"] = self._picture(one["image"])
        self.messages.append({"role": "user", "content": content})
        return messages

    def answer(self, text: str) -> None:
        """End a turn with the model's answer."""
        self.messages.append({"role": "assistant", "content": text})
        self.parts, self.said = [], []

    def withdraw(self) -> None:
        """End a turn without an answer: what was attached to it is attached to the next one."""
        self.messages.pop()

    def reset(self) -> None:
        """Begin anew, with the same system message."""
        self.messages, self.parts, self.said = [], [], []

    def set_mode(self, mode: str) -> None:
        """Answer in another mode from now on.

        Raises:
            OptionError: there is no such mode, or another option does not go with it.
        """
        options = {**self.options, "mode": mode}
        known = {name: value for name, value in options.items() if name not in ("seed", "thinking")}
        self.engine.options.override(**known)
        self.options = options

    @property
    def mode(self) -> str:
        """How text comes."""
        return str(self.options.get("mode") or self.engine.options.mode)

    def save(self, name: str) -> Path:
        """Write the conversation to a file, as a whole or not at all; pictures and videos by their paths.

        Raises:
            OptionError: another file has the name.
            DgemmaError: the file cannot be written.
        """
        path = Path(absolute(name))
        if os.path.lexists(path) and _read(path) is None:
            raise OptionError(f"{path} exists and is no saved conversation; give another name.")
        held = {"kind": KIND, "system": self.system, "mode": self.mode, "messages": self.messages}
        with atomic_file(path, 0o600) as draft:
            draft.write_text(json.dumps(held, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return path

    def load(self, name: str) -> Path:
        """Go on with a saved conversation in place of this one.

        Raises:
            DgemmaError: the file is none, or what it names cannot be read; this conversation stays.
        """
        path = Path(absolute(name))
        if not path.exists():
            raise OptionError(f"{path} does not exist.")
        held = _read(path)
        if held is None:
            raise OptionError(f"{path} is no saved conversation; give a file that /save wrote.")
        other = Conversation(self.engine, self.options, held.get("system"))
        try:
            if held.get("mode"):
                other.set_mode(held["mode"])
            if held["messages"]:
                messages_of(held["messages"])
            for part in parts_of(held["messages"], "image", "video"):
                other.add_image(part["image"]) if part["type"] == "image" else other.add_video(part["video"])
        except DgemmaError as error:
            raise OptionError(f"{path} cannot be gone on with: {error}") from None
        self.system, self.options, self._pictures = other.system, other.options, other._pictures
        self.messages, self.parts, self.said = held["messages"], [], []
        return path

    def _picture(self, path: str) -> Picture:
        if path not in self._pictures:
            budget = self.options.get("image_tokens", self.engine.options.image_tokens)
            self._pictures[path] = self.engine.builder.load_image(path, budget)
        return self._pictures[path]


def absolute(name: str) -> str:
    """The absolute path of a file that a user names, perhaps with `~`, quotes or escaped blanks, or as an address."""
    path = local_path(name)
    if not os.path.lexists(path):  # a file to be made
        with suppress(ValueError):  # quotes that do not match
            words = shlex.split(path)
            path = words[0] if len(words) == 1 and words[0] else path
    return os.path.abspath(os.path.expanduser(path))


def _read(path: Path) -> dict[str, Any] | None:
    """What a saved conversation holds; None of another file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    right = isinstance(held, dict) and held.get("kind") == KIND and isinstance(held.get("messages"), list)
    right = right and all(isinstance(held.get(name), (str, type(None))) for name in ("system", "mode"))
    right = right and all(isinstance(one, dict) and one.get("content") is not None for one in held["messages"])
    return held if right else None
