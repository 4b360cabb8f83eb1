"""Markdown on a terminal: every character stays, whatever the pieces, and each piece ends in the normal state."""

import io
import re

import pytest

from mlx_dgemma.cli import markdown
from mlx_dgemma.cli.markdown import BOLD, BULLET, CODE, QUOTE, RESET, Styler
from mlx_dgemma.cli.terminal import Terminal

TEXT = """\
# A *title*
Some **bold** and `code **not bold**` and ``a ` in code``.
- one **two
1. three 2 ** 3
> said
#include is no title, and 5*3*2 no bold
```python
# no title
a ** b `c`
```
Behind **all**"""


def test_what_is_styled():
    lines = dict(zip(TEXT.splitlines(), Styler()(TEXT).splitlines()))
    assert lines == {
        "# A *title*": f"{BOLD}# A *title*{RESET}",
        "Some **bold** and `code **not bold**` and ``a ` in code``.": (
            f"Some {RESET}{BOLD}**bold**{RESET} and {RESET}{CODE}`code **not bold**`{RESET} and "
            f"{RESET}{CODE}``a ` in code``{RESET}.{RESET}"
        ),
        "- one **two": f"{BULLET}-{RESET} one {RESET}{BOLD}**two{RESET}",
        "1. three 2 ** 3": f"{BULLET}1.{RESET} three 2 ** 3",
        "> said": f"{QUOTE}> said{RESET}",
        "#include is no title, and 5*3*2 no bold": "#include is no title, and 5*3*2 no bold",
        "```python": f"{CODE}```python{RESET}",
        "# no title": f"{CODE}# no title{RESET}",
        "a ** b `c`": f"{CODE}a ** b `c`{RESET}",
        "```": f"{CODE}```{RESET}",
        "Behind **all**": f"Behind {RESET}{BOLD}**all**{RESET}",
    }


def cells(text):
    """Each character with the codes that are in force."""
    style, found = (), []
    for code, char in re.findall(r"(\x1b\[\d*m)|(.)", text, re.DOTALL):
        if code:
            style = () if code == RESET else (*style, code)
        else:
            found.append((char, style))
    return found, style


def test_pieces_keep_the_text_and_the_style():
    whole, _ = cells(Styler()(TEXT))
    for size in (1, 2, 3, 7, 50):
        styler = Styler()
        pieces = [styler(TEXT[at : at + size]) for at in range(0, len(TEXT), size)]
        assert all(cells(piece)[1] == () for piece in pieces)
        found, _ = cells("".join(pieces))
        assert "".join(char for char, _ in found) == TEXT
        code = [at for at, (_, style) in enumerate(whole) if CODE in style]
        assert sum(CODE in found[at][1] for at in code) > 0.8 * len(code)


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("out", "environment", "styled"),
    [
        (Screen, {}, True),
        (Screen, {"NO_COLOR": "1"}, False),
        (Screen, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_a_terminal_without_colours_and_a_file_get_plain_text(monkeypatch, out, environment, styled):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    written = out()
    terminal = Terminal(written, Screen())
    terminal.style = markdown.Styler()
    terminal.say("# Title\n")
    assert written.getvalue() == (f"{BOLD}# Title{RESET}\n" if styled else "# Title\n")
