"""The start of `mlx-dgemma`: a plain `generate` that a running server answers needs no click; click does all else.

The server gets the same request and the user sees the same text either way. What fails is told by click's command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from ...prompt.messages import messages_of
from ..local import Remote, find_server
from ..stdin import read_prompt
from ..terminal import Terminal, prepare_streams
from .answers import answer_prompt, tell_model
from .words import Words, read_words

TYPE_CHECKING = False  # as typing's
if TYPE_CHECKING:
    from typing import Any, NoReturn


class Quiet(Terminal):
    """A terminal for a search that click's command repeats where it finds nothing: that one tells why."""

    def warn(self, text: str) -> None:
        """Write nothing."""


def main() -> None:
    """Run the command line of this process."""
    prepare_streams()
    words = read_words(sys.argv[1:], os.environ)
    if words is None:
        _run_click()
    terminal = Terminal()
    try:
        text = read_prompt(words.prompt, words.files, terminal)
        messages = messages_of(text, words.system)
        server = _find(words)
        if server is not None:
            server.accepted = lambda: tell_model(words.model, server.notes, terminal)
            sys.exit(_answer(server, messages, words, terminal))
    except (Exception, KeyboardInterrupt) as error:
        _tell(error)
    _run_click(text)


def _find(words: Words) -> Remote | None:
    from ...desktop.user_config import default_model
    from ...serving.rendezvous import identity

    words.model = words.model or default_model()
    bits = None if words.kv_bits is None else int(words.kv_bits)
    terminal = Quiet()
    terminal.draw([], "looking for a server")
    try:
        return find_server(identity(words.model, words.adapter, words.dtype, words.compute_dtype, bits), terminal)
    finally:
        terminal.erase()


def _answer(server: Remote, messages: list[dict[str, Any]], words: Words, terminal: Terminal) -> int:
    keywords = {"tools": None, "schema": None, "regex": words.regex, **words.options}

    def stream(drafts: bool) -> Iterator[Any]:
        return server.task("generate", [messages], keywords, drafts)

    return answer_prompt(server, stream, terminal, words.options, words.as_json, words.verbose)


def _run_click(text: str | None = None) -> NoReturn:
    """Run click's command; `text` is the prompt where it was read already, since stdin cannot be read twice."""
    from ..main import main as commands

    sys.exit(commands(obj=text))


def _tell(error: BaseException) -> NoReturn:
    """Let click's command fail with an error, as if it had done the work."""
    from ..commands.generate import generate

    def fail(**options: Any) -> NoReturn:
        raise error

    generate.callback = fail
    _run_click()
