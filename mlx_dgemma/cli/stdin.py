"""What stands on stdin, and whether it is this command's to read.

Without a prompt, or with - in its place, stdin is read. Beside a prompt it is read where it was piped or redirected to
this command itself, as in `cat log.txt | mlx-dgemma generate "What failed?"`. A stdin that the shell around the command
has too may be that of a loop (`while read`) or of a script, which wants to read the rest: it is left alone.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress

from ..distributed import rank_here
from ..errors import CircumstanceError
from .calls.texts import decode_argument, decode_utf8
from .terminal import Terminal

# Programs that run another one with their own stdin. What they have is what was given to the command.
WRAPPERS = frozenset("caffeinate doas env nice nohup pipx stdbuf sudo time timeout uv uvx xcrun".split())
NO_PROMPT = "There is no prompt: give it as an argument, with --file, or on stdin."
ENDLESS = (
    "mlx.launch passes stdin on without its end, so it cannot be read as a whole; give the text as an argument, or "
    "name a file in place of -."
)
SILENT_SECONDS = 2.0  # after which a pipe that says nothing is told
UNREAD = (
    "stdin was not read, since the loop or script around this command has it too: -f - reads it, "
    "</dev/null says that it is not meant."
)
_MOST_PARENTS = 8
# From macOS's sys/proc_info.h: flavors of proc_pidfdinfo, the size of its structure, and where a file's identity lies.
_SHORT_INFO, _SHORT_INFO_BYTES = 13, 64  # PROC_PIDT_SHORTBSDINFO: pid, parent, group, status, name[16], ...
_IDENTITIES = {  # by kind of file: flavor, bytes of the structure, and (start, end) of what two processes share
    stat.S_IFIFO: (6, 184, (160, 168)),  # PROC_PIDFDPIPEINFO: pipe_handle
    stat.S_IFREG: (1, 176, (24, 40)),  # PROC_PIDFDVNODEINFO: vst_dev, vst_mode, vst_nlink, vst_ino
}


def read_prompt(argument: str | None, files: Sequence[str], terminal: Terminal, taken: bool = False) -> str:
    """Join files or stdin and the argument, in this order, separated by blank lines.

    stdin is read where there is no other prompt or - stands for it; beside an argument `beside_prompt` decides.

    Args:
        argument: the prompt, - for stdin.
        files: paths of texts, - for stdin.
        terminal: for what is to be known of stdin.
        taken: whether something else is read from stdin.

    Raises:
        PromptError: an input is not UTF-8.
        click.UsageError: there is no input.
    """
    names = [*files, "-"] if argument == "-" else list(files)
    parts = []
    for name in names:
        data = read_stdin(terminal) if name == "-" else _bytes_of(name)
        parts.append(_without_mark(data, "stdin" if name == "-" else name))
    if not names and not taken:
        there = sys.stdin.isatty() is False
        data = beside_prompt(terminal) if argument is not None else read_stdin(terminal) if there else b""
        if not data and argument is None:
            raise _no_prompt()
        parts.append(_without_mark(data, "stdin"))
    if argument not in (None, "-"):
        parts.append(decode_argument(argument, "The prompt") or "")
    elif not parts:
        raise _no_prompt()
    return "\n\n".join(part for part in parts if part.strip())


def _no_prompt() -> Exception:
    import click  # here, since a call of a running server does without

    return click.UsageError(NO_PROMPT)


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _without_mark(data: bytes, source: str) -> str:
    return decode_utf8(data, source).removeprefix("\ufeff").rstrip()


def read_stdin(terminal: Terminal | None = None) -> bytes:
    """All of stdin. A terminal is told once if a pipe says nothing for a while.

    Raises:
        CircumstanceError: it is that of `mlx.launch`, which has no end.
    """
    if rank_here() is not None and _is_pipe():
        raise CircumstanceError(ENDLESS)
    if terminal is not None and _is_pipe() and not _has_data(SILENT_SECONDS):
        terminal.warn(
            "Waiting for stdin, which is a pipe that says nothing yet; Ctrl-C stops, </dev/null leaves it out."
        )
    return sys.stdin.buffer.read()


def beside_prompt(terminal: Terminal) -> bytes:
    """What stdin holds for a command that has a prompt already; nothing where it is not the command's to read."""
    if sys.stdin.isatty():
        return b""
    if _is_shared():
        if _has_data(0):
            terminal.warn(UNREAD)
        return b""
    return read_stdin(terminal)


