"""`mlx-dgemma setup`, `quick-actions` and `shortcut`: thin layers over the room `desktop`."""

from __future__ import annotations

import json
import os
import plistlib
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click

from ...desktop import applescript
from ...desktop import quick_actions as bundles
from ...desktop import user_config as config
from ...desktop.actions import ACTIONS, VERBS, Action, read_actions
from ...desktop.requests import Asked, read_answer, read_request
from ...errors import DgemmaError, human
from ...installation import this_copy
from ..calls.texts import decode_argument, decode_utf8, sentence_of
from ..common import model_option
from ..output import Output, output_options
from ..terminal import Terminal

folder_option = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="~/Library/Services",
    help="Folder of the workflows.",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
# What config.toml names is left to it, so that setup can change it later.
named_model_option = click.option(
    "-m",
    "--model",
    metavar="PATH_OR_ID",
    envvar="MLX_DGEMMA_MODEL",
    show_default="$MLX_DGEMMA_MODEL, else what setup chose at the time of the call",
    help="Checkpoint folder or Hub id.",
)


@click.group("quick-actions")
def quick_actions() -> None:
    """Rewrite the selection in any app, or ask about files in Finder (macOS).

    `install` writes Automator workflows, which appear in the Services menu, as Quick Actions in Finder, and under
    System Settings > Keyboard > Keyboard Shortcuts > Services, where they can be given keys.
    """


@quick_actions.command()
@click.argument("names", nargs=-1)
@click.option(
    "--actions",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Own actions from a YAML file, beside the built-in ones.",
)
@named_model_option
@folder_option
@dry_run_option
def install(names: tuple[str, ...], file: Path | None, model: str | None, folder: Path | None, dry_run: bool) -> None:
    """Write the actions of these NAMES, or all.

    \b
    mlx-dgemma quick-actions install
    mlx-dgemma quick-actions install grammar explain
    mlx-dgemma quick-actions install --actions mine.yaml --dry-run
    """
    chosen = _chosen(names, file)
    where, model = bundles.services_folder(folder), _absolute_model(model)
    terminal = Terminal()
    if not dry_run:
        for path in bundles.install(chosen, where, model):
            terminal.warn(f"Wrote {path}.")
        return
    for name, files in bundles.bundles(chosen, model).items():
        document = plistlib.loads(files["document.wflow"])
        script = document["actions"][0]["action"]["ActionParameters"]["COMMAND_STRING"]
        terminal.say(f"# {where / name}\n{script}\n")


@quick_actions.command()
@click.argument("names", nargs=-1)
@folder_option
@dry_run_option
def uninstall(names: tuple[str, ...], folder: Path | None, dry_run: bool) -> None:
    """Remove the actions of these NAMES, or all. Workflows of others stay."""
    terminal = Terminal()
    for path in bundles.uninstall(bundles.services_folder(folder), names, dry_run):
        terminal.warn(f"{'Would remove' if dry_run else 'Removed'} {path}.")


@quick_actions.command("list")
@folder_option
def list_(folder: Path | None) -> None:
    """List the actions: name, title, and where they are installed."""
    terminal = Terminal()
    try:
        found = {one.key: one for one in bundles.installed(bundles.services_folder(folder))}
    except DgemmaError:  # no macOS: there are none
        found = {}
    titles = {action.key: action.title for action in ACTIONS} | {key: one.title for key, one in found.items()}
    for key, title in titles.items():
        terminal.say(f"{key}\t{title}\t{found[key].path if key in found else 'not installed'}\n")


@quick_actions.command("applescript")
@output_options
@named_model_option
def applescript_(output: Output, model: str | None) -> None:
    """Print a library of AppleScript handlers: generate, edit, editSelection."""
    output.check()
    output.write(applescript.library(this_copy().program(), _absolute_model(model)), Terminal())


@quick_actions.command(hidden=True)
@click.option("--verb", type=click.Choice(VERBS), required=True)
@click.option("--instruction", default="", metavar="TEXT")
@click.option("--strength", type=click.FloatRange(0, 1))
@model_option
@click.argument("files", nargs=-1)
def run(verb: str, instruction: str, strength: float | None, model: str | None, files: tuple[str, ...]) -> None:
    """Print the whole answer about the text on stdin and FILES, or fail. It is what the workflows call."""
    text = "" if files else decode_utf8(sys.stdin.buffer.read(), "The selection")
    options = {"--strength": strength, "--model": model}
    given = tuple((name, f"{value}") for name, value in options.items() if value is not None)
    Terminal().say(_ask(Asked(verb, text, decode_argument(instruction, "--instruction") or "", files, given)))


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
def shortcut(file: str | None) -> None:
    """Answer a request in JSON with JSON, for Shortcuts and scripts.

    The request is FILE or stdin: {"action": "generate" or "edit", "text", "instruction", "images", "files", "system",
    "model", "seed", "max_tokens", "strength"}. The answer is {"text", "error"}, one of which is null. The exit code is
    0 also for an error, since Shortcuts drops the output of a command that fails.

    \b
    echo '{"action": "edit", "text": "It are late.", "instruction": "Fix it."}' | mlx-dgemma shortcut
    """
    answer: dict[str, Any] = {"text": None, "error": None}
    try:
        data = Path(file).read_bytes() if file and file != "-" else sys.stdin.buffer.read()
        answer["text"] = _ask(read_request(data))
    except DgemmaError as error:
        answer["error"] = str(error)
    except OSError as error:
        answer["error"] = sentence_of(error)
    except click.ClickException as error:
        answer["error"] = error.format_message()
    Terminal().say(json.dumps(answer, ensure_ascii=False) + "\n")


