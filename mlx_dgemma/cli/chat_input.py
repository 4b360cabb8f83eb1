"""What a user types in a chat: by prompt_toolkit where it is installed, else by readline; or the lines of a pipe."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Protocol

from ..distributed import rank_here
from .calls.texts import decode_argument, decode_utf8
from .history import History
from .terminal import Terminal

ENDLESS = "Each line of stdin is a turn; /exit or Ctrl-C ends the chat, since mlx.launch passes no end of stdin on."
PROMPT, MORE = "> ", "… "
PASTE_SECONDS = 0.05  # between two pieces of a paste; nobody types the next line so soon


class Input(Protocol):
    """Where turns come from.

    Attributes:
        interactive: whether someone types.
        keys: how a turn of several lines is typed, for /help.
        discarded: whether Ctrl-C has thrown away something that was typed.
    """

    interactive: bool
    keys: str
    discarded: bool

    def read(self) -> str:
        """Read a turn.

        Raises:
            EOFError: the user leaves, or the pipe has ended.
            KeyboardInterrupt: Ctrl-C at the prompt.
        """


def chat_input(terminal: Terminal) -> Input:
    """The best input that there is here."""
    if not sys.stdin.isatty():
        if rank_here() is not None:
            terminal.warn(ENDLESS)
        return PipedInput()
    able = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and find_spec("prompt_toolkit") is not None
    return EditedInput(History()) if able else LineInput(History(), terminal)


class PipedInput:
    """Each line of stdin is a turn; one that ends in a backslash goes on in the next line."""

    interactive, discarded = False, False
    keys = "A line that ends in \\ goes on in the next one."

    def read(self) -> str:
        """Read a turn."""
        lines: list[str] = []
        while data := sys.stdin.buffer.readline():
            lines.append(decode_utf8(data, "stdin").removeprefix("\ufeff").rstrip("\r\n"))
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]
        raise EOFError


class LineInput:
    """Lines with readline's editing, if Python has it. Lines that come together, as pasted ones do, are one turn."""

    interactive = True
    keys = "A line that ends in \\ goes on in the next one; pasted lines stay together."

    def __init__(self, history: History, terminal: Terminal):
        self.discarded = False
        self._history, self._terminal = history, terminal
        self._readline: Any = None
        with suppress(ImportError):
            import readline

            self._readline = readline
            readline.set_auto_history(False)
            for entry in history.entries:
                readline.add_history(entry)

    def read(self) -> str:
        """Read a turn."""
        lines: list[str] = []
        self.discarded = False
        try:
            while True:
                line = self._line(MORE if lines else PROMPT)
                goes_on = line.endswith("\\")
                lines.append(line[:-1] if goes_on else line)
                if not goes_on and not is_more_waiting(sys.stdin.fileno()):
                    break
        except EOFError:
            self._terminal.warn("")
            if not lines:
                raise
        except KeyboardInterrupt:
            self._terminal.warn("")
            typed = self._readline.get_line_buffer() if self._readline else ""
            self.discarded = bool(lines or typed.strip())
            raise
        turn = "\n".join(lines)
        if self._readline and turn.strip() and self._history.entries[-1:] != [turn]:
            self._readline.add_history(turn)
        self._history.add(turn)
        return turn

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return decode_argument(input(prompt), "The line") or ""
        self._terminal.hint(prompt)
        return decode_argument(input(), "The line") or ""


def is_more_waiting(terminal: int, seconds: float = PASTE_SECONDS) -> bool:
    """Whether a terminal has more to read, be it only the beginning of a line.

    Args:
        terminal: its file descriptor.
        seconds: how long to wait for it.
    """
    import termios

    settings = termios.tcgetattr(terminal)
    by_key = [*settings[:3], settings[3] & ~(termios.ICANON | termios.ECHO), *settings[4:]]
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, by_key)  # otherwise only whole lines count
        return bool(select.select([terminal], [], [], seconds)[0])
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, settings)


class EditedInput:
    """prompt_toolkit's line editor: several lines, bracketed paste, and the history with its search."""

    interactive = True
    keys = (
        "Enter sends. Alt-Enter, Ctrl-J, or \\ before Enter begin a new line; pasted lines stay together.\n"
        "Ctrl-R searches what you typed before, Ctrl-X Ctrl-E opens it in the editor."
    )

    def __init__(self, history: History):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory

        self.discarded = False
        self._history = history
        self._session: PromptSession[str] = PromptSession(
            message=PROMPT,
            multiline=True,
            prompt_continuation=lambda width, row, wraps: "" if wraps else MORE,
            history=InMemoryHistory(history.entries),
            key_bindings=self._bindings(),
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            include_default_pygments_style=False,
        )

    def read(self) -> str:
        """Read a turn."""
        self.discarded = False
        turn = self._session.prompt().strip("\n")
        self._history.add(turn)
        return turn

    def _bindings(self) -> Any:
        from prompt_toolkit.key_binding import KeyBindings

        bindings = KeyBindings()

        @bindings.add("enter")
        def _(event: Any) -> None:
            buffer = event.current_buffer
            if buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            elif event.key_processor.input_queue or select.select([sys.stdin], [], [], 0)[0]:
                buffer.insert_text("\n")  # a paste of a terminal that does not mark it as one
            else:
                buffer.validate_and_handle()

        @bindings.add("tab")  # as readline has it here: the indentation of what is pasted
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\t")

        @bindings.add("escape", "enter")
        @bindings.add("c-j")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-c")
        def _(event: Any) -> None:
            self.discarded = bool(event.current_buffer.text.strip())
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

        return bindings
