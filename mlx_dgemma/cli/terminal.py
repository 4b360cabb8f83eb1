"""Terminal output: final text to stdout, everything else to stderr.

An unfinished canvas is drawn on stderr after the final text, and erased before more final text is written. The cursor
moves back by the number of rows that were drawn, so the result does not depend on scrolling.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from ..errors import count, human

TYPE_CHECKING = False  # as typing's, whose import a call of a running server has no time for
if TYPE_CHECKING:
    from typing import Any, TextIO

    from ..decoding.events import Stats


Segment = tuple[str, int]  # text and its uncertainty, an index into STYLES
STYLES = ("", "\x1b[2m", "\x1b[90m")  # normal, dim, grey
ENTROPY_LEVELS = (0.05, 1.0)  # nats above which a position is dim, and grey
MIN_COLUMNS, MIN_LINES = 10, 4  # no canvas is drawn on a smaller terminal

# The model may generate control characters, which must have no effect on the terminal.
_WITHOUT_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}
_TAB_COLUMNS = 8


def char_width(char: str) -> int:
    """Columns of a character: 2 if it is wide, 0 if it combines with the one before."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def line_width(text: str, start: int, columns: int) -> int:
    """Columns of the last line, its wrapped rows included, after `text` is written from column `start`."""
    _, newline, tail = text.rpartition("\n")
    width = 0 if newline else start
    for char in tail:
        at = width % columns
        if char == "\t":
            width += min(_TAB_COLUMNS - at % _TAB_COLUMNS, columns - 1 - at)
        else:
            size = char_width(char)
            width += size + (at + size > columns)  # a wide character does not fit into the last column
    return width


def segments(pieces: Iterable[tuple[str, float]]) -> list[Segment]:
    """Pieces of text with their entropy in nats, as `uncertain_text` makes them, by uncertainty."""
    return [(text, sum(nats > bound for bound in ENTROPY_LEVELS)) for text, nats in pieces]


def rows(parts: Iterable[Segment], start: int, columns: int, limit: int) -> list[list[Segment]]:
    """Wrap segments into at most `limit` rows of `columns`, with the first row starting at column `start`.

    If rows are cut off, the last row is an ellipsis.
    """
    wrapped: list[list[Segment]] = [[]]
    at = start
    for text, level in parts:
        for char in text.translate(_WITHOUT_CONTROLS):
            if char == "\n":
                wrapped.append([])
                at = 0
                continue
            cell = " " * (_TAB_COLUMNS - at % _TAB_COLUMNS) if char == "\t" else char
            width = len(cell) if char == "\t" else char_width(char)
            if at + width > columns:
                wrapped.append([])
                at = 0
            wrapped[-1].append((cell, level))
            at += width
    if len(wrapped) > limit:
        wrapped[limit - 1 :] = [[("…", 1)]]
    return wrapped


def summary(stats: Stats) -> str:
    """Statistics in one line."""
    how = f"{count(stats.blocks, 'block')} and {count(stats.denoising_steps, 'step')}"
    if stats.mode != "diffusion":
        how = f"{stats.mode} mode and {count(stats.causal_passes, 'encoder step')}"
    if stats.drafted_tokens:
        how += f", {stats.accepted_tokens} of {count(stats.drafted_tokens, 'drafted token')} right"
    parts = [
        f"{count(stats.generated_tokens, 'token')} in {how}",
        f"{stats.tokens_per_second:.1f} tok/s",
        f"first block {stats.time_to_first_block:.2f} s",
        f"peak memory {human(stats.peak_memory_bytes)}",
        f"seed {stats.seed}",
    ]
    if stats.reused_tokens:
        parts.insert(1, f"{stats.reused_tokens} of {count(stats.prompt_tokens, 'prompt token')} reused")
    return " · ".join(parts)


def details(stats: Stats, options: Mapping[str, Any]) -> list[str]:
    """The lines of --verbose: options, prompt, video frames, and statistics."""
    values = {name: value for name, value in options.items() if name != "end_tokens" and value is not None}
    settings = [f"{name.replace('_', '-')} {value}" for name, value in values.items()]
    prompt = f"{count(stats.prompt_tokens, 'prompt token')}, {stats.reused_tokens} reused"
    if stats.images:
        prompt += f"; {count(stats.images, 'picture')}, {stats.images_encoded} encoded"
    lines = [f"options: {', '.join(settings)}", prompt]
    if stats.mode_reason:
        lines.append(f"auto takes {stats.mode} mode {stats.mode_reason}")
    if stats.frame_seconds:
        lines.append(f"frames at {', '.join(f'{one:.2f}' for one in stats.frame_seconds)} s")
    return [*lines, summary(stats)]


