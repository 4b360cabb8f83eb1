"""Whose stdin it is: the command's, or that of the loop or script around it."""

import ctypes
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import run

from mlx_dgemma.cli import stdin

READ = (
    "import sys; from mlx_dgemma.cli import stdin; from mlx_dgemma.cli.terminal import Terminal; "
    "stdin.SILENT_SECONDS = 0.1; sys.stdout.write('<' + stdin.beside_prompt(Terminal()).decode() + '>')"
)


@pytest.fixture
def sh(tmp_path):
    """(stdout, stderr) of a script in which `read_all` prints what a command beside a prompt reads."""
    (tmp_path / "read_all").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{READ}"\n')
    (tmp_path / "read_all").chmod(0o755)
    (tmp_path / "lines").write_text("a\nb\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def run(script, shell="bash"):
        done = subprocess.run(
            [shell, "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    ("script", "read"),
    [
        ("printf 'a log' | read_all", "<a log>"),
        ("printf 'a log' | timeout 60 read_all", "<a log>"),
        ("read_all < lines; printf .", "<a\nb\n>."),
        ("for i in 1 2; do printf $i | read_all; done", "<1><2>"),
        ("read_all </dev/null; printf .", "<>."),
    ],
)
def test_what_is_given_to_the_command_is_read(sh, script, read):
    assert sh(script) == (read, "")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("while read -r x; do printf $x; read_all; done < lines", "a<>b<>"),
        ("cat lines | while read -r x; do printf $x; read_all; done", "a<>b<>"),
        ("cat lines | while read -r x; do printf $x; timeout 60 read_all; done", "a<>b<>"),
        ("printf 'read_all; printf $((1 + 1))\\n' | sh", "<>2"),
        ("printf 'for cat' | (read_all; cat)", "<>for cat"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_what_a_loop_or_script_reads_is_left_alone(sh, script, said, shell):
    out, err = sh(script, shell)
    assert out == said
    assert set(err.splitlines()) <= {stdin.UNREAD}
    assert (stdin.UNREAD in err) == ("printf $((" not in script)  # there, the script is over


@pytest.mark.parametrize("command", [("generate", " "), ("choose", " ", "a", "b")])
def test_every_command_with_a_prompt_leaves_a_loop_its_lines(monkeypatch, command):
    monkeypatch.setattr(stdin, "_is_shared", lambda: True)
    done = run(*command, data=b"the next line")
    assert done.stderr.splitlines()[-1] == "Error: The prompt is empty; say what you want."


def test_a_silent_pipe_is_told(sh):
    out, err = sh("(sleep 1; printf late) | read_all")
    assert (out, err.partition(";")[0]) == ("<late>", "Waiting for stdin, which is a pipe that says nothing yet")


# macOS tells what another process has by libproc; these are its structures as Apple's sys/proc_info.h has them.


class ShortInfo(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_uint32 * 4), ("name", ctypes.c_char * 16), ("rest", ctypes.c_uint32 * 8)]


class Stat(ctypes.Structure):
    _fields_ = [
        ("dev", ctypes.c_uint32), ("mode", ctypes.c_uint16), ("links", ctypes.c_uint16), ("ino", ctypes.c_uint64),
        ("owner", ctypes.c_uint32 * 2), ("times", ctypes.c_int64 * 8), ("size", ctypes.c_int64),
        ("blocks", ctypes.c_int64), ("more", ctypes.c_uint32 * 4), ("spare", ctypes.c_int64 * 2),
    ]  # fmt: skip


class Pipe(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char * 24), ("stat", Stat), ("handle", ctypes.c_uint64), ("peer", ctypes.c_uint64),
        ("status", ctypes.c_int * 2),
    ]  # fmt: skip


class File(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char * 24), ("stat", Stat), ("kind", ctypes.c_int * 2), ("volume", ctypes.c_int * 2)]


@pytest.mark.parametrize(("kind", "flavor"), [(stat.S_IFIFO, 6), (stat.S_IFREG, 1)])
def test_macos_is_asked_for_the_parents_stdin(monkeypatch, kind, flavor):
    parent = 4711

    def info(pid, asked, _, buffer, size):
        assert (pid, asked, size) == (parent, 13, ctypes.sizeof(ShortInfo))
        ctypes.memmove(buffer, bytes(ShortInfo((pid, 1, 0, 0), b"zsh")), size)
        return size

    def of_descriptor(other):
        def found(pid, descriptor, asked, buffer, size):
            assert (descriptor, asked, size) == (0, flavor, ctypes.sizeof(Pipe if flavor == 6 else File))
            one = 7 if pid == os.getpid() else other
            told = Pipe(handle=one) if flavor == 6 else File(stat=Stat(dev=1, ino=one))
            told.stat.size = pid  # what differs between two looks at one file
            ctypes.memmove(buffer, bytes(told), size)
            return size

        return found

    monkeypatch.setattr(stdin.sys, "platform", "darwin")
    for other, shared in ((7, True), (8, False)):
        library = SimpleNamespace(proc_pidinfo=info, proc_pidfdinfo=of_descriptor(other))
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, held=library, **__: held)
        assert stdin._process(parent, SimpleNamespace(st_mode=kind)) == (shared, "zsh", 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(proc_pidinfo=lambda *_: 0))
    assert stdin._process(parent, SimpleNamespace(st_mode=kind))[0] is True  # nobody tells: it is left alone
