"""Where an answer goes: final text to stdout, everything else to stderr.

A canvas that is still settling is drawn on stderr behind the text that is final, and erased before
more of that text is written. Nothing depends on where on the screen that is: the cursor goes back by
as many rows as were drawn, so scrolling does no harm.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import count, human

if TYPE_CHECKING:
    from ..decoding.events import Draft, Stats
    from ..decoding.options import GenerationOptions


Segment = tuple[str, int]  # text and how uncertain it is: an index into STYLES
STYLES = ("", "\x1b[2m", "\x1b[90m")  # as it is, dim, grey
UNSURE = (0.05, 1.0)  # nats of entropy above which a position is dim, and grey
MIN_COLUMNS, MIN_LINES = 10, 4  # a smaller terminal shows no canvas

# The model may write control characters: on a terminal they must not act.
_HARMLESS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_TAB = 8


def char_width(char: str) -> int:
    """Columns that a character takes: 2 if wide, 0 if it combines with the one before."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def line_width(text: str, start: int, columns: int) -> int:
    """Columns that the last line takes, wrapped ones included, when `text` is written `start` columns into a line."""
    _, newline, tail = text.rpartition("\n")
    width = 0 if newline else start
    for char in tail:
        at = width % columns
        if char == "\t":
            width += min(_TAB - at % _TAB, columns - 1 - at)
        else:
            size = char_width(char)
            width += size + (at + size > columns)  # a wide character does not begin in the last column
    return width


def segments(draft: Draft, tokenizer: Any, end_tokens: Iterable[int]) -> list[Segment]:
    """A draft as text, in runs of the same uncertainty.

    Args:
        draft: what follows an end token is left out, and so are special tokens.
        tokenizer: the checkpoint's.
        end_tokens: the tokens that end a text.
    """
    tokens: Any = draft.tokens.tolist()
    entropy: Any = draft.entropy.tolist()
    ends, special = set(end_tokens), set(tokenizer.all_special_ids)
    reader, found, level = tokenizer.detokenizer, [], 0
    for token, nats in zip(tokens, entropy):
        if token in ends:
            break
        if token in special:
            continue
        # Text comes out once it is whole; it is as uncertain as the worst of its tokens.
        level = max(level, sum(nats > bound for bound in UNSURE))
        reader.add_token(token)
        if text := reader.last_segment:
            found.append((text, level))
            level = 0
    reader.finalize()
    return [*found, (reader.last_segment, level)] if reader.last_segment else found


def rows(parts: Iterable[Segment], start: int, columns: int, limit: int) -> list[list[Segment]]:
    """Wrap at the terminal's width, beginning `start` columns into a row; at most `limit` rows.

    The last row of a canvas that is cut is an ellipsis.
    """
    wrapped: list[list[Segment]] = [[]]
    at = start
    for text, level in parts:
        for char in text.translate(_HARMLESS):
            if char == "\n":
                wrapped.append([])
                at = 0
                continue
            cell = " " * (_TAB - at % _TAB) if char == "\t" else char
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
    """One line of statistics."""
    parts = [
        f"{count(stats.generated_tokens, 'token')} in {count(stats.blocks, 'block')} "
        f"and {count(stats.denoising_steps, 'step')}",
        f"{stats.tokens_per_second:.1f} tok/s",
        f"first block {stats.time_to_first_block:.2f} s",
        f"peak memory {human(stats.peak_memory_bytes)}",
        f"seed {stats.seed}",
    ]
    if stats.reused_tokens:
        parts.insert(1, f"{stats.reused_tokens} of {count(stats.prompt_tokens, 'prompt token')} reused")
    return " · ".join(parts)


