"""The terminal: a canvas settles behind the text and leaves the screen as the text alone would."""

import io
import os
import random
import re
from functools import partial

import mlx.core as mx
import pytest
from support import engine_of

from mlx_dgemma import errors
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import terminal
from mlx_dgemma.cli.calls import answers
from mlx_dgemma.cli.terminal import Terminal
from mlx_dgemma.decoding.events import Block, Draft, Finished, Result, Stats
from mlx_dgemma.prompt.drafts import uncertain_text


class Screen:
    """A small VT100: enough to see what is left on it. It wraps when a character comes after the last column."""

    def __init__(self, columns=80, lines=24):
        self.columns, self.lines = columns, lines
        self.rows, self.row, self.column = [{}], 0, 0

    def write(self, text):
        for one in re.finditer(r"\x1b\[(\d*)([A-Za-z])|(.)", text, re.DOTALL):
            number, letter, char = one.groups()
            if letter:
                self._control(int(number or 1), letter)
            elif char == "\n":
                self._down()
            elif char == "\r":
                self.column = 0
            elif char == "\t":
                self.column = min(self.column + 8 - self.column % 8, self.columns - 1)
            else:
                assert char.isprintable(), repr(char)
                self._put(char)

    def _control(self, number, letter):
        if letter == "A":
            top = max(0, len(self.rows) - self.lines)
            assert self.row - number >= top, "the cursor would leave the screen"
            self.row -= number
        elif letter == "C":
            self.column = min(self.column + number, self.columns - 1)
        elif letter == "J":
            del self.rows[self.row + 1 :]
            self.rows[self.row] = {at: c for at, c in self.rows[self.row].items() if at < self.column}
        else:
            assert letter == "m"

    def _down(self):
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append({})

    def _put(self, char):
        width = terminal.char_width(char)
        if not width:
            at = max(self.rows[self.row], default=0)
            self.rows[self.row][at] = self.rows[self.row].get(at, "") + char
            return
        if self.column + width > self.columns:
            self._down()
        self.rows[self.row][self.column] = char
        self.column += width

    def text(self):
        shown = ["".join(row.get(at, " ") for at in range(self.columns)).rstrip() for row in self.rows]
        return "\n".join(shown).rstrip()


class Tty(io.StringIO):
    """A stream that writes to a screen."""

    def __init__(self, screen):
        super().__init__()
        self.screen = screen

    def isatty(self):
        return True

    def write(self, text):
        self.screen.write(text)
        return super().write(text)


