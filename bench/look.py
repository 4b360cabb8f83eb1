"""Time and peak memory of looking at pictures, by their number.

    python bench/look.py --budget 280 --count 1 4          # the demo's tower
    python bench/look.py --shape 26b --budget 1120 --count 1 2 10      # the release's tower, a GPU

Weights and pictures are random. Prints a row per count and a last line of JSON.
"""

import argparse
import json
import time

import mlx.core as mx
import numpy as np
from step import random_model, raw_config

import mlx_dgemma
from mlx_dgemma.images import BUDGETS

TOWER = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 72, "position_embedding_size": 10240, "standardize": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", "26b"], default="demo")
    parser.add_argument("--budget", type=int, choices=BUDGETS, default=280, help="soft tokens a picture")
    parser.add_argument("--count", type=int, nargs="+", default=[1, 4], help="pictures")
    args = parser.parse_args()
    if args.shape == "demo":
        model = mlx_dgemma.load().model
    else:  # one text layer will do: only the tower is timed
        model = random_model({**raw_config("26b", 1), "vision_config": TOWER}, mx.bfloat16, None)
    side = int(args.budget**0.5) * 3
    y, x = np.divmod(np.arange(side * side, dtype=np.int32), side)
    position = np.stack([x, y], axis=-1)
    rows = []
    for count in args.count:
        patches = mx.random.uniform(shape=(count, side * side, 768), key=mx.random.key(0))
        positions = mx.array(np.repeat(position[None], count, axis=0))
        mx.eval(patches, positions, model.look((patches[:1], positions[:1])))  # warm-up
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        started = time.perf_counter()
        mx.eval(model.look((patches, positions)))
        row = {
            "pictures": count,
            "tokens_each": side * side // 9,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_over_inputs_gb": round((mx.get_peak_memory() - before) / 1e9, 3),
        }
        rows.append(row)
        print(*(f"{key} {value:>8}" for key, value in row.items()), sep="  ")
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"bench": "look", "device": device, "shape": args.shape, "budget": args.budget, "rows": rows}))


if __name__ == "__main__":
    main()
