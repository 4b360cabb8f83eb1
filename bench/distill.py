"""Distillation of the bundled demo from prompts alone, and its step at any shape.

    python bench/distill.py prompts FILE                       # prompts of tasks/, none of them one of quality.py's
    python bench/distill.py demo --output DIR                  # answer, train, quality.py's questions
    python bench/distill.py step --shape 26b --recipe 4bit --prefix 1024    # one step: time, memory (a GPU)

`demo` takes every option of `mlx-dgemma distill` behind `--`, such as `-- --steps 300 --certainty 1`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from meter import settle
from quality import HARD, TEXT, cases, ours, print_results, run
from report import GIB, finish, machine, spread, table
from shapes import add_arguments, from_arguments
from step import nbytes

import mlx_dgemma
from mlx_dgemma.adapters.deltas import add_denoising_adapter
from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import suit_device
from mlx_dgemma.tune.config import TrainerConfig
from mlx_dgemma.tune.quick.loss import Distillation, StateBatch
from mlx_dgemma.tune.trainer import Trainer

ASKED = {0: 8, 1: 8, 2: 8, 200: 100}  # seeds of quality.py, and questions a family, that prompts keep away from
TRIES = 200  # draws of a family that come to no new prompt: it has no more


def write_prompts(file: Path, count: int) -> int:
    """Write prompts, the families in turn as long as they have new ones; returns how many."""
    seen = {_key(one) for seed, number in ASKED.items() for one in cases(TEXT, number, seed)}
    sources, lines = {family: random.Random(f"prompts-{family.__name__}") for family in TEXT}, []
    while sources and len(lines) < count:
        for family, source in list(sources.items()):
            for _ in range(TRIES):
                case = family(source)
                case["messages"] = case["messages"][:-1]
                if (key := _key(case)) not in seen:
                    seen.add(key)
                    told = {"messages": case["messages"], "thinking": case.get("enable_thinking", False)}
                    lines.append(json.dumps({**told, **({"tools": case["tools"]} if "tools" in case else {})}))
                    break
            else:
                del sources[family]
    lines = lines[:count]
    random.Random(0).shuffle(lines)
    file.write_text("\n".join(lines) + "\n")
    return len(lines)


def _key(case: dict) -> str:
    return json.dumps(case["messages"], sort_keys=True)


def demo(args: argparse.Namespace) -> None:
    """The whole way on the demo: prompts, distillation by the command line, right answers and positions."""
    found, results, seconds = machine(), {}, {}
    args.output.mkdir(parents=True, exist_ok=True)
    prompts, adapter = args.output / "prompts.jsonl", args.output / "adapter"
    print(f"{write_prompts(prompts, args.count)} prompts", flush=True)
    command = [sys.executable, "-m", "mlx_dgemma", "distill", str(prompts), "--output", str(adapter), *args.options]
    if (adapter / "state.safetensors").exists():
        command.append("--resume")
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds["distill"] = round(time.perf_counter() - started, 1)
    for name, path in (("before", None), ("after", adapter)):
        engine, started = mlx_dgemma.load(adapter=path), time.perf_counter()
        for mode in args.mode:
            results[f"{mode} {name}"] = run(ours(engine, mode, {}), args)
        seconds[name] = round(time.perf_counter() - started, 1)
        print_results(results)
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    report = json.loads((adapter / "report.json").read_text())
    finish("distill", **found, options=args.options, seconds=seconds, report=report, results=results, hard=HARD)


def step(args: argparse.Namespace) -> None:
    """Time and memory of one step on states of random tokens, a quarter of which keep the model as it is."""
    found = machine()
    raw, dtype, model = from_arguments(args)
    suit_device(model)
    mx.eval(model.parameters())
    weights, made = nbytes(model), []
    method = TrainerConfig(recompute=not args.keep, steps=1000)
    add_denoising_adapter(model, lambda: made.append(Trainer(model, method, Distillation())))
    print(f"shape {args.shape}, {args.recipe or dtype}, weights {weights / GIB:.3f} GiB, {made[0].trainable:,} trained")
    canvas, width, rows = model.config.canvas_length, model.config.text.hidden_size, []
    for length in args.prefix:
        tokens = np.asarray(random_prompt(raw, args.batch * (length + canvas))).astype(np.int32).reshape(args.batch, -1)
        every, flags = np.ones(tokens.shape, bool), np.arange(args.batch) % 4 != 3
        conditioning = np.zeros((args.batch, canvas, width), np.float16)
        state = tokens[:, length:]
        batch = StateBatch(
            tokens[:, :length], every[:, :length], state, np.ones(args.batch, np.float32), state, every[:, length:],
            flags.astype(np.float32), flags, conditioning,
        )  # fmt: skip
        settle()
        mx.reset_peak_memory()
        told, seconds = [], []
        for _ in range(args.steps):
            began = time.perf_counter()
            told.append(made[0].update([batch]))
            seconds.append(time.perf_counter() - began)
        peak = (mx.get_peak_memory() - weights) / GIB
        rows.append([length, *(spread(seconds[2:], 3)[name] for name in ("median", "min", "max")), seconds[0], peak])
        print(f"prefix {length}: loss {told[0].total:.3f} at first, {told[-1].total:.3f} after {args.steps} steps")
    table(["prefix", "s a step", "least", "most", "the first", "GiB above weights"], rows)
    finish("distill step", **found, config=raw, recipe=args.recipe, dtype=dtype, method=vars(method), rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("prompts")
    one.add_argument("file", type=Path)
    one.add_argument("--count", type=int, default=2500)
    one = verbs.add_parser("demo")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--count", type=int, default=2500)
    one.add_argument("--mode", choices=["default", "fast"], nargs="+", default=["default"])
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of questions and generation")
    one.add_argument("--per-family", type=int, default=8)
    one.add_argument("options", nargs="*", help="of mlx-dgemma distill, behind --")
    one = verbs.add_parser("step")
    add_arguments(one)
    one.add_argument("--batch", type=int, default=1, help="samples of a step")
    one.add_argument("--keep", action="store_true", help="keep activations instead of computing them again")
    args = parser.parse_args()
    if args.verb == "prompts":
        print(f"{write_prompts(args.file, args.count)} prompts")
    elif args.verb == "demo":
        demo(argparse.Namespace(**vars(args), vision=False))
    else:
        step(args)


if __name__ == "__main__":
    main()
