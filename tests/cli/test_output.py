"""Where results go: files are whole or as they were, backups stay, and the clipboard keeps what it has on failure."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from commands import run
from support import engine_of

from mlx_dgemma import engine, files
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli import clipboard
from mlx_dgemma.cli.commands import text
from mlx_dgemma.decoding.events import Block, Finished, Result, Stats
from mlx_dgemma.errors import MemoryLimitError
from mlx_dgemma.prompt.opened import Opened

SAW, SWAP = "The cat saw a cat in the barn.\n", "Replace cat with dog"


demo_opened = cache(Opened.of)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with a clipboard, and the demo loaded once."""
    opened, loaded = demo_opened(), engine_of(DEMO)
    monkeypatch.setattr(Opened, "of", lambda name=None, adapter=None: opened)
    monkeypatch.setattr(engine, "load", lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pbcopy").write_text(f'#!/bin/sh\ncat > "{tmp_path}/clipboard"; exit ${{PBCOPY:-0}}\n')
    (tmp_path / "bin" / "pbcopy").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "clipboard").write_text("precious")
    (tmp_path / "a.txt").write_text("my notes")
    return tmp_path


@pytest.fixture
def answers(monkeypatch):
    """Put a text in place of every answer; `reason` is why it ended."""

    def set_answer(said, reason="stop", before=lambda: None):
        def events(*_, **__):
            before()
            yield Block(0, 1, (1,), said)
            yield Finished(Result(said, "", [], [1, 2], reason, Stats(1, 0, 2, 1, 1, 1, {}, 0.0, 0.0, 0, 0)))

        monkeypatch.setattr(engine.Engine, "run", events)

    return set_answer


def interrupt():
    raise KeyboardInterrupt


# edit --in-place


def test_every_old_text_is_kept(place, answers):
    file = place / "story.txt"
    file.write_text(SAW)
    file.chmod(0o640)
    (place / "story.txt.bak").write_text("somebody else's")
    for number in range(3):
        answers(f"text {number}\n")
        done = run("edit", SWAP, "story.txt", "-i")
        assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    names = ("story.txt", "story.txt.bak", "story.txt.bak.2", "story.txt.bak.3", "story.txt.bak.4")
    kept = [(place / name).read_text() for name in names]
    assert kept == ["text 2\n", "somebody else's", SAW, "text 0\n", "text 1\n"]
    assert (file.stat().st_mode & 0o777, (place / names[2]).stat().st_mode & 0o777) == (0o640, 0o640)
    assert run("edit", SWAP, "story.txt", "-i").exit_code == 0  # the same text: nothing to write
    assert len(list(place.glob("story*"))) == 5


def test_a_backup_is_made_where_there_are_no_links(place, answers, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(text.os, "link", no_links)
    answers("new\n")
    (place / "a.txt.bak").write_text("first")
    assert run("edit", SWAP, "a.txt", "-i").exit_code == 0
    assert [(place / name).read_text() for name in ("a.txt", "a.txt.bak", "a.txt.bak.2")] == [
        "new\n",
        "first",
        "my notes",
    ]


def test_a_link_to_a_file_stays_one(place, answers):
    (place / "there").mkdir()
    (place / "there" / "b.txt").write_text("old")
    (place / "link").symlink_to(place / "there" / "b.txt")
    answers("new")
    assert run("edit", SWAP, "link", "-i").exit_code == 0
    assert (place / "link").is_symlink() and (place / "there" / "b.txt").read_text() == "new"
    assert (place / "there" / "b.txt.bak").read_text() == "old"


@pytest.mark.parametrize("asked", [("edit", SWAP, "a.txt", "-i"), ("generate", SWAP, "-o", "a.txt")])
def test_a_folder_where_nothing_can_be_made_is_told_at_once(place, asked, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *mode: Path(path) != place and real(path, *mode))
    monkeypatch.setattr(Opened, "of", None)  # calling it would fail
    done = run(*asked)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"since nothing can be made in {place}; check its permissions." in done.stderr


@pytest.mark.parametrize(
    ("said", "options", "code", "why"),
    [
        ("cut", {"reason": "length"}, 1, "The text was cut at 2 tokens, so a.txt stays as it is; raise --max-tokens."),
        (" \n", {}, 1, "The text is empty, so a.txt stays as it is; try another --seed."),
        ("x", {"before": interrupt}, 130, ""),
        (
            "x",
            {"before": lambda: Path("a.txt").write_text("my notes and more")},
            1,
            "a.txt was changed while it was edited, so it stays as it is; run the command again.",
        ),
    ],
)
def test_a_file_that_is_not_edited_is_as_it_was(place, answers, said, options, code, why):
    answers(said, **options)
    done = run("edit", SWAP, "a.txt", "-i", "-m", DEMO)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1:] == ([f"Error: {why}"] if why else [])
    assert (place / "a.txt").read_text() == ("my notes and more" if "changed" in why else "my notes")
    assert sorted(one.name for one in place.iterdir()) == ["a.txt", "bin", "clipboard"]


