"""Time and memory of one training step, at any shape.

    python bench/tune.py                                             # a small shape, for a CPU
    python bench/tune.py --shape 26b --recipe 4bit --prefix 1024     # a GPU

Weights and tokens are random. A step is what `tune.trainer` does for one batch: encoder, the first pass of
self-conditioning (half of the samples take it), decoder, both losses, gradients, AdamW.
"""

import argparse
import time

import mlx.core as mx
import numpy as np
from meter import settle
from report import GIB, finish, machine, spread, table
from shapes import add_arguments, from_arguments
from step import nbytes

from mlx_dgemma.adapters.deltas import GROUPS
from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import suit_device
from mlx_dgemma.tune.config import KINDS, TrainerConfig
from mlx_dgemma.tune.objective import VARIANTS, Batch
from mlx_dgemma.tune.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--kind", choices=KINDS, default="lora")
    parser.add_argument("--targets", choices=[*GROUPS, "self-conditioning"], nargs="+", default=["attention", "mlp"])
    parser.add_argument("--batch", type=int, default=1, help="samples of a step")
    parser.add_argument("--keep", action="store_true", help="keep activations instead of computing them again")
    args = parser.parse_args()
    found = machine()
    raw, dtype, model = from_arguments(args)
    suit_device(model)
    mx.eval(model.parameters())
    weights = nbytes(model)
    method = TrainerConfig(kind=args.kind, targets=tuple(args.targets), recompute=not args.keep, steps=1000)
    trainer = Trainer(model, method, VARIANTS["google"])
    print(f"shape {args.shape}, {args.recipe or dtype}, weights {weights / GIB:.3f} GiB, {trainer.trainable:,} trained")
    canvas, rows = model.config.canvas_length, []
    for length in args.prefix:
        tokens = np.asarray(random_prompt(raw, args.batch * (length + canvas))).astype(np.int32).reshape(args.batch, -1)
        every = np.ones(tokens.shape, bool)
        batch = Batch(tokens[:, :length], every[:, :length], tokens[:, length:], every[:, length:])
        settle()
        mx.reset_peak_memory()
        told, seconds = [], []
        for _ in range(args.steps):
            began = time.perf_counter()
            told.append(trainer.update([batch]))
            seconds.append(time.perf_counter() - began)
        peak = (mx.get_peak_memory() - weights) / GIB
        rows.append([length, *(spread(seconds[2:], 3)[name] for name in ("median", "min", "max")), seconds[0], peak])
        print(f"prefix {length}: loss {told[0].total:.3f} at first, {told[-1].total:.3f} after {args.steps} steps")
    table(["prefix", "s a step", "least", "most", "the first", "GiB above weights"], rows)
    finish("tune", **found, config=raw, recipe=args.recipe, dtype=dtype, method=vars(method), rows=rows)


if __name__ == "__main__":
    main()
