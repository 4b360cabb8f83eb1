"""The snippets of docs/macos.md, run with stand-ins for macOS's programs: what they change, and that they lose nothing.

The command line is the real one. In place of a model stands one that answers ANSWER, fails, or is interrupted.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dgemma.desktop import applescript
from mlx_dgemma.installation import this_copy

PAGE = Path(__file__).parent.parent.parent / "docs" / "macos.md"

PROGRAM = """\
import os, sys
from types import SimpleNamespace
from mlx_dgemma.cli import common
from mlx_dgemma.decoding.events import Block, Finished, Result, Stats

def trouble():
    if os.environ["CASE"] == "fails":
        from mlx_dgemma.errors import RangeError
        raise RangeError("The numbers left the range.")
    if os.environ["CASE"] == "interrupted":
        raise KeyboardInterrupt

def events(self, request, drafts=False):
    trouble()
    yield Block(0, 1, (1,), "ANSWER")
    yield Finished(Result("ANSWER", "", [], [1], "stop", Stats(1, 0, 1, 1, 1, 1, {}, 0.0, 0.0, 0, 0)))

engine = type("Engine", (), {"run": events, "tokenizer": None, "options": None})()
common.ModelChoice.prepare = lambda *_: (engine, None)
for name, verb in (("answer", "answer"), ("edit", "edit")):
    sys.modules[f"mlx_dgemma.tasks.{name}"] = SimpleNamespace(**{verb: None})
import mlx_dgemma.tasks
mlx_dgemma.tasks.edit = sys.modules["mlx_dgemma.tasks.edit"]
if "quick-actions" in sys.argv:
    from mlx_dgemma.cli.commands import desktop
    from mlx_dgemma.desktop import quick_actions
    real = desktop.this_copy
    desktop.this_copy = quick_actions.this_copy = lambda: trouble() or real()
    quick_actions.platform, quick_actions.PBS = SimpleNamespace(system=lambda: "Darwin"), "/none"
from mlx_dgemma.cli.main import main
main(prog_name="mlx-dgemma")
"""
OSASCRIPT = """\
import os, re, shlex, subprocess, sys
if "tell script" in sys.argv[2]:  # AppleScript itself runs the handlers
    sys.exit(os.environ["CASE"] != "works" or print("ANSWER"))
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
    "osacompile": 'test -s "$3" && echo compiled > "$2"',
    "shortcuts": 'test "$CASE" = works && cp "$4" "$6" && cp "$6" "$HOME/translated"',
    "git": 'case $1 in diff) echo "+a line";; commit) printf "%s" "$4" > "$HOME/message";; esac',
}


def snippets():
    """The shell blocks of the page; the comments for bench/docs.py are no part of them."""
    text = re.sub(r"<!-- hidden\n.*?^-->", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# By what a snippet holds: the files that it changes when all goes well, and what it prints; ... stands for any text.
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
    "mlx-dgemma shortcut": ({}, '{"text": "ANSWER", "error": null}\n'),
    "quick-actions install": (
        {},
        "...explain\tExplain (mlx-dgemma)\t...\n# Written by `mlx-dgemma quick-actions install`...",
    ),
    "osacompile": (
        {
            "handlers.applescript": applescript.library(this_copy().program()),
            "Library/Script Libraries/MLX DGemma.scpt": "compiled\n",
        },
        "",
    ),
    "editSelection": ({}, "ANSWER\nANSWER\n"),
}
# What is printed where the exit status is 0 although the command failed.
GOES_ON = {
    "mlx-dgemma shortcut": '{"text": null, "error": "The ..."}\n',  # Shortcuts drops the output of what fails
    "quick-actions install": "rewrite\tRewrite (mlx-dgemma)\tnot installed\n...",  # list and uninstall do their part
}
ELSEWHERE = {  # snippets whose commands other tests run whole
    "setup --yes": "tests/desktop/test_setup.py",
    "--idle-exit 15m &": "tests/cli/test_local.py",
    "serve --logs": "tests/cli/test_launchd.py",
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


def texts_of(home):
    return {one.relative_to(home).as_posix(): one.read_text() for one in home.rglob("*") if one.is_file()}


def is_printed(text, printed):
    return re.fullmatch(".*".join(map(re.escape, text.split("..."))), printed, re.DOTALL)


def changes(home, script, case):
    """What a snippet does: its exit status, the files that it changes, and what it prints."""
    before = texts_of(home)
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
    after = texts_of(home)
    assert set(before) <= set(after)
    return done, {name: text for name, text in after.items() if before.get(name) != text}


def test_every_snippet_is_expected():
    known = [*EXPECTED, *ELSEWHERE]
    found = [[mark for mark in known if mark in script] for script in snippets()]
    assert all(len(marks) == 1 for marks in found), found
    assert sorted(marks[0] for marks in found) == sorted(known)
    assert all((PAGE.parent.parent / file).exists() for file in ELSEWHERE.values())


@pytest.mark.parametrize("case", ["works", "fails", "interrupted"])
@pytest.mark.parametrize("mark", EXPECTED)
def test_a_snippet_changes_what_it_says_and_loses_nothing(home, mark, case):
    (script,) = [script for script in snippets() if mark in script]
    done, changed = changes(home, script, case)
    files, printed = EXPECTED[mark]
    if case == "works":
        assert (done.returncode, changed) == (0, files), done.stderr
        assert is_printed(printed, done.stdout), done.stdout
    else:
        assert changed == {} and is_printed(GOES_ON.get(mark, ""), done.stdout), done.stderr
        assert (done.returncode == 0) == (mark in GOES_ON), done.stderr
