"""Makes docs/cli.md out of every command's --help.

python bench/cli_page.py            # writes docs/cli.md
python bench/cli_page.py --check    # exits with 1 where it is out of date
"""

import sys
from importlib import metadata
from pathlib import Path

import click
from click.testing import CliRunner

from mlx_dgemma.cli.main import main as program

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """\
# Command line reference

Made from `--help` by `python bench/cli_page.py` with click {click}; do not edit this page.
`mlx-dgemma` and `python -m mlx_dgemma` are the same program. `python -m mlx_dgemma.convert` is `mlx-dgemma convert`.
"""


def help_of(*command: str) -> str:
    """What a command prints for --help in a terminal of 80 columns."""
    return CliRunner().invoke(program, [*command, "--help"], prog_name="mlx-dgemma", terminal_width=80).output


def page() -> str:
    """The text of docs/cli.md."""
    names = program.list_commands(click.Context(program))
    parts = [HEAD.format(click=metadata.version("click")), f"```\n{help_of()}```\n"]
    for name in names:
        parts.append(f"## {name}\n\n```\n{help_of(name)}```\n")
        command = program.get_command(click.Context(program), name)
        inner = command.commands if isinstance(command, click.Group) else {}
        parts += [f"```\n{help_of(name, one)}```\n" for one in inner if not inner[one].hidden]
    return "\n".join(parts)


def is_current() -> bool | None:
    """Whether docs/cli.md is what would be made; None where another version of click made it."""
    made, stored = page(), PAGE.read_text(encoding="utf-8")
    return made == stored if made.splitlines()[2] == stored.splitlines()[2] else None


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(), encoding="utf-8")
    elif (current := is_current()) is None:
        print("docs/cli.md was made with another version of click, and is not compared.", file=sys.stderr)
    elif not current:
        sys.exit("docs/cli.md is out of date; run python bench/cli_page.py")
