"""Time and memory of one denoising step, at any shape.

    python bench/step.py                                   # a small shape, for a CPU
    python bench/step.py --shape 26b --recipe 4bit --prefix 1024 8192 --mode default exact      # a GPU
    python bench/step.py --shape 26b --layers 6 --vocab 65536 --canvas 128

A step is everything between two canvases: forward, head, temperature, argmax, entropy, acceptance,
sample, noise, stop rule, self-conditioning. Weights are random, so the stop rule is never met. What a
mode saves by leaving settled positions out does not show here, because none settles. `compare.py step`
times peers beside it. `--trace off on` times steps whose layers are built anew and steps that replay their traces.
"""

import argparse

import mlx.core as mx
import numpy as np
import traces
from ceiling import report
from meter import Meter, print_rows, settle, summary
from mlx.utils import tree_flatten
from report import GIB, attempt, finish, machine
from shapes import add_arguments, from_arguments

from mlx_dgemma.check.paper import kv_bytes, step_flops
from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import DTYPES, choose_kernels, suit_device
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.model import device
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma


def measure(model: DiffusionGemma, prompt: mx.array, steps: int, mode: str = "default") -> dict:
    """One prefill and so many steps of a canvas that goes on: its last step has no next one to prepare."""
    changes = {} if mode == "exact" else {"certainty_threshold": 0.0, "patience": 0}
    if mode != "default":
        changes[mode] = True
    options = GenerationOptions(confidence_threshold=0.0, max_denoising_steps=steps + 1, canvas="full", **changes)
    meter = Meter()
    prefix = model.new_prefix(capacity=prompt.shape[1] + 2 * model.config.canvas_length)
    prefill(model, prefix, np.asarray(prompt), options.prefill_chunk)
    meter.prefilled(prefix.nbytes)
    for _ in denoise_block(model, prefix, options, mx.random.key(1)[None]):
        meter.stepped(prefix.nbytes)
        if len(meter.steps) == steps:
            break
    return meter.result()


def nbytes(model) -> int:
    """Bytes of a model's weights."""
    return sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def ceilings(model: DiffusionGemma, prefixes: list[int], dtype: str) -> dict:
    """Print and return what a step at least costs, for every prefix."""
    weights, size = nbytes(model), DTYPES[dtype].size
    return {
        length: report(
            step_flops(model.config, length),
            {"weights": weights, "KV": kv_bytes(model.config, length, size)},
            f"one step, canvas {model.config.canvas_length}, prefix {length}",
        )
        for length in prefixes
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--low-memory", action="store_true", help="as the command line's flag of this name")
    parser.add_argument("--trace", choices=traces.CHOICES, nargs="+", help=traces.HELP)
    args = parser.parse_args()
    found = machine()
    raw, dtype, model = from_arguments(args)
    weights = nbytes(model)
    print(f"shape {args.shape}, {args.recipe or dtype}, weights {weights / GIB:.3f} GiB")
    limits = ceilings(model, args.prefix, dtype)
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    model.low_memory = args.low_memory
    results = []
    for length in args.prefix:
        prompt = random_prompt(raw, length)
        rows = {}
        for mode, trace in ((mode, trace) for mode in args.mode for trace in args.trace or [None]):
            traces.use(model, trace)
            with device.wired_limit(model.low_memory):
                warm = attempt(measure, model, prompt, 3, mode)  # kernels, allocator
                count = 0 if "failure" in warm else args.runs
                runs = [attempt(measure, model, prompt, args.steps, mode) for _ in range(count)]
            rows[mode if trace is None else f"{mode}, traces {trace}"] = summary(runs or [warm])
            settle()
        print_rows(length, rows)
        passes = attempt(traces.compare, model, prompt) if args.trace else None
        if passes:
            print(passes["failure"] if "failure" in passes else traces.told(passes))
            settle()
        if floor := limits[length]["floor_ms"]:
            for mode, row in rows.items():
                if "step_ms" in row:
                    row["over_floor"] = round(row["step_ms"]["median"] / floor, 2)
                    print(f"{mode} takes {row['over_floor']:.2f} times the floor")
        results.append({"prefix": length, "ceiling": limits[length], "modes": rows, "passes": passes})
    finish(
        "step",
        **found,
        config=raw,
        recipe=args.recipe,
        dtype=dtype,
        weights=weights,
        low_memory=args.low_memory,
        rows=results,
    )


if __name__ == "__main__":
    main()
