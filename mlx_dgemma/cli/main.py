"""The command group `mlx-dgemma`.

Only the requested text goes to stdout. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. Heavy
modules are imported inside the commands, so that --help is fast.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..errors import DgemmaError
from .terminal import Terminal

# In the order of --help: each command's module, which holds it under its own name.
COMMANDS = {
    "generate": ".commands.generate",
    "chat": ".commands.chat",
    "infill": ".commands.text",
    "edit": ".commands.text",
    "choose": ".commands.choose",
    "serve": ".commands.serve",
    "launch": ".commands.launch",
    "tune": ".commands.tune",
    "distill": ".commands.distill",
    "calibrate": ".commands.calibrate",
    "evaluate": ".commands.evaluate",
    "fuse": ".commands.fuse",
    "info": ".commands.info",
    "check": ".commands.check",
    "convert": "..convert.cli",
}


class Commands(click.Group):
    """Imports commands on demand, prints a `DgemmaError` as one sentence, and exits with 130 on Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of --help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(COMMANDS[cmd_name], __package__), cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except DgemmaError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has gone; click exits quietly
                raise
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            terminal = Terminal()
            terminal.interrupted()
            terminal.hint("Interrupted.")
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-dgemma")
def main() -> None:
    """DiffusionGemma on MLX: text by block diffusion.

    Without --model, a bundled demo of 6.7 M parameters answers.

    \b
    mlx-dgemma generate "Write JSON for: Anna is 31 years old and lives in Oslo."
    cat log.txt | mlx-dgemma generate --model FOLDER "What failed?"
    mlx-dgemma chat --model FOLDER
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: the next open file would get its descriptor
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Regardless of the locale; names of files may hold bytes that are no text.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
