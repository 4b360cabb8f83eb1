"""The command group `mlx-dgemma`.

Only the requested text goes to stdout. Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. Heavy
modules are imported inside the commands, so that --help is fast.
"""

from __future__ import annotations

import errno
import re
import sys
from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..distributed import is_launched, rank_here
from ..errors import DgemmaError, failure
from .calls.texts import sentence_of
from .terminal import Terminal, prepare_streams

# In the order of --help: each command's module, which holds it under its own name, - as _, or under the one behind :.
COMMANDS = {
    "generate": ".commands.generate",
    "chat": ".commands.chat",
    "infill": ".commands.text",
    "continue": ".commands.text:continue_text",
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
    "setup": ".commands.desktop",
    "quick-actions": ".commands.desktop",
    "shortcut": ".commands.desktop",
    "convert": "..convert.cli",
}


CLICKS = click.ClickException, click.Abort, click.exceptions.Exit  # what click itself ends a command with
TOGETHER = ("generate", "chat", "infill", "edit", "choose", "serve", "evaluate", "tune")  # what several ranks do


class Commands(click.Group):
    """Imports commands on demand, prints a `DgemmaError` as one sentence, and exits with 130 on Ctrl-C.

    Where `mlx.launch` started several processes, rank 0 alone runs the command.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line."""
        if is_launched():
            from ..ranks.start import take_part

            try:
                code = take_part()
            except DgemmaError as error:
                click.ClickException(str(error)).show()
                code = error.exit_code
            if code is not None:
                sys.exit(code)
        try:
            return super().main(*args, **extra)
        except OSError as error:  # of what is printed before there is a command to run, as by --help
            click.ClickException(sentence_of(error)).show()
            sys.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command of a command line; some are for one process alone."""
        name, command, rest = super().resolve_command(ctx, args)
        if name not in TOGETHER and rank_here() is not None:
            ctx.fail(f"{name} runs in one process; leave out mlx.launch.")
        return name, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of --help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        return getattr(import_module(module, __package__), name or cmd_name.replace("-", "_"))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except DgemmaError as error:
            if error.exit_code == 2 and (command := self.get_command(ctx, ctx.invoked_subcommand or "")):
                inner = click.Context(command, info_name=ctx.invoked_subcommand, parent=ctx)
                raise click.UsageError(with_flags(str(error), command), inner) from None
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has gone; click exits quietly
                raise
            raise click.ClickException(sentence_of(error)) from None
        except KeyboardInterrupt:
            terminal = Terminal()
            terminal.interrupted()
            terminal.hint("Interrupted.")
            ctx.exit(130)
        except Exception as error:  # also MLX's, of a transport that has lost a rank
            if isinstance(error, CLICKS) or (rank := rank_here()) is None:
                raise
            rank.fail(failure(rank.place.rank, error))


PHRASES = {  # what errors call an option where they quote its value, and the option
    "answer template": "answer",
    "pattern": "regex",
    "regex": "regex",
    "schema": "schema",
    "alias": "aliases",
    "origin": "origins",
    "host": "host",
    "API key": "api_key",
}


def with_flags(message: str, command: click.Command) -> str:
    """An error of an option as the command line names it: `t_min is 2` becomes `--t-min is 2`.

    A name of one word may be a word of the sentence as well: it is the option's where something is said of it.
    """
    flags = {one.name: max(one.opts, key=len) for one in command.params if isinstance(one, click.Option) and one.name}
    names = "|".join(map(re.escape, sorted(flags, key=len, reverse=True)))

    def named(found: re.Match[str]) -> str:
        said = found["said"] is not None and not re.search(r"[Tt]he $", message[: found.start()])
        return (flags[found["name"]] if said or "_" in found["name"] else found["name"]) + (found["said"] or "")

    phrases = "|".join(PHRASES)
    message = re.sub(rf"\bThe ({phrases})\b", lambda found: flags.get(PHRASES[found[1]], found[0]), message)
    told = re.sub(rf"(?<![\w-])(?P<name>{names})\b(?P<said>(?= is\b|=| are given| and \w+ are given))?", named, message)
    told = re.sub(r"(--[\w-]+) is True\b", r"\1 is given", told)
    return re.sub(r'(--[\w-]+)="([\w-]+)"', r"\1 \2", told)


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
    prepare_streams()
