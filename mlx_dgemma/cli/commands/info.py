"""The command info."""

from __future__ import annotations

import json

import click
from click.core import ParameterSource

from ..calls.answers import DEMO_NOTICE
from ..common import kv_bits_option, model_option, number_option
from ..terminal import Terminal


@click.command()
@click.argument("checkpoint", metavar="[MODEL]", required=False)
@model_option
@number_option("--context", 1, "Tokens of prompt and answer to compute the memory for.", "4096")
@number_option("--ranks", 1, "Machines or GPUs that compute the model together.", "1")
@kv_bits_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def info(
    checkpoint: str | None,
    model: str | None,
    context: int | None,
    ranks: int | None,
    kv_bits: str | None,
    as_json: bool,
) -> None:
    """Show a checkpoint's architecture, sizes and sampler, and whether it fits this machine.

    The checkpoint is a folder or a downloaded Hub id; MODEL is another way to give --model. No weights are loaded.

    \b
    mlx-dgemma info
    mlx-dgemma info --model google/diffusiongemma-26B-A4B-it --context 32768
    mlx-dgemma info --model google/diffusiongemma-26B-A4B-it --ranks 2
    """
    from ..info import describe, lines, open_local

    terminal = Terminal()
    given = click.get_current_context().get_parameter_source("model") is ParameterSource.COMMANDLINE
    if checkpoint is not None and given:
        raise click.UsageError(f"MODEL is {checkpoint} and --model is {model}; leave one out.")
    model = checkpoint or model
    if model is None:
        terminal.warn(DEMO_NOTICE)
    about = describe(open_local(model), context, ranks or 1, None if kv_bits is None else int(kv_bits))
    terminal.say((json.dumps(about, ensure_ascii=False) if as_json else "\n".join(lines(about))) + "\n")
