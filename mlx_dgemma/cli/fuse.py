"""`mlx-dgemma fuse`: a thin layer over `fuse()`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from pathlib import Path

import click

from ..convert.cli import progress_bar, sigterm_exits
from ..errors import count, human
from .common import DEMO_NOTICE, model_option
from .terminal import Terminal


@click.command("fuse")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--adapter", required=True, metavar="PATH_OR_ID", help="LoRA or DoRA in PEFT's layout.")
@model_option
@click.option("--dequantize", is_flag=True, help="Leave changed weights unpacked.")
def fuse(out: Path, adapter: str, model: str | None, dequantize: bool) -> None:
    """Put an adapter into a checkpoint's weights for good.

    OUT is the folder to make. Changed weights are rounded once more: to the dtype that the checkpoint stores, or, where
    it is quantized, to the bits that it packs them in. In 16-bit floats and at 8 bit little is lost; of experts at
    4 bit the rounding can outweigh a small change. --dequantize leaves changed weights unpacked, for more memory;
    --adapter with the other commands rounds no weight.

    An adapter that changes encoder and decoder differently cannot be fused, for they share their weights.

    \b
    mlx-dgemma fuse --adapter FOLDER --model mlx_model fused
    mlx-dgemma generate --model fused "Why is the sky blue?"
    """
    terminal = Terminal()
    if model is None:
        terminal.warn(DEMO_NOTICE)
    from ..adapters.fuse import fuse as fuse_

    with sigterm_exits(), progress_bar("Fusing") as progress:
        report = fuse_(adapter, out, model, dequantize, progress)
    terminal.say(f"{report.source} with {report.adapter} -> {report.target}\n")
    terminal.say(f"{count(len(report.modules), 'changed weight')}, {human(report.nbytes)}, {report.seconds:.1f} s.\n")
    if report.requantized:
        again = count(len(report.requantized), "changed weight")
        terminal.warn(f"Packed again, which rounds: {again}; --dequantize leaves them unpacked.")
