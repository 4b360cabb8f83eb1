"""`mlx-dgemma fuse`: a thin layer over `fuse()`. Heavy modules are imported when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from ...convert.cli import progress_bar, sigterm_exits
from ...errors import count, human
from ..calls.answers import DEMO_NOTICE
from ..common import model_option
from ..terminal import Terminal


@click.command("fuse")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--adapter", required=True, metavar="PATH_OR_ID", help="LoRA or DoRA adapter in PEFT format: folder or Hub id."
)
@model_option
@click.option("--dequantize", is_flag=True, help="Store changed weights without quantization.")
def fuse(out: Path, adapter: str, model: str | None, dequantize: bool) -> None:
    """Merge an adapter into a checkpoint's weights.

    OUT is the folder to create. Changed weights are rounded again, to the checkpoint's dtype or to its quantization.
    At 16 and 8 bits little is lost. In experts at 4 bits, the rounding can outweigh a small change. --dequantize
    stores changed weights without quantization, which takes more memory. The option --adapter of the other commands
    rounds no weight.

    An adapter that changes encoder and decoder differently cannot be fused, since they share their weights.

    \b
    mlx-dgemma fuse --adapter FOLDER --model FOLDER fused
    mlx-dgemma generate --model fused "Why is the sky blue?"
    """
    terminal = Terminal()
    from ...adapters.fuse import fuse as fuse_

    with sigterm_exits(), progress_bar("Fusing") as progress:
        report = fuse_(adapter, out, model, dequantize, progress)
    if model is None:
        terminal.warn(DEMO_NOTICE)
    terminal.say(f"{report.source} with {report.adapter} -> {report.target}\n")
    terminal.say(f"{count(len(report.modules), 'changed weight')}, {human(report.nbytes)}, {report.seconds:.1f} s.\n")
    if report.requantized:
        rounded = count(len(report.requantized), "changed weight")
        terminal.warn(f"Packed again, which rounds: {rounded}; --dequantize leaves them unpacked.")