def on_screen(monkeypatch, columns=80, lines=24, **variables):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = Screen(columns, lines)
    monkeypatch.setattr(Terminal, "_size", lambda _: (columns, lines))
    return screen, Terminal(Tty(screen), Tty(screen))


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (21, 6), (10, 4)])
def test_the_canvas_leaves_no_trace(monkeypatch, columns, lines):
    draw = random.Random(columns)
    screen, view = on_screen(monkeypatch, columns, lines)
    plain = Screen(columns, 10_000)

    def some(length, letters="ab cde\n犬語!e\u0301"):
        return "".join(draw.choice(letters) for _ in range(draw.randint(0, length)))

    for _ in range(60):
        for _ in range(draw.randint(0, 3)):
            view.draw(
                [(some(200, "ab c\n犬\t"), draw.randint(0, 2)) for _ in range(draw.randint(0, 4))], "block 1, step 1"
            )
        text = draw.choice([some(50), "x" * columns, "語" * (columns // 2), "\n", some(3)])
        view.erase()
        assert screen.text() == plain.text()
        view.say(text)
        plain.write(text)
    assert screen.text() == plain.text()


def test_the_canvas_continues_the_text_and_is_capped(monkeypatch):
    screen, view = on_screen(monkeypatch, 20, 6)
    view.say("Finished. ")
    view.draw([("sure ", 0), ("unsure", 1)], "block 2, step 3")
    assert screen.text() == "Finished. sure unsur\ne\nblock 2, step 3"
    assert "sure \x1b[0m\x1b[2munsur" in view.err.getvalue()
    view.draw([("line\n" * 30, 0)], "block 2, step 4")
    assert screen.text() == "Finished. line\nline\nline\n…\nblock 2, step 4"
    view.hint("Done.")
    assert screen.text() == "Finished.\nDone."


@pytest.mark.parametrize(("variables", "text"), [({}, "1, 2, 3\n"), ({"NO_COLOR": "1"}, "1, 2, 3^C\n")])
def test_ctrl_c_leaves_a_clean_screen(monkeypatch, variables, text):
    screen, view = on_screen(monkeypatch, **variables)

    def events():
        yield Block(0, 1, (), "1, 2, 3")
        yield Draft(1, 1, mx.array([400]), mx.array([True]), mx.array([2.0]))
        screen.write("^C")
        raise KeyboardInterrupt

    answer = answers.stream_answer(engine_of(DEMO), lambda drafts: events(), view)
    assert (answer.text, answer.result) == ("1, 2, 3", None)
    assert screen.text() == text + "Interrupted after 1 finished block."


def test_control_characters_do_not_act(monkeypatch):
    screen, view = on_screen(monkeypatch)
    view.say("a\x1b[2Jb\r\x9b")
    view.draw([("\x1b[31mred", 0)], "block 1, step 1")
    assert screen.text() == "a\ufffd[2Jb\ufffd\ufffd\ufffd[31mred\nblock 1, step 1"


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_plain_terminal_sees_no_escape(monkeypatch, variables):
    screen, view = on_screen(monkeypatch, **variables)
    view.draw([("draft", 1)], "block 1, step 1")
    view.say("text")
    view.hint("hint")
    assert not view.live
    assert screen.text() == "text\nhint"
    assert view.err.getvalue() == "\nhint\n"


def test_no_canvas_beside_a_pipe(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w") as pipe:
        assert not Terminal(pipe, Tty(screen)).live
    with open(os.devnull, "w") as file:
        assert Terminal(file, Tty(screen)).live


def test_a_draft_becomes_segments():
    held = engine_of(DEMO)
    tokens = held.tokenizer.encode("c a t", add_special_tokens=False)
    end = held.options.end_tokens[0]
    draft = Draft(0, 1, mx.array([*tokens, end, *tokens]), mx.ones(2), mx.array([0.0] * 2 + [0.5] * 20))
    found = terminal.segments(uncertain_text(draft, held.tokenizer, held.options.end_tokens))
    assert "".join(text for text, _ in found) == "c a t"
    assert (found[0][1], found[-1][1]) == (0, 1)


def test_a_whole_answer_on_a_terminal(monkeypatch):
    screen, view = on_screen(monkeypatch, 40, 10)
    held = engine_of(DEMO)
    answer = answers.stream_answer(held, partial(held.stream, "Count from 1 to 60.", seed=0, max_tokens=100), view)
    assert answer.result is not None and answer.text == answer.result.text
    assert "block 2, step 1" in view.err.getvalue()
    plain = Screen(40, 10)
    cut = "Cut at 100 tokens; --max-tokens N makes room for more."
    plain.write(f"{answer.text}\n{cut}\n" + terminal.summary(answer.result.stats))
    assert screen.text() == plain.text()
    assert screen.text().endswith("seed 0")


@pytest.mark.parametrize(
    ("notes", "told"), [((), ["is empty; try another"]), (("It is padding.",), ["It is padding."])]
)
def test_an_empty_answer_is_told_once_and_is_not_called_cut(monkeypatch, notes, told):
    stats = Stats(1, 0, 9, 1, 1, 1, {}, 0.0, 0.0, 0, 0)
    events = (
        one for one in [Block(0, 1, (0,) * 9, ""), Finished(Result("", "", [], [0] * 9, "length", stats, notes=notes))]
    )
    screen, view = on_screen(monkeypatch, 120, 10)
    answers.stream_answer(engine_of(DEMO), lambda drafts: events, view)
    *lines, _ = screen.text().strip().splitlines()
    assert [line for line in lines if "Warning: " not in line] == []
    assert len(lines) == len(told) and all(said in line for said, line in zip(told, lines))


def test_what_cannot_be_told_costs_nothing():
    """A reader of stderr that has gone, a full disk: the stream's end must not fail either, as at a program's end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        view = Terminal(out := io.StringIO(), gone)
        view.warn("This is the bundled demo.")
        view.say("c a t")
        gone.write("late")
    assert out.getvalue() == "c a t"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (8_200_000, "8.2 MB"), (15.6e9, "15.6 GB")]
)
def test_human_sizes(nbytes, text):
    assert errors.human(nbytes) == text
