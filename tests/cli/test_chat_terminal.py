"""Chat by keys as a person types them: in tmux, wide and narrow, with and without colours, with either line editor."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux, which has the terminal, is not installed")
PROGRAM = Path(__file__).parent.parent / "chat_program.py"
SECONDS = 60  # for what takes milliseconds on a machine that has nothing else to do
EDITORS = [
    pytest.param(True, marks=pytest.mark.skipif(not find_spec("prompt_toolkit"), reason="needs the extra chat")),
    False,
]
LONG = "what is it, and why does it stand in a line that is longer than the window?"
SUMMARY = "1 token in 1 block and 1 step · 1.0 tok/s · first block 1.00 s · peak memory 1 bytes · seed 0"


class Window:
    """A chat in a terminal of so many columns and 60 lines."""

    def __init__(self, folder, columns, edited, colours=True):
        self._folder, self.columns = folder, columns
        environment = {
            "HOME": folder,
            "XDG_STATE_HOME": folder / "state",
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **({} if colours else {"NO_COLOR": "1"}),
        }
        words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), sys.executable, PROGRAM]
        command = shlex.join(map(str, words if edited else [*words, "--readline"]))
        size = ("-x", columns, "-y", 60)
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "-c", folder, f"{command}; echo it ended: $?; read x")
        self.wait("/help lists the commands, Ctrl-D leaves.", ">")

    def _tmux(self, *arguments, data=None):
        words = ["tmux", "-u", "-S", self._folder / "tmux", *arguments]
        done = subprocess.run([str(one) for one in words], input=data, capture_output=True, check=True, timeout=SECONDS)
        return done.stdout.decode()

    def screen(self, *options):
        return self._tmux("capture-pane", "-p", *options).rstrip()

    def wait(self, *lines):
        """Wait until the screen ends in these lines."""
        end, text = time.monotonic() + SECONDS, wrapped(lines, self.columns)
        while not self.screen().endswith(text):
            assert time.monotonic() < end, f"{text!r} does not end the screen:\n{self.screen()}"
            time.sleep(0.01)

    def press(self, key, *lines):
        self._tmux("send-keys", key)
        self.wait(*lines)

    def type(self, text, *lines, enter=True):
        self._tmux("send-keys", "-l", text, *([";", "send-keys", "Enter"] if enter else []))
        self.wait(*lines)

    def paste(self, text, *lines, marked=False):
        self._tmux("load-buffer", "-", data=text.encode())
        self._tmux("paste-buffer", *(["-p"] if marked else []))
        self.wait(*lines)

    def close(self):
        self._tmux("kill-server")


@pytest.fixture
def window(tmp_path):
    windows = []

    def opened(*arguments, **options):
        windows.append(Window(tmp_path, *arguments, **options))
        return windows[-1]

    yield opened
    for one in windows:
        one.close()


def wrapped(lines, columns):
    return "\n".join(line[at : at + columns] for line in lines for at in range(0, max(len(line), 1), columns))


def answered(number, text, kinds="text"):
    return [f"# Turn {number}: {kinds}", f"`{json.dumps(text)}`", "**no** system", SUMMARY]


@pytest.mark.parametrize("edited", EDITORS, ids=["prompt_toolkit", "readline"])
@pytest.mark.parametrize(("columns", "colours"), [(80, True), (40, False)])
def test_a_chat_by_keys(window, tmp_path, edited, columns, colours):
    Image.new("RGB", (8, 8)).save(tmp_path / "my pic.png")
    chat = window(columns, edited, colours)
    chat.type("hello", *answered(1, "hello"), ">")
    chat.paste("one\ntwo", "> one", "… two", marked=True)  # where the editor has asked for marks
    chat.press("Enter", *answered(2, "one\ntwo"), ">")
    chat.paste("uno\n\tdos\ntres\n", *answered(3, "uno\n\tdos\ntres"), ">")
    chat.type("half typed", "> half typed", enter=False)
    chat.press("C-c", "> half typed", ">")
    chat.type("/image none.png", f"Error: {tmp_path}/none.png does not exist.", ">")
    chat.type(f"{tmp_path}/my\\ pic.png ", f"{tmp_path}/my pic.png goes with the next turn.", ">")
    chat.type("fail", "Error: The echo is told to fail.", ">")
    chat.type(LONG, *answered(4, LONG, "image text"), ">")
    chat.type("wait", '`"wait"`')
    interrupted = ['`"wait"`', *([] if colours else ["^C"]), "Interrupted after 1 finished block."]
    chat.press("C-c", *interrupted, ">")
    chat.type("/save talk.json", f"Saved to {tmp_path}/talk.json.", ">")
    chat.press("C-c", "Ctrl-C again or Ctrl-D leaves.", ">")
    chat.press("C-c", "it ended: 0")
    lines = [
        "/help lists the commands, Ctrl-D leaves.",
        "> hello", *answered(1, "hello"),
        "> one", "… two", *answered(2, "one\ntwo"),
        "> uno", "… ^Idos" if edited else "…       dos", "… tres", *answered(3, "uno\n\tdos\ntres"),
        "> half typed",
        "> /image none.png", f"Error: {tmp_path}/none.png does not exist.",
        f"> {tmp_path}/my\\ pic.png", f"{tmp_path}/my pic.png goes with the next turn.",
        "> fail", "Error: The echo is told to fail.",
        f"> {LONG}", *answered(4, LONG, "image text"),
        "> wait", "# Turn 5: text", *interrupted,
        "> /save talk.json", f"Saved to {tmp_path}/talk.json.",
        ">", "Ctrl-C again or Ctrl-D leaves.", ">", "it ended: 0",
    ]  # fmt: skip
    whole = "\n".join(line.rstrip() for line in chat.screen("-S", "-").splitlines())
    assert whole == wrapped(lines, columns)
    styled = chat.screen("-S", "-", "-e")
    assert ("\x1b[1m# Turn 1: text" in styled, "\x1b" in styled) == (colours, colours)
    held = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["role"] for one in held] == ["user", "assistant"] * 5
    assert held[6]["content"][0] == {"type": "image", "image": f"{tmp_path}/my pic.png"}
    assert held[9]["content"] == '# Turn 5: text\n`"wait"`\n'


@pytest.mark.parametrize("edited", EDITORS, ids=["prompt_toolkit", "readline"])
def test_what_was_typed_is_there_in_the_next_run(window, tmp_path, edited):
    kept = tmp_path / "state" / "mlx-dgemma" / "chat-history"
    kept.parent.mkdir(parents=True)
    kept.write_text('"first"\n"two\\nlines"\n"cut o')
    kept.chmod(0o644)
    chat = window(80, edited)
    chat.press("Up", "> two", "… lines" if edited else "lines")
    chat.press("Enter", *answered(1, "two\nlines"), ">")
    chat.type(" not kept", *answered(2, " not kept"), ">")
    chat.type("kept", *answered(3, "kept"), ">")
    chat.press("C-d", "it ended: 0")
    assert kept.read_text() == '"first"\n"two\\nlines"\n"cut o\n"kept"\n'
    assert kept.stat().st_mode & 0o777 == 0o600
