"""Light styling of Markdown on a terminal. Every character stays, so that what is copied is what the model wrote."""

from __future__ import annotations

import re

BOLD, CODE, QUOTE, BULLET, RESET = "\x1b[1m", "\x1b[36m", "\x1b[2m", "\x1b[33m", "\x1b[0m"
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING = re.compile(r" {0,3}#{1,6}(?= )")
_QUOTE = re.compile(r" {0,3}>")
_BULLET = re.compile(r"( *)([-*+]|\d{1,9}[.)])(?= )")
_MARK = re.compile(r"`+|\*\*(?=\S)|(?<=\S)\*\*")


class Styler:
    """Styles a text that comes in pieces, each of which ends in the terminal's normal state."""

    def __init__(self) -> None:
        self._line = ""  # of the unfinished line, what came in earlier pieces
        self._fence = ""  # the mark that closes the open code block
        self._style = ""  # of the whole unfinished line
        self._code = ""  # the backticks that close the open code
        self._bold = False

    def __call__(self, text: str) -> str:
        """The piece with escape codes in it."""
        return "".join(map(self._styled, re.findall(r"[^\n]*\n|[^\n]+", text)))

    def _styled(self, piece: str) -> str:
        """A part of one line, its end included if it has come."""
        body, end = piece.removesuffix("\n"), "\n" if piece.endswith("\n") else ""
        shown = ""
        if not self._line:
            shown, body = self._begin(body)
        self._line += piece
        shown += self._fill(body)
        if end:
            fence = _FENCE.match(self._line)  # of the whole line, which may have come in pieces
            if fence and not self._fence:
                self._fence = fence[1]
            elif self._fence and self._line.strip() == self._fence:
                self._fence = ""
            self._line, self._style, self._code, self._bold = "", "", "", False
        return shown + end

    def _begin(self, body: str) -> tuple[str, str]:
        """What a line begins with, styled, and the rest of it; the style of the whole line is noted."""
        if self._fence or _FENCE.match(body):
            self._style = CODE
        elif _HEADING.match(body):
            self._style = BOLD
        elif _QUOTE.match(body):
            self._style = QUOTE
        elif bullet := _BULLET.match(body):
            return f"{bullet[1]}{BULLET}{bullet[2]}{RESET}", body[bullet.end() :]
        return "", body

    def _fill(self, body: str) -> str:
        if not body:
            return ""
        if self._style:
            return f"{self._style}{body}{RESET}"
        shown, at = self._on(), 0
        for mark in _MARK.finditer(body):
            if mark[0][0] == "`":
                if self._code and mark[0] != self._code:
                    continue
                closes, self._code = bool(self._code), "" if self._code else mark[0]
            elif self._code:
                continue
            else:
                closes, self._bold = self._bold, not self._bold
            # A mark has the style of what it encloses.
            to = mark.end() if closes else mark.start()
            shown += body[at:to] + RESET + self._on()
            at = to
        shown = (shown + body[at:]).removeprefix(RESET)
        return shown if shown.endswith(RESET) or "\x1b" not in shown else shown + RESET

    def _on(self) -> str:
        return CODE if self._code else BOLD if self._bold else ""
