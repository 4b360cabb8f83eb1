"""`mlx-dgemma check`: a thin layer over the room `check`. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
import os

import click

from ..common import ModelChoice
from ..terminal import Terminal

SECTIONS = ("machine", "operations", "products", "references", "answers", "speed")
PASTE = "\nReporting a problem? Paste all of the above and this line into the issue:"


@click.command("check")
@click.option("--quick", is_flag=True, help="Leave out speed, and check products of a small shape only.")
@click.option("--section", type=click.Choice(SECTIONS), multiple=True, help="Run this section only; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON and nothing else.")
@click.option("--ranges", metavar="PATH_OR_ID", help="Only say whether a checkpoint's products fit float16.")
@click.pass_context
def check(ctx: click.Context, quick: bool, section: tuple[str, ...], as_json: bool, ranges: str | None) -> None:
    """Check what this machine computes, and how fast.

    It needs no model but the bundled demo. Each MLX operation that the demo uses is compared with a second opinion.
    Products at the release's size are compared with unpacked weights in float32. The demo is compared with stored
    outputs of Transformers and with known answers. Speeds of the parts of a denoising step predict the release's step
    on this machine.

    The last line of the report is all of it as JSON. The exit code is 0 if no line failed, and 1 otherwise. A
    warning does not count as a failure.

    \b
    mlx-dgemma check             # a few minutes
    mlx-dgemma check --quick     # less than a minute
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it once: float32 products are compared as such
    terminal = Terminal()
    if ranges is not None:
        from ...check.ranges import audit

        found = audit(ModelChoice(ranges, None, ignore_memory=False).load(terminal))
        terminal.say(f"{json.dumps(found.as_dict())}\n" if as_json else "\n".join(found.lines()) + "\n")
        ctx.exit(0 if found.allowed else 1)

    from ...check import report

    made = report.check(quick, section, (lambda _: None) if as_json else (lambda text: terminal.say(f"{text}\n")))
    if not as_json:
        terminal.say(f"{PASTE}\n")
    terminal.say(f"{report.as_json(made)}\n")
    ctx.exit(0 if made["passed"] else 1)