def details(stats: Stats, options: GenerationOptions) -> list[str]:
    """What --verbose tells of an answer: the options in force, the prompt, and the frames that were looked at."""
    given = {name: value for name, value in asdict(options).items() if name != "end_tokens" and value is not None}
    held = [f"{name.replace('_', '-')} {value}" for name, value in given.items()]
    prompt = f"{count(stats.prompt_tokens, 'prompt token')}, {stats.reused_tokens} reused"
    if stats.images:
        prompt += f"; {count(stats.images, 'picture')}, {stats.images_encoded} encoded"
    told = [f"options: {', '.join(held)}", prompt]
    if stats.frame_seconds:
        told.append(f"frames at {', '.join(f'{one:.2f}' for one in stats.frame_seconds)} s")
    return [*told, summary(stats)]


class Terminal:
    """stdout and stderr, and how they may be used.

    Attributes:
        hints: stderr is a terminal, so that hints, thinking and statistics are shown there.
        live: it can show a settling canvas too: not with NO_COLOR or TERM=dumb, nor when stdout is a
            pipe, whose reader may write to the same screen at any time.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None):
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.hints = self.err.isatty()
        self._shared = self.out.isatty() and self.hints  # both write to one screen
        self._ansi = self.hints and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.live = self._ansi and not _is_pipe(self.out)
        self._line = 0  # columns of the last line of final text, wrapped or not
        self._last = ""  # the last character of final text
        self._drawn: list[int] = []  # columns of each row of the canvas
        self._held = ""  # final text that the canvas begins with

    def say(self, text: str) -> None:
        """Write final text to stdout at once."""
        if not text:
            return
        self.erase()
        self.out.write(text.translate(_HARMLESS) if self.out.isatty() else text)
        self.out.flush()
        if self._shared:
            self._line = line_width(text, self._line, self._size()[0])
            base = max((at for at, char in enumerate(text) if char_width(char)), default=0)
            self._last = text[base:] if char_width(text[base]) else self._last + text

    def hint(self, text: str) -> None:
        """Write dim lines to stderr if it is a terminal."""
        if self.hints and text:
            self.fresh_line()
            self._tell(self._dim(text.translate(_HARMLESS)) + "\n")

    def interrupted(self) -> None:
        """Take away the canvas and the ^C that the terminal wrote where the cursor was."""
        self.erase()
        if self.live:
            self._tell(self._back(self._size()[0]) + "\x1b[J")
        elif self.hints and not self._line:
            self._tell("\n")

    def warn(self, text: str) -> None:
        """Write a line to stderr, terminal or not."""
        self.fresh_line()
        self._tell(text + "\n")

    def fresh_line(self) -> None:
        """Erase the canvas and begin a new line on the screen, unless one has begun."""
        self.erase()
        if self._line:
            self._tell("\n")
            self._line = 0

    def draw(self, canvas: Iterable[Segment], footer: str) -> None:
        """Show a canvas behind the final text, in place of the last one, and a dim line below it."""
        columns, lines = self._size()
        if not self.live or columns < MIN_COLUMNS or lines < MIN_LINES:
            return
        # Behind the last column the cursor waits on it, and only writing a character there brings it
        # into that state again: so the last one is drawn with the canvas.
        if not self._drawn:
            self._held = self._last if self._line and self._line % columns == 0 else ""
        start = (self._line - _width(self._held)) % columns
        back = self._back(columns)
        shown = rows([(self._held, 0), *canvas], start, columns, lines - 2)
        shown.append([(footer[: columns - 1], 1)])
        self._drawn = [_width("".join(text for text, _ in row)) for row in shown]
        self._tell(back + "\x1b[J" + "\n".join(_styled(row) for row in shown))

    def erase(self) -> None:
        """Leave the screen as it was before the canvas."""
        if self._drawn:
            self._tell(self._back(self._size()[0]) + "\x1b[J" + self._held)
            self._drawn, self._held = [], ""

    def _back(self, columns: int) -> str:
        """Moves the cursor to where the canvas begins, even if the terminal has rewrapped its lines."""
        first, *others = self._drawn or [0]
        start = self._line - _width(self._held)
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

    def _tell(self, text: str) -> None:
        self.err.write(text)
        self.err.flush()


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
