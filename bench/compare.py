"""Ours beside mlx-vlm and Transformers, in one run.

    python bench/compare.py step                                           # a small shape, for a CPU
    python bench/compare.py step --shape 26b --prefix 1024 8192 --mode default exact --transformers
    python bench/compare.py quality --checkpoint PATH --mode default exact fast --seeds 0 1 2

`step`: the same random weights in ours and mlx-vlm (its entropy-bound loop, as the checkpoint asks for), in
turn and in alternating order; Transformers with its own of the same shape afterwards, when MLX has let go of
its memory. Its loop runs in its own generate. Memory is the allocator's peak above weights and KV.
`quality`: the same prompts through each, from one checkpoint in Hugging Face's layout, in float32; mlx-vlm
with its default sampler. Ratios are ours over the peer's: below 1 ours is faster, smaller, does less.
A peer that fails, for want of memory too, is recorded with its message.
"""

import argparse

import mlx.core as mx
import quality
from meter import print_rows, settle, summary
from mlx.utils import tree_flatten
from peers import (
    mlx_vlm_answers,
    mlx_vlm_model,
    mlx_vlm_step,
    transformers_answers,
    transformers_model,
    transformers_step,
)
from report import GIB, attempt, finish, machine, ratio
from shapes import add_arguments, from_arguments
from step import ceilings, measure, nbytes

from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import choose_kernels, suit_device

PEERS = ("mlx-vlm", "transformers")


def in_turn(runners: dict, prompt: mx.array, args: argparse.Namespace) -> dict[str, dict]:
    """Every runtime's summary for a prompt: a warm-up each, then runs whose order turns round every time."""
    runs = {name: [attempt(runner, prompt, 3)] for name, runner in runners.items()}
    alive = [name for name in runners if "failure" not in runs[name][0]]
    for name in alive:
        runs[name].clear()
    for i in range(args.runs):
        for name in alive if i % 2 == 0 else alive[::-1]:
            runs[name].append(attempt(runners[name], prompt, args.steps))
            settle()
    return {name: summary(found) for name, found in runs.items()}


def mlx_steps(args: argparse.Namespace) -> tuple[dict, str, dict, dict[int, dict]]:
    """(config.json's content, dtype, ceilings, {prefix: {runtime: summary}}) of ours and mlx-vlm."""
    raw, dtype, model = from_arguments(args)
    print(f"shape {args.shape}, {args.recipe or dtype}, weights {nbytes(model) / GIB:.3f} GiB")
    limits = ceilings(model, args.prefix, dtype)
    weights = tree_flatten(model.parameters())
    loaded = attempt(lambda: {"model": mlx_vlm_model(raw, weights, args.recipe)})
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)

    def ours(mode: str):
        return lambda prompt, steps: measure(model, prompt, steps, mode)

    def peer(prompt: mx.array, steps: int) -> dict:
        return mlx_vlm_step(loaded["model"], prompt, steps) if "model" in loaded else loaded

    runners = {**{mode: ours(mode) for mode in args.mode}, "mlx-vlm": peer}
    rows = {length: in_turn(runners, random_prompt(raw, length), args) for length in args.prefix}
    return raw, dtype, limits, rows


def transformers_steps(raw: dict, dtype: str, args: argparse.Namespace) -> dict[int, dict]:
    """{prefix: summary} of Transformers."""
    settle()
    loaded = attempt(lambda: {"model": transformers_model(raw, dtype)})

    def peer(prompt: mx.array, steps: int) -> dict:
        return transformers_step(loaded["model"], prompt, steps) if "model" in loaded else loaded

    prompts = {length: random_prompt(raw, length) for length in args.prefix}
    return {length: in_turn({"peer": peer}, prompt, args)["peer"] for length, prompt in prompts.items()}


def step_ratios(row: dict, peer: dict) -> dict:
    """Ours over the peer's, in time and memory."""
    found = {name: ratio(row[name]["median"], peer[name]["median"]) for name in ("step_ms", "prefill_ms")}
    return {
        **found,
        **{name: ratio(row[name], peer[name]) for name in ("prefill_peak_gib", "step_peak_gib", "peak_gib")},
    }


def step(args: argparse.Namespace) -> None:
    """Compare a step's time and memory."""
    found = machine("mlx-vlm", *(["transformers", "torch"] if args.transformers else []))
    if args.transformers and args.recipe:
        print("Transformers runs unquantized beside the recipe.")
    raw, dtype, limits, rows = mlx_steps(args)
    if args.transformers:
        for length, one in transformers_steps(raw, dtype, args).items():
            rows[length]["transformers"] = one
    results = []
    for length, row in rows.items():
        print_rows(length, row)
        ratios = {
            f"{mode}/{peer}": step_ratios(row[mode], row[peer])
            for mode in args.mode
            for peer in PEERS
            if "step_ms" in row[mode] and "step_ms" in row.get(peer, {})
        }
        for pair, one in ratios.items():
            print(f"{pair}: " + ", ".join(f"{name} {value}" for name, value in one.items() if value is not None))
        results.append({"prefix": length, "ceiling": limits[length], "runtimes": row, "ratios": ratios})
    finish("compare step", **found, config=raw, recipe=args.recipe, dtype=dtype, rows=results)


def compare_quality(args: argparse.Namespace) -> None:
    """Compare right answers and positions denoised an answer."""
    found = machine("mlx-vlm", "transformers", *(["torch"] if args.transformers else []))
    results = quality.run_ours(args.checkpoint, "float32", args)
    peers = {} if args.vision else {"mlx-vlm": mlx_vlm_answers}
    if args.transformers:
        peers["transformers"] = transformers_answers
    for name, load in peers.items():
        results[name] = attempt(lambda load=load: quality.run(load(args.checkpoint), args))
    quality.print_results(results)
    ratios = {
        f"{mode}/{peer}": {
            group: ratio(figures["positions"]["mean"], results[peer]["groups"][group]["positions"]["mean"])
            for group, figures in results[mode]["groups"].items()
            if group in ("easy", "hard", "count", "all")
        }
        for mode in args.mode
        for peer in peers
        if "groups" in results[mode] and "groups" in results[peer]
    }
    for pair, one in ratios.items():
        print(f"{pair}, positions: " + ", ".join(f"{group} {value}" for group, value in one.items()))
    finish("compare quality", **found, seeds=args.seeds, settings=dict(args.set), results=results, ratios=ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run, add in (("step", step, add_arguments), ("quality", compare_quality, quality.add_arguments)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        add(command)
        command.add_argument("--transformers", action="store_true", help="Transformers too (needs torch)")
        if name == "quality":
            command.add_argument("--checkpoint", required=True, help="a folder in Hugging Face's layout")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
