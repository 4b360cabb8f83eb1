"""Time of a step where a short reply ends early in its canvas: the whole canvas, and what the reply needs.

    python bench/narrow.py                                   # a small shape, for a CPU
    python bench/narrow.py --shape 26b --recipe 4bit         # a GPU
    python bench/narrow.py --shape 26b --rows 1 4 --tokens 20 100 --prefix 1024 8192

Random weights end nowhere, so the text's bound is its end: a reply of `--tokens` tokens has room for no more. The first
step computes the whole canvas either way; the next one was built for it, too, and is built again. Widths are rounded up
to what the device likes, 64 positions on a GPU and 8 on a CPU, so 20 and 100 tokens of 256 are 64 and 128 positions.
"""

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np
from report import GIB, attempt, finish, machine, show, spread, table
from shapes import add_arguments, from_arguments
from step import nbytes

from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import choose_kernels, suit_device
from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.lookahead import advance
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix

ALONE = 2  # steps told by themselves: the first, and the one that is built twice


def measure(model: DiffusionGemma, prefixes: list[Prefix], steps: int, tokens: int | None, fast: bool) -> dict:
    """Seconds of each step of canvases whose replies have so many tokens (None: computed in full), and their rows."""
    options = GenerationOptions(
        fast=fast, max_denoising_steps=steps + 1, end_tokens=(), confidence_threshold=0.0, certainty_threshold=0.0,
        patience=0, canvas="full" if tokens is None else "auto",
    )  # fmt: skip
    count = len(prefixes)
    keys = mx.random.split(mx.random.key(1), count)
    batch = CanvasBatch(model, prefixes, options, keys, None if tokens is None else [tokens] * count)
    seconds, positions, last = [], [], time.perf_counter()
    for _ in range(steps):
        before = sum(batch.positions)
        advance(batch)
        positions.append(sum(batch.positions) - before)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return {"seconds": seconds, "positions": positions}


def case(model: DiffusionGemma, prefixes: list[Prefix], tokens: int | None, args: argparse.Namespace) -> dict:
    """Median milliseconds of a step, of the first two, and of a reply of four steps, over the runs."""
    fast = args.mode == ["fast"]
    measure(model, prefixes, 3, tokens, fast)  # kernels, allocator
    runs = [measure(model, prefixes, args.steps, tokens, fast) for _ in range(args.runs)]
    milliseconds = [[1e3 * one for one in run["seconds"]] for run in runs]
    return {
        "step_ms": spread([one for run in milliseconds for one in run[ALONE:]]),
        "first_ms": spread([run[0] for run in milliseconds]),
        "second_ms": spread([run[1] for run in milliseconds]),
        "four_steps_ms": round(statistics.median(sum(run[:4]) for run in milliseconds), 2),
        "positions": runs[0]["positions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 100], help="of a reply, its end included")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="canvases together")
    args = parser.parse_args()
    found = machine()
    raw, dtype, model = from_arguments(args)
    weights = nbytes(model)
    print(f"shape {args.shape}, {args.recipe or dtype}, weights {weights / GIB:.3f} GiB")
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    canvas, results = model.config.canvas_length, []
    for length in args.prefix:
        prompt = random_prompt(raw, length)
        for rows in args.rows:
            prefixes = [model.new_prefix(capacity=length + 2 * canvas) for _ in range(rows)]
            for one in prefixes:
                prefill(model, one, np.asarray(prompt), None)
            lines = {}
            for tokens in (None, *(one for one in args.tokens if one < canvas)):
                name = "full" if tokens is None else f"{tokens} tokens"
                lines[name] = attempt(case, model, prefixes, tokens, args)
            print(f"\nprefix {length}, {rows} canvases of {canvas}: milliseconds, median (min-max)")
            done = {name: one for name, one in lines.items() if "failure" not in one}
            told = []
            for name, one in done.items():
                spreads = (show(one[f"{what}_ms"], 2) for what in ("step", "first", "second"))
                told.append([name, one["positions"][-1], *spreads, one["four_steps_ms"]])
            table(["", "positions", "step", "first", "second", "four steps"], told)
            for name in lines.keys() - done.keys():
                print(f"{name} failed: {lines[name]['failure']}")
            results.append({"prefix": length, "rows": rows, "cases": lines})
    finish("narrow", **found, config=raw, recipe=args.recipe, dtype=dtype, weights=weights, rows=results)


if __name__ == "__main__":
    main()
