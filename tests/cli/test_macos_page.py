"""The snippets of docs/macos.md, run with stand-ins for macOS's programs: what they change, and that they lose nothing.

The command line is the real one. In place of a model stands one that answers ANSWER, fails, or is interrupted.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "macos.md"
SECTIONS = ("In the terminal", "Finder Quick Action", "Shortcuts", "AppleScript")

PROGRAM = """\
import os, sys
from types import SimpleNamespace
from mlx_dgemma.cli import common
from mlx_dgemma.decoding.events import Block, Finished, Result, Stats

def events(self, request, drafts=False):
    if os.environ["CASE"] == "fails":
        from mlx_dgemma.errors import RangeError
        raise RangeError("The numbers left the range.")
    if os.environ["CASE"] == "interrupted":
        raise KeyboardInterrupt
    yield Block(0, 1, (1,), "ANSWER")
    yield Finished(Result("ANSWER", "", [], [1], "stop", Stats(1, 0, 1, 1, 1, 1, {}, 0.0, 0.0, 0, 0)))

engine = type("Engine", (), {"run": events, "tokenizer": None, "options": None})()
common.ModelChoice.prepare = lambda *_: (engine, None)
for name, verb in (("answer", "answer"), ("edit", "edit")):
    sys.modules[f"mlx_dgemma.tasks.{name}"] = SimpleNamespace(**{verb: None})
import mlx_dgemma.tasks
mlx_dgemma.tasks.edit = sys.modules["mlx_dgemma.tasks.edit"]
from mlx_dgemma.cli.main import main
main(prog_name="mlx-dgemma")
"""
OSASCRIPT = """\
import os, re, shlex, subprocess, sys
said = re.findall("\\"([^\\"]*)\\"", " ".join(sys.argv[1:]))
command, prompt, rest = said[0], said[1], said[2]
done = subprocess.run(["sh", "-c", command + shlex.quote(prompt) + rest], stdout=subprocess.PIPE, check=True)
open(os.path.join(os.environ["HOME"], "dialog"), "wb").write(done.stdout)  # what the dialog would show
"""
STUBS = {
    "pbpaste": 'cat "$CLIPBOARD"',
    "pbcopy": 'cat > "$CLIPBOARD"',
    "screencapture": 'cp "$HOME/picture.png" "$2"',
    "osascript": f'exec "{sys.executable}" -c \'{OSASCRIPT}\' "$@"',
    "shortcuts": 'test "$CASE" = works && cp "$4" "$6" && cp "$6" "$HOME/translated"',
    "git": 'case $1 in diff) echo "+a line";; commit) printf "%s" "$4" > "$HOME/message";; esac',
}


def snippets():
    """(section, script) of the shell blocks of `SECTIONS`; the comments for bench/docs.py are no part of them."""
    text = re.sub(r"<!-- hidden\n.*?^-->", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        if name in SECTIONS:
            yield from ((name, script) for script in re.findall(r"^```sh\n(.*?)^```", body, re.MULTILINE | re.DOTALL))


# By what a snippet holds: the files that it changes when all goes well, and what it prints.
EXPECTED = {
    "pbpaste |": ({"clipboard": "ANSWER"}, "ANSWER\n"),
    "screencapture": ({"clipboard": "ANSWER"}, "ANSWER\n"),
    "git commit": ({"message": "ANSWER"}, ""),
    "while IFS": ({}, "ANSWER\nANSWER\n"),
    "--output summary.txt": ({"summary.txt": "ANSWER\n"}, ""),
    "--json": ({}, "ANSWER stop\n"),
    "--in-place": ({"letter.txt": "ANSWER", "letter.txt.bak.2": "my letter"}, ""),
    "for picture": ({"other.txt": "ANSWER\n"}, ""),
    "generate -f -": ({}, "ANSWER\n"),
    "shortcuts run": ({"translated": "my letter"}, ""),
    "display dialog": ({"dialog": "ANSWER\n"}, ""),
}


@pytest.fixture
def home(tmp_path):
    """A home folder with what is the user's in it."""
    programs = {name: f"#!/bin/sh\n{body}\n" for name, body in STUBS.items()}
    (tmp_path / "program.py").write_text(PROGRAM)
    programs["mlx-dgemma"] = f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/program.py" "$@"\n'
    folders = {"bin": programs, "home/mlx-dgemma/.venv/bin": {"mlx-dgemma": programs["mlx-dgemma"]}}
    for folder, files in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
            (tmp_path / folder / name).chmod(0o755)
    for name, text in (
        ("clipboard", "precious"),
        ("picture.png", "pixels"),
        ("picture.txt", "my notes"),
        ("other.png", "pixels"),
        ("questions.txt", "Why?\nHow?\n"),
        ("summary.txt", "the old summary"),
        ("letter.txt", "my letter"),
        ("letter.txt.bak", "my first letter"),
    ):
        (tmp_path / "home" / name).write_text(text)
    return tmp_path / "home"


def changes(home, script, case):
    """What a snippet does: its exit status, the files that it changes, and what it prints."""
    before = {one.name: one.read_text() for one in home.iterdir() if one.is_file()}
    environment = {
        "PATH": f"{home.parent / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "CLIPBOARD": str(home / "clipboard"),
        "CASE": case,
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(PAGE.parent.parent)),
    }
    done = subprocess.run(
        ["bash", "-c", script, "sh", "picture.png", "other.png"], cwd=home, env=environment, input="Guten Tag",
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    after = {one.name: one.read_text() for one in home.iterdir() if one.is_file()}
    assert set(before) <= set(after)
    return done, {name: text for name, text in after.items() if before.get(name) != text}


def test_every_snippet_is_expected():
    found = [[mark for mark in EXPECTED if mark in script] for _, script in snippets()]
    assert sorted(mark for marks in found for mark in marks) == sorted(EXPECTED)
    assert {name for name, _ in snippets()} == set(SECTIONS)


@pytest.mark.parametrize("case", ["works", "fails", "interrupted"])
@pytest.mark.parametrize("mark", EXPECTED)
def test_a_snippet_changes_what_it_says_and_loses_nothing(home, mark, case):
    (script,) = [script for _, script in snippets() if mark in script]
    done, changed = changes(home, script, case)
    files, printed = EXPECTED[mark]
    if case == "works":
        assert (done.returncode, changed, done.stdout) == (0, files, printed), done.stderr
    else:
        assert (changed, done.stdout.strip()) == ({}, ""), done.stderr
        assert done.returncode != 0 or mark == "for picture"  # it goes on with the next picture
