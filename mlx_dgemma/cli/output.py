"""Where a result goes: stdout, a file that is there as a whole or not at all, the clipboard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import click

from ..errors import CircumstanceError, DgemmaError
from . import clipboard
from .terminal import Terminal


class NewFile(click.Path):
    """The path of a file to write: its folder is there, and what has its name may be replaced."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the path."""
        path = Path(str(super().convert(value, param, ctx))).expanduser()
        if path.is_symlink():
            path = path.resolve()
        if not path.parent.is_dir():
            self.fail(f"The folder {path.parent} does not exist; make it first.", param, ctx)
        if path.exists() and not path.is_file():
            self.fail(f"{path} is no regular file; name one, or leave it out for stdout.", param, ctx)
        if (why := why_not_replaced(path)) is not None:
            self.fail(f"{path} cannot be written, since {why}; check its permissions.", param, ctx)
        return path


@dataclass(frozen=True)
class Output:
    """The values of `output_options`.

    Attributes:
        path: the file that takes the result in place of stdout.
        copy: whether the clipboard takes it too.
    """

    path: Path | None = None
    copy: bool = False

    def check(self) -> None:
        """Raise DgemmaError if there is no clipboard for --copy."""
        if self.copy:
            clipboard.program()

    def write(self, printed: str, terminal: Terminal, said: bool = False, copied: str | None = None) -> None:
        """Deliver a whole result.

        Args:
            printed: what stdout or the file takes.
            terminal: to say it.
            said: whether it was said already.
            copied: what the clipboard takes; None: the same without the last line break.

        Raises:
            DgemmaError: file or clipboard cannot be written, or the result is empty; both stay as they were.
        """
        if (self.path or self.copy) and not printed.strip():
            kept = " and ".join([*([str(self.path)] if self.path else []), *(["the clipboard"] if self.copy else [])])
            raise DgemmaError(f"The result is empty, so {kept} keeps what it holds; try another --seed.")
        if self.path:
            replace_file(self.path, printed.encode())
        elif not said:
            terminal.say(printed)
        if self.copy:
            clipboard.copy(printed.removesuffix("\n") if copied is None else copied)


def why_not_replaced(path: Path) -> str | None:
    """Why `replace_file` cannot write a file, as far as permissions tell; None where they allow it."""
    if path.exists() and not os.access(path, os.W_OK):
        return "it is read-only"
    folder = path.resolve().parent
    return None if os.access(folder, os.W_OK | os.X_OK) else f"nothing can be made in {folder}"


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all; one that it replaces gives it its permissions.

    Raises:
        DgemmaError: it cannot be written.
    """
    import shutil  # not above: a call of a running server is to import little

    from ..files import atomic_file

    with atomic_file(path) as draft:
        draft.write_bytes(data)
        if path.exists():
            shutil.copymode(path, draft)


@contextmanager
def created(path: Path | None) -> Iterator[TextIO | None]:
    """Create a file if `path` is given, and remove it if nothing was written.

    Raises:
        CircumstanceError: the file exists already.
    """
    if path is None:
        yield None
        return
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise CircumstanceError(f"{path} exists already; give another name, or remove it.") from None
    with file:
        try:
            yield file
        finally:
            if not file.tell():
                path.unlink()


def output_options(command: Any) -> Any:
    """Options that say where the result goes; the command gets them as `output: Output`."""

    @wraps(command)
    def with_output(*, target: Path | None, copy: bool, **options: Any) -> Any:
        return command(output=Output(target, copy), **options)

    with_output = click.option("--copy", is_flag=True, help="Put the result on the clipboard, too.")(with_output)
    return click.option(
        "-o",
        "--output",
        "target",
        type=NewFile(),
        metavar="FILE",
        help="Write the result to FILE in place of stdout, as a whole or not at all; an older FILE is replaced.",
    )(with_output)
