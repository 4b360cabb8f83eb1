"""The clipboard, by the program that this system has for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import DgemmaError

SECONDS = 10.0  # that the program may take
PROGRAMS = (  # command, and the variable of the display that it needs
    (("pbcopy",), ""),
    (("wl-copy", "--type", "text/plain;charset=utf-8"), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
)


def program() -> Sequence[str]:
    """The command that takes a text for the clipboard on stdin.

    Raises:
        DgemmaError: there is none.
    """
    import shutil

    for command, display in PROGRAMS:
        if shutil.which(command[0]) and (not display or os.environ.get(display)):
            return command
    raise DgemmaError(
        "--copy finds no clipboard: there is no pbcopy, wl-copy or xclip here, or no display; leave it out."
    )


def copy(text: str) -> None:
    """Put a text on the clipboard.

    Raises:
        DgemmaError: the program is missing, fails or hangs.
    """
    import subprocess

    command = program()
    # Without a locale, as in a Shortcut, pbcopy takes UTF-8 for Mac Roman.
    environment = {**os.environ, **({"LC_ALL": "en_US.UTF-8"} if command[0] == "pbcopy" else {})}
    quiet = subprocess.DEVNULL  # the other two go on in the background and would hold a pipe open
    try:
        done = subprocess.run(
            command, input=text.encode(), stdout=quiet, stderr=quiet, env=environment, timeout=SECONDS, check=False
        )
        why = f"it exited with {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = getattr(error, "strerror", None) or f"it did not end within {SECONDS:g} seconds"
    if why:
        raise DgemmaError(f"{command[0]} did not take the text for the clipboard ({why}); the text itself is complete.")
