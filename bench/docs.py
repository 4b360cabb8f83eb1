"""Runs the examples of README.md and docs/, and compares what they print.

    python bench/docs.py                       # every page, with the bundled demo
    python bench/docs.py docs/server.md        # some pages

Comments that a rendered page does not show mark the blocks of a page:

    <!-- run -->       before a ```sh or ```python block: it is run and must exit with 0
    <!-- run 2 -->     the same, with another exit status
    <!-- output -->    before a block: what the block before it printed to stdout; ... stands for any text
    <!-- file NAME --> before a block: it is written to a file of that name
    <!-- hidden        a script that a reader need not see, until -->

The blocks of a page share a temporary folder, whose bin/ comes first in PATH, and its python blocks share their names.
Port 8080 becomes a free one. What a block leaves running in the background ends with the page. Exits with 1 at the
first block that fails, after a diff.
"""

import difflib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 300  # that a block may take
MARK = "<<< the block begins here >>>"
BLOCK = re.compile(
    r"^[ ]*<!-- (?P<kind>run|output|file)(?: (?P<word>\S+))? -->\n+"
    r"(?P<fence>[ ]*```)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)[ ]*$"
    r"|^<!-- hidden\n(?P<hidden>.*?)^-->",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A marked block of a page."""

    kind: str  # run, output, file or hidden
    word: str  # an exit status, or a file's name
    language: str
    text: str
    line: int


class Failure(Exception):
    """A block that did something else than its page says."""


def blocks(page: str) -> list[Block]:
    """The marked blocks of a page.

    Raises:
        Failure: a mark without a block.
    """
    found = []
    for match in BLOCK.finditer(page):
        text = match["text"] if match["hidden"] is None else match["hidden"]
        kind, word, language = (match[name] or "" for name in ("kind", "word", "language"))
        line = page[: match.start()].count("\n") + 1
        found.append(Block(kind or "hidden", word, language, textwrap.dedent(text), line))
    marks = re.findall(r"^[ ]*<!-- (?:run|output|file|hidden)\b", page, re.MULTILINE)
    if len(found) != len(marks):
        raise Failure(f"{len(marks) - len(found)} of {len(marks)} marks have no block.")
    return found


def same(expected: str, printed: str) -> bool:
    """Whether a text is the expected one, but for blanks at the ends of lines, and any text for `...`."""
    tidy = [re.sub(r"[ \r]+$", "", text, flags=re.MULTILINE).strip("\n") for text in (expected, printed)]
    return re.fullmatch(".*".join(map(re.escape, tidy[0].split("..."))), tidy[1], re.DOTALL) is not None


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def execute(block: Block, folder: Path, earlier: list[str], groups: list[int]) -> str:
    """Run a block; returns its stdout.

    Raises:
        Failure: another exit status, or too long a time.
    """
    if block.language == "python":
        command = [sys.executable, "-c", "\n".join([*earlier, f"print({MARK!r}, flush=True)", block.text])]
        earlier.append(block.text)
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder / "config")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        groups.append(process.pid)
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"It did not end within {SECONDS} s.") from None
        out.seek(0), err.seek(0)
        printed = out.read()
        if status != int(block.word or 0):
            raise Failure(f"It exited with {status}.\n{printed}{err.read()}")
    return printed.partition(MARK + "\n")[2] if block.language == "python" else printed


def run(page: str, folder: Path) -> int:
    """Run a page's blocks in a folder; returns how many were run.

    Raises:
        Failure: at the first block that fails, with its line.
    """
    printed, count, earlier, groups, port = "", 0, [], [], free_port()
    try:
        for block in blocks(page.replace("8080", port)):
            try:
                if block.kind == "file":
                    (folder / block.word).write_text(block.text, encoding="utf-8")
                elif block.kind == "output":
                    if not same(block.text, printed):
                        texts = (block.text.splitlines(), printed.splitlines())
                        raise Failure("\n".join(difflib.unified_diff(*texts, "page", "run", lineterm="")))
                else:
                    printed, count = execute(block, folder, earlier, groups), count + 1
            except Failure as failure:
                raise Failure(f"line {block.line}: {failure}") from None
    finally:
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
    return count


def main(names: list[str]) -> int:
    pages = [Path(name) for name in names] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                count = run(page.read_text(encoding="utf-8"), Path(folder))
            except Failure as failure:
                print(f"{page.name}, {failure}", file=sys.stderr)
                return 1
        print(f"{page.name}: {count} blocks")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
