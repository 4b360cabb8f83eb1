"""The command info."""

from __future__ import annotations

import json

import click

from ...desktop.user_config import default_model
from ..common import DEMO_NOTICE, number_option
from ..terminal import Terminal


@click.command()
@click.argument("model", required=False, envvar="MLX_DGEMMA_MODEL", default=default_model)
@number_option("--context", 1, "Tokens of prompt and answer to compute the memory for.", "4096")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def info(model: str | None, context: int | None, as_json: bool) -> None:
    """Show a checkpoint's architecture, sizes and sampler, and whether it fits this machine.

    MODEL is a folder or a downloaded Hub id [default: $MLX_DGEMMA_MODEL, else setup's, else the bundled
    demo]. No weights are loaded.

    \b
    mlx-dgemma info
    mlx-dgemma info google/diffusiongemma-26B-A4B-it --context 32768
    """
    from ..info import describe, lines, open_local

    terminal = Terminal()
    if model is None:
        terminal.warn(DEMO_NOTICE)
    about = describe(open_local(model), context)
    terminal.say((json.dumps(about, ensure_ascii=False) if as_json else "\n".join(lines(about))) + "\n")
