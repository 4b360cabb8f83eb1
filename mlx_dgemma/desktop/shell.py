"""The shell part of a Quick Action.

It runs in a GUI session, whose PATH is that of the system and which reads no file of the user's shells. It is given to
/bin/bash, since zsh would read ~/.zshenv, whose output would end up in the text; the tests run it in zsh as well. The
selection is printed again where there is no whole answer. The clipboard is written with a whole answer alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from .actions import Action

# Words reach AppleScript as arguments, so that no quote or backslash in them is read as AppleScript. pbcopy takes its
# input's encoding from the locale, which a GUI session does not set.
_HEAD = """\
# Written by `mlx-dgemma quick-actions install`, which overwrites changes.
export PATH="${PATH:-/usr/bin:/bin}"
tell_user() {
  osascript -e 'on run argv' -e 'display notification (item 2 of argv) with title (item 1 of argv)' -e 'end run' \\
    @TITLE@ "$1" >/dev/null 2>&1 || :
}
copy() { printf '%s' "$1" | env LC_ALL=en_US.UTF-8 pbcopy; }
reason() {
  line=$(grep . "$errors" 2>/dev/null | tail -n 1)
  printf '%s' "${line:-The command failed.}"
}
ask_model() { @COMMAND@ "$@" 2>"$errors"; }
"""
_TEXT = """\
selection=$(cat; printf x)
selection=${selection%x}
"""
_FILES = """\
if [ $# -eq 0 ]; then tell_user 'No file is selected.'; exit 0; fi
"""
_QUESTION = """\
if ! question=$(osascript -e 'on run argv' \\
  -e 'text returned of (display dialog "What do you want to know?" with title (item 1 of argv) default answer "")' \\
  -e 'end run' @TITLE@ 2>/dev/null) || [ -z "$question" ]; then
  @UNCHANGED@
  exit 0
fi
"""
_NOTHING = """\
if [ -z "$selection" ]; then tell_user 'No text is selected.'; exit 0; fi
"""
# The x keeps line breaks at the end, which $(...) drops.
_BEGIN = """\
tell_user 'Working on it.'
errors=$(mktemp 2>/dev/null) || errors=/dev/null
"""
_ASK_TEXT = """\
answer=$(printf '%s' "$selection" | ask_model @INSTRUCTION@; code=$?; printf x; exit $code)
code=$?
"""
_ASK_FILES = """\
answer=$(ask_model @INSTRUCTION@ -- "$@" </dev/null; code=$?; printf x; exit $code)
code=$?
"""
_END = """\
answer=${answer%x}
if [ $code -eq 0 ] && [ -n "$answer" ]; then
  @SUCCESS@
else
  @UNCHANGED@
  tell_user "$(reason)"
fi
[ "$errors" = /dev/null ] || rm -f "$errors"
exit 0
"""
_REPLACED = """printf '%s' "$answer"; tell_user 'The text was replaced.'"""
_COPIED = """if copy "$answer"; then tell_user 'The answer is on the clipboard.'; else tell_user 'pbcopy failed.'; fi"""


def script(action: Action, program: Sequence[str], environment: Mapping[str, str], model: str | None = None) -> str:
    """The shell script of an action. Text comes on stdin, files come as arguments.

    Args:
        action: the action.
        program: the words that start the command line, by absolute paths.
        environment: variables that the command needs.
        model: folder or Hub id; None leaves it to config.toml.
    """
    words = [*program, "quick-actions", "run", "--verb", action.verb]
    if action.strength is not None:
        words += ["--strength", f"{action.strength:g}"]
    if model:
        words += ["--model", model]
    settings = [f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items())]
    text, asks = action.input == "text", action.instruction is None
    body = [_TEXT, _NOTHING] if text else [_FILES]
    body += [_QUESTION] if asks else []
    body += [_BEGIN, _ASK_TEXT if text else _ASK_FILES, _END]
    instruction = '"$question"' if action.instruction is None else shlex.quote(action.instruction)
    slots = {
        "COMMAND": shlex.join(words),
        "TITLE": shlex.quote(action.title),
        "INSTRUCTION": f"--instruction {instruction}",
        "SUCCESS": _REPLACED if action.output == "replace" else _COPIED,
        "UNCHANGED": "printf '%s' \"$selection\"" if action.output == "replace" else ":",
    }
    # In one pass, so that a value is not searched for slots; the variables' values stand between head and body.
    head, rest = (re.sub("@([A-Z]+)@", lambda slot: slots[slot[1]], part) for part in (_HEAD, "".join(body)))
    return head + "".join(settings) + rest