def _is_shared() -> bool:
    """Whether the process around this command has the same stdin, so that it may read there itself."""
    try:
        status = os.fstat(sys.stdin.fileno())
    except (OSError, ValueError):  # a stand-in for stdin, in tests and notebooks
        return False
    if stat.S_ISCHR(status.st_mode):  # /dev/null
        return False
    if stat.S_ISREG(status.st_mode) and os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) > 0:
        return True  # somebody has begun to read it
    parent = os.getppid()
    for _ in range(_MOST_PARENTS):
        shares, name, above = _process(parent, status)
        if not shares or name not in WRAPPERS:
            return shares
        parent = above
    return True


def _process(pid: int, status: os.stat_result) -> tuple[bool, str, int]:
    """Of a process: whether it has our stdin (also where nobody tells), its name, and its parent."""
    try:
        return _of_mac(pid, status) if sys.platform == "darwin" else _of_proc(pid, status)
    except (OSError, ValueError, LookupError, AttributeError):
        return True, "", 0


def _of_proc(pid: int, status: os.stat_result) -> tuple[bool, str, int]:
    line = _bytes_of(f"/proc/{pid}/stat").decode(errors="replace")
    name, _, rest = line.partition("(")[2].rpartition(")")
    try:
        theirs = os.stat(f"/proc/{pid}/fd/0")
    except FileNotFoundError:  # it has closed its stdin
        return False, name, int(rest.split()[1])
    return os.path.samestat(theirs, status), name, int(rest.split()[1])


def _of_mac(pid: int, status: os.stat_result) -> tuple[bool, str, int]:
    import ctypes
    import struct

    library = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    told = ctypes.create_string_buffer(_SHORT_INFO_BYTES)
    if library.proc_pidinfo(pid, _SHORT_INFO, ctypes.c_uint64(0), told, _SHORT_INFO_BYTES) < 32:
        raise OSError("proc_pidinfo")
    _, above, _, _, name = struct.unpack_from("=4I16s", told)
    flavor, size, (start, end) = _IDENTITIES[stat.S_IFMT(status.st_mode)]

    def identity(of: int) -> bytes | None:
        held = ctypes.create_string_buffer(size)
        return held.raw[start:end] if library.proc_pidfdinfo(of, 0, flavor, held, size) == size else None

    ours, theirs = identity(os.getpid()), identity(pid)
    if ours is None:
        raise OSError("proc_pidfdinfo")
    return ours == theirs, name.rstrip(b"\0").decode(errors="replace"), above


def _is_pipe() -> bool:
    with suppress(OSError, ValueError):
        return stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode)
    return False


def _has_data(seconds: float) -> bool:
    """Whether stdin can be read, or becomes so in that time; its end counts only where somebody waits for it."""
    import select

    try:
        descriptor = sys.stdin.fileno()
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(descriptor, 0, os.SEEK_CUR) < status.st_size
        ready = bool(select.select([descriptor], [], [], seconds)[0])
        return ready and (bool(seconds) or _pending(descriptor))
    except (OSError, ValueError):
        return True


def _pending(descriptor: int) -> bool:
    """Whether a pipe holds bytes, which its end is not."""
    import fcntl
    import struct
    import termios

    count = fcntl.ioctl(descriptor, termios.FIONREAD, struct.pack("i", 0))
    return struct.unpack("i", count)[0] > 0