def test_a_backup_goes_where_the_file_cannot_be_written(place, answers, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    answers("new")
    monkeypatch.setattr(files, "_flush", full)
    done = run("edit", SWAP, "a.txt", "-i", "-m", DEMO)
    assert done.exit_code == 1 and "The disk is full" in done.stderr
    assert (place / "a.txt").read_text() == "my notes"
    assert sorted(one.name for one in place.iterdir()) == ["a.txt", "bin", "clipboard"]


# --output and --copy

ASKED = {
    "generate": ("generate", "Spell the word cat."),
    "infill": ("infill", "hole.txt"),
    "edit": ("edit", SWAP, "a.txt"),
    "choose": ("choose", "Which is larger, 51 or 23?", "51", "23"),
}


@pytest.fixture(params=ASKED)
def asked(request, place):
    (place / "hole.txt").write_text("a <HOLE> b")
    return ASKED[request.param]


def test_a_result_goes_to_a_file_and_to_the_clipboard(place, asked, answers):
    answers("cät\n" if asked[0] == "generate" else "cät")
    (place / "out").write_text("old")
    done = run(*asked, "--output", "out", "--copy", "-m", DEMO)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    shown = run(*asked, "-m", DEMO).stdout
    assert (place / "out").read_text() == shown and shown
    assert (place / "clipboard").read_text() == shown.removesuffix("\n")
    both = run(*asked, "--copy", "--json", "-m", DEMO)
    assert json.loads(both.stdout) and (place / "clipboard").read_text() == both.stdout.removesuffix("\n")


@pytest.mark.parametrize("case", ["fails", "interrupted", "empty"])
def test_what_fails_leaves_file_and_clipboard(place, asked, answers, monkeypatch, case):
    def load(*_, **__):
        raise MemoryLimitError("demo needs 16 GB.")

    codes = {"fails": 1, "interrupted": 130, "empty": 1}
    if asked[0] == "choose" and case != "fails":
        pytest.skip("a choice is never empty, and its one step has no blocks to keep")
    answers("" if case == "empty" else "x", before=interrupt if case == "interrupted" else lambda: None)
    if case == "fails":
        monkeypatch.setattr(engine, "load", load)
    (place / "out").write_text("old")
    before = {one: one.read_bytes() for one in place.iterdir() if one.is_file()}
    done = run(*asked, "--output", "out", "--copy", "-m", DEMO)
    assert (done.exit_code, done.stdout) == (codes[case], ""), done.stderr
    assert {one: one.read_bytes() for one in place.iterdir() if one.is_file()} == before


def test_a_clipboard_that_refuses_is_told(place, answers, monkeypatch):
    answers("x")
    monkeypatch.setenv("PBCOPY", "3")
    done = run("generate", "Hi", "--copy", "-m", DEMO)
    assert (done.exit_code, done.stdout) == (1, "x\n")
    why = "pbcopy did not take the text for the clipboard (it exited with 3); the text itself is complete."
    assert done.stderr == f"Error: {why}\n"


def test_the_program_of_the_clipboard_fits_the_system(place, monkeypatch):
    for name in ("wl-copy", "xclip"):
        (place / "bin" / name).write_text("#!/bin/sh\n")
        (place / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place / "bin"))
    assert clipboard.program() == ("pbcopy",)
    (place / "bin" / "pbcopy").unlink()
    for variable, name in (("DISPLAY", "xclip"), ("WAYLAND_DISPLAY", "wl-copy")):
        monkeypatch.setenv(variable, ":0")
        assert clipboard.program()[0] == name


def test_pbcopy_gets_utf_8_where_there_is_no_locale(monkeypatch):
    seen = []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: seen.append(k) or subprocess.CompletedProcess(a, 0))
    clipboard.copy("ü")
    assert (seen[0]["input"], seen[0]["env"]["LC_ALL"]) == ("ü".encode(), "en_US.UTF-8")