class Terminal:
    """Output to stdout and stderr.

    Attributes:
        hints: stderr is a terminal, so hints, thinking and statistics are shown there.
        style: puts escape codes into final text on a terminal that has colours; such text keeps its width.
        live: stderr can show an unfinished canvas. This is false with NO_COLOR or TERM=dumb, and if stdout is a pipe,
            whose reader may write to the same screen at any time.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None):
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.hints = self.err.isatty()
        self.style: Callable[[str], str] | None = None
        self._shared = self.out.isatty() and self.hints  # both streams write to the same screen
        coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._ansi, self._ansi_out = self.hints and coloured, self.out.isatty() and coloured
        self.live = self._ansi and not _is_pipe(self.out)
        self._line = 0  # columns of the last line of final text, wrapped or not
        self._last = ""  # the last character of final text
        self._drawn: list[int] = []  # columns of each row of the canvas
        self._redrawn = ""  # final text that is drawn again with the canvas

    def say(self, text: str) -> None:
        """Write final text to stdout at once."""
        if not text:
            return
        self.erase()
        shown = text.translate(_WITHOUT_CONTROLS) if self.out.isatty() else text
        self.out.write(self.style(shown) if self.style and self._ansi_out else shown)
        self.out.flush()
        if self._shared:
            self._line = line_width(text, self._line, self._size()[0])
            base = max((at for at, char in enumerate(text) if char_width(char)), default=0)
            self._last = text[base:] if char_width(text[base]) else self._last + text

    def hint(self, text: str) -> None:
        """Write dim text to stderr if it is a terminal."""
        if self.hints and text:
            self.fresh_line()
            self._write(self._dim(text.translate(_WITHOUT_CONTROLS)) + "\n")

    def interrupted(self) -> None:
        """Erase the canvas, and the ^C that the terminal wrote at the cursor."""
        self.erase()
        if self.live:
            self._write(self._move_to_canvas(self._size()[0]) + "\x1b[J")
        elif self.hints and not self._line:
            self._write("\n")

    def warn(self, text: str) -> None:
        """Write a line to stderr."""
        self.fresh_line()
        self._write(text + "\n")

    def fresh_line(self) -> None:
        """Erase the canvas and move to the beginning of a line."""
        self.erase()
        if self._line:
            self._write("\n")
            self._line = 0

    def draw(self, canvas: Iterable[Segment], footer: str) -> None:
        """Draw a canvas after the final text, in place of the previous one, with a dim footer below it."""
        columns, lines = self._size()
        if not self.live or columns < MIN_COLUMNS or lines < MIN_LINES:
            return
        # After a character in the last column, the cursor waits there, and the next character wraps. Only writing a
        # character there restores this state, so the last character is drawn again with the canvas.
        if not self._drawn:
            self._redrawn = self._last if self._line and self._line % columns == 0 else ""
        start = (self._line - _width(self._redrawn)) % columns
        move = self._move_to_canvas(columns)
        shown = rows([(self._redrawn, 0), *canvas], start, columns, lines - 2)
        shown.append([(footer[: columns - 1], 1)])
        self._drawn = [_width("".join(text for text, _ in row)) for row in shown]
        self._write(move + "\x1b[J" + "\n".join(_styled(row) for row in shown))

    def erase(self) -> None:
        """Remove the canvas from the screen."""
        if self._drawn:
            self._write(self._move_to_canvas(self._size()[0]) + "\x1b[J" + self._redrawn)
            self._drawn, self._redrawn = [], ""

    def _move_to_canvas(self, columns: int) -> str:
        """Escape codes that move the cursor to the start of the canvas, even if the terminal has rewrapped it."""
        first, *others = self._drawn or [0]
        start = self._line - _width(self._redrawn)
        up = max(start + first - 1, start) // columns - start // columns
        up += sum(max(1, -(-width // columns)) for width in others)
        column = start % columns
        return (f"\x1b[{up}A" if up else "") + "\r" + (f"\x1b[{column}C" if column else "")

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self.err.fileno())
        except (OSError, ValueError):
            return 80, 24
        return size.columns or 80, size.lines or 24

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._ansi else text

    def _write(self, text: str) -> None:
        try:
            self.err.write(text)
            self.err.flush()
        except OSError:  # a full disk, a reader that has gone: what is told beside an answer must not cost it
            _send_nowhere(self.err)


@contextmanager
def told_warnings(terminal: Terminal) -> Iterator[None]:
    """Print the warnings of a block, each once, as lines on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(one.message) for one in caught):
                terminal.warn(f"Warning: {message}")


def prepare_streams() -> None:
    """Give a process its standard streams where they are closed, in UTF-8 regardless of the locale."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: the next open file would get its descriptor
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may hold bytes that are no text
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _send_nowhere(stream: TextIO) -> None:
    """Have a stream write to nothing, with what it still holds, which it would try to write at the end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _width(text: str) -> int:
    return sum(map(char_width, text))


def _styled(row: list[Segment]) -> str:
    text, current = "", 0
    for part, level in row:
        if level != current:
            text += "\x1b[0m" + STYLES[level]
            current = level
        text += part
    return text + ("\x1b[0m" if current else "")


def _is_pipe(stream: TextIO) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False
