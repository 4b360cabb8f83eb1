"""A library of AppleScript handlers. It was never run by AppleScript, since no Mac was at hand."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

# `do shell script` turns line feeds into carriage returns unless it is told not to. Its errors hold what the command
# wrote to stderr, so that a failed handler tells why and changes nothing.
_LIBRARY = """\
-- Handlers of mlx-dgemma. Save as a script library: see docs/macos.md.
property program : @PROGRAM@

-- The answer to a prompt.
on generate(question)
	return my answered("generate", "", question)
end generate

-- A text, rewritten according to an instruction.
on edit(aText, instruction)
	return my answered("edit", aText, instruction)
end edit

-- The selection of the application in front, rewritten in place. The clipboard keeps its text.
on editSelection(instruction)
	set kept to my clipboardText()
	try
		set the clipboard to ""
		tell application "System Events" to keystroke "c" using command down
		delay 0.3
		set selected to my clipboardText()
		if selected is "" then error "No text is selected."
		set the clipboard to my edit(selected, instruction)
		tell application "System Events" to keystroke "v" using command down
		delay 0.3
		set the clipboard to kept
	on error why number code
		set the clipboard to kept
		error why number code
	end try
end editSelection

on clipboardText()
	try
		return the clipboard as text
	on error
		return ""
	end try
end clipboardText

on answered(verb, aText, instruction)
	set asked to program & " quick-actions run --verb " & verb & " --instruction " & quoted form of instruction
	return do shell script "printf %s " & quoted form of aText & " | " & asked without altering line endings
end answered
"""


def library(program: Sequence[str], model: str | None = None) -> str:
    """The library's text.

    Args:
        program: the words that start the command line, by absolute paths.
        model: folder or Hub id; None leaves it to config.toml.
    """
    variable = f"MLX_DGEMMA_MODEL={shlex.quote(model)} " if model else ""
    words = (variable + shlex.join(program)).replace("\\", "\\\\").replace('"', '\\"')
    return _LIBRARY.replace("@PROGRAM@", f'"{words}"')
