"""Token by token beside canvas by canvas: right answers and passes, and the time of a pass at any shape.

    python bench/causal.py quality                                    # the demo's 112 prompts in every mode
    python bench/causal.py quality --temperature 1 --seeds 0 1 2
    python bench/causal.py speed                                      # a small shape, for a CPU
    python bench/causal.py speed --shape 26b --recipe 4bit --prefix 1024 --rows 1 8       # a GPU

`speed` times what `TokenLoop` does for a token, the next pass under way before this one is read, and passes that
verify drafts.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import mlx.core as mx
import numpy as np
import peers
import quality
import score
from meter import settle
from report import finish, machine, spread, table
from shapes import add_arguments, from_arguments

import mlx_dgemma
from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import DTYPES, choose_kernels, suit_device
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

MODES = ("diffusion", "causal", "speculative", "auto")
FIGURES = ("right", "tokens", "steps", "passes", "verified", "drafted", "accepted", "seconds")


def answers(args: argparse.Namespace) -> dict[str, dict]:
    """By mode and family, sums over all prompts and seeds."""
    engine, found = mlx_dgemma.load(args.model), {}
    for mode in args.modes:
        by_family = found[mode] = defaultdict(lambda: dict.fromkeys(FIGURES, 0))
        options = {"mode": mode}
        if mode in ("causal", "speculative"):
            options["temperature"] = args.temperature
        for seed in args.seeds:
            for case in quality.cases(quality.TEXT, args.per_family, seed):
                thinking, tools = case["enable_thinking"], case["tools"]
                started = time.perf_counter()
                r = engine.generate(case["messages"], seed=seed, thinking=thinking, tools=tools, **options)
                marked = r.text if not r.tool_calls else engine.tokenizer.decode(r.tokens)
                stats = r.stats
                seen = score.right(case, marked), stats.generated_tokens, stats.denoising_steps, stats.causal_passes
                seen += stats.verify_passes, stats.drafted_tokens, stats.accepted_tokens
                for one in (case["task"], "all"):
                    for name, value in zip(FIGURES, (*seen, time.perf_counter() - started)):
                        by_family[one][name] += value
    return found


def print_answers(found: dict[str, dict], prompts: int) -> None:
    """A row for each family and mode."""
    rows = []
    for family in next(iter(found.values())):
        for mode, figures in found.items():
            one = figures[family]
            count = prompts * (len(next(iter(found.values()))) - 1 if family == "all" else 1)
            a_pass = f"{one['accepted'] / one['verified']:.1f}" if one["verified"] else ""
            sums = [f"{one[name] / count:.1f}" for name in ("tokens", "steps", "passes")]
            rows.append([family, mode, f"{one['right']} of {count}", *sums, a_pass, f"{one['seconds'] / count:.2f}"])
    header = ["", "mode", "right", "tokens", "steps", "passes", "accepted a verify pass", "seconds"]
    table(header, rows)


def seconds_a_token(model: DiffusionGemma, prompt: mx.array, rows: int, length: int, runs: int) -> list[float]:
    """Seconds of a pass over so many tokens of each row and of their draws, at temperature 0.

    Passes over one token overlap as in generation; of longer ones the host reads each.
    """
    prefixes, taken = [model.new_prefix(capacity=prompt.shape[1] + 512) for _ in range(rows)], []
    for prefix in prefixes:
        prefill(model, prefix, np.asarray(prompt), None)
    tokens, before = mx.zeros((rows, length), mx.int32), None
    for _ in range(runs + 4):
        started = time.perf_counter()
        hidden = model.encode_ahead(tokens, prefixes)
        drawn = mx.concatenate(
            [mx.argmax(model.logits(hidden[:, i : i + 16]), axis=-1) for i in range(0, length, 16)], axis=1
        ).astype(mx.int32)
        mx.async_eval(drawn, [prefix.state for prefix in prefixes])
        mx.eval(before if length == 1 and before is not None else drawn)
        for prefix in prefixes:
            prefix.accept(1)
        before = tokens = drawn
        taken.append(time.perf_counter() - started)
    return taken[4:]


def speed(args: argparse.Namespace) -> list[dict]:
    raw, dtype, model = from_arguments(args)
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    found = []
    for prefix in args.prefix:
        prompt = random_prompt(raw, prefix)
        for rows in args.rows:
            for length in (1, 16, 64, 256):
                mx.reset_peak_memory()
                held = mx.get_active_memory()
                taken = spread([1000 * one for one in seconds_a_token(model, prompt, rows, length, args.runs * 8)])
                peak = (mx.get_peak_memory() - held) / 2**30
                found.append({"prefix": prefix, "rows": rows, "tokens": length, "ms": taken, "peak_gib": peak})
                settle()
        if args.mlx_lm:
            seconds = peers.mlx_lm_seconds(raw, DTYPES[dtype], args.recipe, prompt, args.runs * 8 + 4)
            taken = spread([1000 * one for one in seconds])
            found.append({"prefix": prefix, "rows": "mlx-lm, 1", "tokens": 1, "ms": taken, "peak_gib": None})
            settle()
    body = [
        [one["prefix"], one["rows"], one["tokens"], one["ms"]["median"], f"{one['peak_gib'] or 0:.2f}"] for one in found
    ]
    table(["prefix", "rows", "tokens a row", "ms", "GiB above the weights"], body)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("quality")
    one.add_argument("--model", help="folder or Hub id (default: the demo)")
    one.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--per-family", type=int, default=8)
    one.add_argument("--temperature", type=float, default=0.0)
    other = commands.add_parser("speed")
    add_arguments(other)
    other.add_argument("--mlx-lm", action="store_true", help="plain Gemma 4 of the same shape beside it, by mlx-lm")
    other.add_argument("--rows", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    found = machine()
    if args.command == "quality":
        results = answers(args)
        print_answers(results, args.per_family * len(args.seeds))
    else:
        results = speed(args)
    finish("causal", **found, results=results)


if __name__ == "__main__":
    main()
