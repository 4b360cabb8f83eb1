"""What was typed in earlier chats, kept in a file that only its user can read."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from ..errors import DgemmaError
from ..files import atomic_file, state_folder

KEPT = 1000  # turns; the file may grow to twice as many


class History:
    """Turns, the oldest first, in a file with one JSON string a line.

    Args:
        path: of the file; None takes chat-history in the user's state folder.

    Attributes:
        entries: the turns.
    """

    def __init__(self, path: Path | None = None):
        self._path = path or state_folder() / "chat-history"
        self.entries: list[str] = []
        text = ""
        with suppress(OSError, UnicodeDecodeError):
            text = self._path.read_text(encoding="utf-8")
        lines = text.splitlines()
        self._end = "\n" if lines and not text.endswith("\n") else ""  # what a last line that was cut lacks
        for line in lines:
            with suppress(ValueError, RecursionError):  # a line that was cut
                if isinstance(entry := json.loads(line), str):
                    self.entries.append(entry)
        self.entries = self.entries[-KEPT:]
        if len(lines) > 2 * KEPT:
            with suppress(DgemmaError), atomic_file(self._path, 0o600) as draft:
                draft.write_text("".join(json.dumps(one) + "\n" for one in self.entries), encoding="utf-8")

    def add(self, turn: str) -> None:
        """Keep a turn, unless it repeats the last one or begins with a blank. Where no file can be written, for now."""
        if not turn.strip() or turn[0] == " " or self.entries[-1:] == [turn]:
            return
        self.entries.append(turn)
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(
                os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8"
            ) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(self._end + json.dumps(turn) + "\n")
            self._end = ""
