"""Time and peak memory of looking at pictures, by their number.

    python bench/look.py --budget 280 --count 1 4          # the demo's tower
    python bench/look.py --shape 26b --budget 1120 --count 1 2 10      # the release's tower, a GPU

Weights and pictures are random. Prints the ceiling, a row per count and a last line of JSON.
"""

import argparse
import time

import mlx.core as mx
import numpy as np
from ceiling import look_flops, report
from meter import MLX
from report import GIB, finish, machine, show, spread, table
from shapes import TOWER
from step import nbytes

import mlx_dgemma
from mlx_dgemma.check.shapes import random_model, raw_config
from mlx_dgemma.model.patches import BUDGETS


def look(model, patches: mx.array, positions: mx.array) -> tuple[float, int]:
    """(seconds, peak bytes above the inputs and the weights)."""
    MLX.settle()
    MLX.reset()
    before = MLX.active()
    started = time.perf_counter()
    mx.eval(model.encode_images((patches, positions)))
    return time.perf_counter() - started, MLX.peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", "26b"], default="demo")
    parser.add_argument("--budget", type=int, choices=BUDGETS, default=280, help="soft tokens a picture")
    parser.add_argument("--count", type=int, nargs="+", default=[1, 4], help="pictures")
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    found = machine()
    if args.shape == "demo":
        model = mlx_dgemma.load().model
    else:  # one text layer will do: only the tower is timed
        model = random_model({**raw_config("26b", 1), "vision_config": TOWER}, mx.bfloat16, None)
    side = int(args.budget**0.5) * 3
    flops = look_flops(model.config.vision, side * side, model.config.text.hidden_size)
    weights = nbytes(model.model.encoder.vision_tower) + nbytes(model.model.encoder.embed_vision)
    limit = report(flops, {"tower": weights}, f"one picture of {side * side} patches")
    y, x = np.divmod(np.arange(side * side, dtype=np.int32), side)
    position = np.stack([x, y], axis=-1)
    results = []
    for count in args.count:
        patches = mx.random.uniform(shape=(count, side * side, 768), key=mx.random.key(0))
        positions = mx.array(np.repeat(position[None], count, axis=0))
        mx.eval(patches, positions, model.encode_images((patches[:1], positions[:1])))  # warm-up
        runs = [look(model, patches, positions) for _ in range(args.runs)]
        results.append(
            {
                "pictures": count,
                "tokens_each": side * side // 9,
                "seconds": spread([seconds for seconds, _ in runs], 4),
                "peak_over_inputs_gib": round(max(peak for _, peak in runs) / GIB, 3),
            }
        )
    table(
        ["pictures", "tokens each", "seconds: median (min-max)", "peak over inputs, GiB"],
        [[r["pictures"], r["tokens_each"], show(r["seconds"], 3), r["peak_over_inputs_gib"]] for r in results],
    )
    finish("look", **found, shape=args.shape, budget=args.budget, ceiling=limit, rows=results)


if __name__ == "__main__":
    main()