def _ask(asked: Asked) -> str:
    """The whole answer, by the same command that a terminal would run, so that a running server is used as there.

    Raises:
        DgemmaError: there is no whole answer.
        click.ClickException: the command refuses.
    """
    from ..main import main

    printed = StringIO()
    with tempfile.TemporaryDirectory(prefix="mlx-dgemma-") as folder:
        file = Path(folder, "selection.txt")
        file.write_bytes(asked.text.encode())
        with redirect_stdout(printed):
            code = main.main(asked.arguments(file), prog_name="mlx-dgemma", standalone_mode=False)
    if code:
        raise DgemmaError("The answer was interrupted; ask again.")
    return read_answer(asked.action, printed.getvalue())


def _chosen(names: tuple[str, ...], file: Path | None) -> list[Action]:
    own = read_actions(file) if file else ()
    known = {action.key: action for action in (*ACTIONS, *own)}  # an own one replaces that of the same name
    for name in names:
        if name not in known:
            raise click.UsageError(f"There is no action {name!r}; give of {', '.join(known)}.")
    titles = [known[name].title for name in names or known]
    for title in titles:
        if titles.count(title) > 1:
            raise DgemmaError(f"Two actions have the title {title!r}; give one of them another.")
    return [known[name] for name in dict.fromkeys(names or known)]


def _absolute_model(name: str | None) -> str | None:
    """A folder as an absolute path, since a workflow runs in another one; a Hub id as it is."""
    if name is None or (name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()):
        return name
    return os.path.abspath(os.path.expanduser(name))


@click.command()
@click.option("-m", "--model", metavar="PATH_OR_ID", show_default="the release", help="Checkpoint folder or Hub id.")
@click.option("--recipe", metavar="NAME", show_default="the best that fits", help="Recipe to convert with.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="~/models/NAME-RECIPE",
    help="Folder of the converted checkpoint.",
)
@click.option("--check/--no-check", default=True, show_default=True, help="Run `check --quick` first.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing.")
@click.pass_context
def setup(
    ctx: click.Context, model: str | None, recipe: str | None, folder: Path | None, check: bool, yes: bool
) -> None:
    """Choose, download and convert the model that fits this machine, and make it the default.

    It can be interrupted and run again: files that were downloaded are kept. The default is written into
    ~/.config/mlx-dgemma/config.toml; --model and $MLX_DGEMMA_MODEL go before it.

    \b
    mlx-dgemma setup
    mlx-dgemma setup --yes --recipe 4bit --folder ~/models/diffusiongemma-4bit
    """
    terminal = Terminal()
    if not terminal.hints:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    config.default_model()  # a broken file is told before anything is downloaded
    from ...convert.cli import progress_bar
    from ...desktop import setup as first_run

    with first_run.interrupts_end_at_once(terminal.warn):
        planned = first_run.plan(model or first_run.RELEASE, recipe)
    target = (folder.expanduser().absolute() if folder else planned.target) if planned.chosen.recipe else None
    for line in first_run.lines(planned):
        terminal.warn(line)
    what = f"download {planned.name} ({human(first_run.source_bytes(planned))}) if it is not here"
    if target is not None:
        what += f", convert it to {planned.chosen.recipe} ({human(planned.chosen.weights)}) into {target}"
    if not yes and not click.confirm(f"Shall I {what}?", default=True, err=True):
        ctx.exit(1)
    if check:
        terminal.warn("Checking what this machine computes; it takes less than a minute.")
        done = subprocess.run([sys.executable, "-m", "mlx_dgemma", "check", "--quick"], stdout=sys.stderr, check=False)
        if done.returncode:
            raise DgemmaError("The check failed, so nothing was downloaded; report it, or go on with --no-check.")
    with progress_bar("Converting") as progress:
        name = first_run.obtain(planned, target, progress, terminal.warn)
    terminal.warn(f"The default model is {name}, by {config.set_default_model(name)}. Try: mlx-dgemma chat")
