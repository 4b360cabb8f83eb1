"""Token by token beside canvas by canvas: right answers and passes, and the time of a pass at any shape.

    python bench/causal.py quality                                    # the demo's 112 prompts in every mode
    python bench/causal.py quality --modes causal speculative --temperature 1 --seeds 0 1 2
    python bench/causal.py quality --modes speculative --costs h200  # drafts as long as pay on another machine
    python bench/causal.py quality --record FILE                     # goes on where an earlier run was ended
    python bench/causal.py auto --record FILE                        # what auto takes, and what that costs
    python bench/causal.py speed                                      # a small shape, for a CPU
    python bench/causal.py speed --shape 26b --recipe 4bit --prefix 1024 --rows 1 8       # a GPU
    python bench/causal.py speed --shape 26b --tokens 1 --traces no yes                   # what traces save

`speed` times what `TokenLoop` does for a token, the next pass under way before this one is read, and passes that
verify drafts. `auto` generates nothing: an answer of a mode that it takes is that mode's, which FILE has of `quality`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import peers
import quality
import score
from meter import settle
from report import finish, machine, on_cpu, show, spread, table
from shapes import add_arguments, from_arguments

import mlx_dgemma
from mlx_dgemma.check.shapes import random_prompt, raw_config
from mlx_dgemma.checkpoint.build import DTYPES, choose_kernels, suit_device
from mlx_dgemma.decoding.costs import Costs, pass_cost, reckoned
from mlx_dgemma.decoding.events import Stats
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.tasks.answer import answer
from mlx_dgemma.tasks.mode import SETTLED, Kind, choose_mode

MODES: dict[str, dict] = {
    "default": {},
    "exact": {"exact": True},
    "fast": {"fast": True},
    **{mode: {"mode": mode} for mode in ("causal", "speculative", "auto")},
}
FIGURES = "answers right tokens steps positions passes verified drafted accepted cost seconds".split()
MACHINES = ("reckoned", "h200", "h200-4bit", "metal")
METAL_BALANCE = 10  # as `costs.balance` has it for Metal
RIGID = ("extract", "code", "sudoku", "edit")


def costs_of(name: str, model: DiffusionGemma) -> Costs:
    """What passes cost: reckoned for this model or for the release on Metal, or milliseconds of the release's shape on
    a GPU (RESULTS.md)."""
    if name == "reckoned":
        return reckoned(model.config.text)
    if name == "metal":
        text = ModelConfig.from_dict(raw_config("26b")).text
        known = {count: pass_cost(text, count, METAL_BALANCE) for count in (5, 9, 17, 33, 65, 128, 256)}
        return Costs(1.0, known, known, known)
    one, others = (19.8, {16: 27.2, 64: 33.5, 256: 50.5}) if name == "h200" else (18.5, {16: 39.8, 64: 41.0, 256: 58.5})
    return Costs(one, others, others, {64: others[64], 256: others[256]}, measured=True)


def answers(args: argparse.Namespace) -> dict[str, dict]:
    """By mode and family, sums over all prompts and seeds; a line is printed for each family, and kept in a file."""
    engine, found = mlx_dgemma.load(args.model), {}
    costs, known = costs_of(args.costs, engine.model), recorded(args.record)
    engine.costs = lambda: costs
    families = [one for one in quality.TEXT if not args.families or one.__name__ in args.families]
    for mode in args.modes:
        by_family = found[mode] = defaultdict(lambda: dict.fromkeys(FIGURES, 0))
        for seed in args.seeds:
            for family in families:
                key = [mode, seed, family.__name__, args.per_family, args.temperature, args.costs, args.model]
                if (figures := known.get(json.dumps(key))) is None:
                    figures = of_family(engine, mode, family, seed, costs, args)
                    if args.record:
                        with args.record.open("a") as file:
                            file.write(json.dumps({"key": key, **figures}) + "\n")
                    print(*key[:3], {name: round(value, 1) for name, value in figures.items()}, flush=True)
                for one in (family.__name__, "all", *(["rigid"] if family.__name__ in RIGID else [])):
                    for name in FIGURES:
                        by_family[one][name] += figures[name]
    return found


def recorded(path: Path | None) -> dict[str, dict]:
    """What `answers` wrote, by its keys; a last line that was cut is left out."""
    found = {}
    for line in path.read_text().splitlines() if path and path.exists() else ():
        with suppress(ValueError):
            figures = json.loads(line)
            found[json.dumps(figures.pop("key"))] = figures
    return found


def of_family(
    engine: mlx_dgemma.Engine, mode: str, family: Callable, seed: int, costs: Costs, args: argparse.Namespace
) -> dict[str, float]:
    """Sums over the prompts of a family."""
    options, sums = dict(MODES[mode]), dict.fromkeys(FIGURES, 0.0)
    if mode in ("causal", "speculative"):
        options["temperature"] = args.temperature
    for case in quality.cases([family], args.per_family, seed):
        thinking, tools = case["enable_thinking"], case["tools"]
        started = time.perf_counter()
        r = engine.generate(case["messages"], seed=seed, thinking=thinking, tools=tools, **options)
        marked = r.text if not r.tool_calls else engine.tokenizer.decode(r.tokens)
        stats = r.stats
        seen = {
            "answers": 1, "right": score.right(case, marked), "tokens": stats.generated_tokens,
            "steps": stats.denoising_steps, "positions": stats.canvas_positions, "passes": stats.causal_passes,
            "verified": stats.verify_passes, "drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens,
            "cost": cost_of(stats, costs), "seconds": time.perf_counter() - started,
        }  # fmt: skip
        for name, value in seen.items():
            sums[name] += value
    return sums


def auto(args: argparse.Namespace) -> list[list]:
    """What `auto` takes for the prompts of each family by the costs of several machines: right answers and time beside
    those of every mode, and of the fastest one."""
    engine, known, rows = mlx_dgemma.load(args.model), recorded(args.record), []
    sums: dict[tuple[str, int, str], dict] = {}
    for key, figures in known.items():
        mode, seed, family, *rest = json.loads(key)
        if rest == [args.per_family, args.temperature, "reckoned", args.model]:
            sums[mode, seed, family] = figures
    kinds = {"diffusion": "default", "causal": "causal", "speculative": "speculative"}
    pairs = [one[1:] for one in sums if all((kind, *one[1:]) in sums for kind in kinds.values())]
    for name in MACHINES:
        costs, taken = costs_of(name, engine.model), Counter()
        engine.builder.costs = lambda costs=costs: costs
        total = {kind: [0.0, 0.0] for kind in (*kinds, "auto", "fastest")}
        for seed, family in dict.fromkeys(pairs):
            case = quality.cases([getattr(quality.tasks, family)], 1, seed)[0]
            thinking, tools = case["enable_thinking"], case["tools"]
            request = answer(engine.builder, case["messages"], thinking=thinking, tools=tools, mode="auto", seed=0)
            by_kind = {kind: sums[of, seed, family] for kind, of in kinds.items()}
            times = {kind: time_of(one, costs) for kind, one in by_kind.items()}
            fastest = min(times, key=lambda kind: times[kind])
            taken[request.options.mode] += 1
            for kind, one in (*((kind, kind) for kind in kinds), ("auto", request.options.mode), ("fastest", fastest)):
                total[kind][0] += by_kind[one]["right"]
                total[kind][1] += times[one]
        count = sum(sums[("default", *one)]["answers"] for one in dict.fromkeys(pairs))
        took = ", ".join(f"{mode} {number}" for mode, number in taken.items())
        each = [f"{right:.0f}; {spent / max(count, 1):.1f}" for right, spent in total.values()]
        rows.append([name, f"{count:.0f}", took, *each])
    table(["costs", "answers", "families' modes", *(f"{kind}: right; time" for kind in total)], rows)
    print("\nwith the release's canvas of 256 tokens:")
    kinds_of_text = [Kind(tokens, text) for text in SETTLED for tokens in (16, 64, 256, 1024)]
    machines = {name: costs_of(name, engine.model) for name in MACHINES[1:]}
    taken_for = [
        [one.text, one.tokens, *(choose_mode(costs, one, 256).mode for costs in machines.values())]
        for one in kinds_of_text
    ]
    table(["text", "tokens", *machines], taken_for)
    return rows + taken_for


def time_of(sums: dict, costs: Costs) -> float:
    """What the passes and steps of answers take: those of a kind count by their mean."""
    verified, steps, found = sums["verified"], sums["steps"], (sums["passes"] - sums["verified"]) * costs.token
    if verified:
        found += verified * costs.verify_cost(1 + round(sums["drafted"] / verified))
    return found + (steps * costs.step_cost(round(sums["positions"] / steps)) if steps else 0.0)


def cost_of(stats: Stats, costs: Costs) -> float:
    """What the passes and drafts of a text cost, in passes over one token; those of a kind count by their mean."""
    if stats.mode not in ("causal", "speculative"):
        return 0.0
    found, verified, steps = stats.causal_passes - stats.verify_passes, stats.verify_passes, stats.denoising_steps
    if verified:
        found += verified * costs.verify_cost(1 + stats.drafted_tokens // verified) / costs.token
    return found + (steps * costs.draft_cost(stats.canvas_positions // steps) / costs.token if steps else 0.0)


def print_answers(found: dict[str, dict]) -> None:
    """A row for each family and mode."""
    rows = []
    for family in next(iter(found.values())):
        for mode, figures in found.items():
            one = figures[family]
            count = one["answers"]
            a_pass = f"{one['accepted'] / one['verified']:.1f}" if one["verified"] else ""
            sums = [f"{one[name] / count:.1f}" for name in ("tokens", "steps", "passes")]
            both = f"{(one['steps'] + one['passes']) / count:.1f}"
            cost = f"{one['cost'] / count:.1f}" if one["cost"] else ""
            right, seconds = f"{one['right']:.0f} of {count:.0f}", f"{one['seconds'] / count:.2f}"
            rows.append([family, mode, right, *sums, both, a_pass, cost, seconds])
    header = ["", "mode", "right", "tokens", "steps", "passes", "both", "accepted a verify pass", "cost", "seconds"]
    table(header, rows)


def trace(model: DiffusionGemma, wanted: bool) -> None:
    """Replay traces of passes over one token, or build every pass anew; on a CPU there are none."""
    model.token_pass = None
    if wanted and not on_cpu():
        model.trace_tokens()


def seconds_a_token(
    model: DiffusionGemma, prompt: mx.array, rows: int, length: int, runs: int, chunk: int | None
) -> tuple[list[float], list[float], tuple[float, int]]:
    """Seconds of a pass over so many tokens of each row and of their draws, at temperature 0; the host's before it
    waits, which are what it takes to build the graph and to hand it over; those of a row's prompt, and its peak bytes.

    Passes over one token overlap as in generation; of longer ones the host reads each.
    """
    prefixes = [model.new_prefix(capacity=prompt.shape[1] + 512) for _ in range(rows)]
    taken: list[float] = []
    host: list[float] = []
    begun = time.perf_counter()
    for prefix in prefixes:
        prefill(model, prefix, np.asarray(prompt), chunk)
        mx.eval(prefix.state)
    prefilled, peak = (time.perf_counter() - begun) / rows, mx.get_peak_memory()
    mx.reset_peak_memory()
    tokens, before = mx.zeros((rows, length), mx.int32), None
    for _ in range(runs + 4):
        started = time.perf_counter()
        hidden = model.encode_ahead(tokens, prefixes)
        drawn = mx.concatenate(
            [mx.argmax(model.logits(hidden[:, i : i + 16]), axis=-1) for i in range(0, length, 16)], axis=1
        ).astype(mx.int32)
        mx.async_eval(drawn, [prefix.state for prefix in prefixes])
        host.append(time.perf_counter() - started)
        mx.eval(before if length == 1 and before is not None else drawn)
        for prefix in prefixes:
            prefix.accept(1)
        before = tokens = drawn
        taken.append(time.perf_counter() - started)
    return taken[4:], host[4:], (prefilled, peak)


def speed(args: argparse.Namespace) -> list[dict]:
    raw, dtype, model = from_arguments(args)
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    found = []
    for prefix in args.prefix:
        prompt = random_prompt(raw, prefix)
        for rows in args.rows:
            for length, traces, chunk in product(args.tokens, args.traces, args.chunk):
                trace(model, traces == "yes")
                mx.reset_peak_memory()
                held = mx.get_active_memory()
                seconds, host, encoded = seconds_a_token(model, prompt, rows, length, args.runs * 8, chunk)
                taken, host = (spread([1000 * one for one in some]) for some in (seconds, host))
                found.append({"prefix": prefix, "rows": rows, "tokens": length, "ms": taken, "host_ms": host})
                found[-1].update(chunk=chunk, prefill_ms=1000 * encoded[0])
                found[-1]["prefill_gib"] = (encoded[1] - held) / 2**30
                found[-1]["token_gib"] = (mx.get_peak_memory() - held) / 2**30
                found[-1]["traced"] = model.token_pass is not None and model.token_pass.trusted
                settle()
        if args.mlx_lm:
            seconds = peers.mlx_lm_seconds(raw, DTYPES[dtype], args.recipe, prompt, args.runs * 8 + 4)
            taken = spread([1000 * one for one in seconds])
            found.append({"prefix": prefix, "rows": "mlx-lm, 1", "tokens": 1, "ms": taken})
            settle()
    body = [
        [one["prefix"], one["rows"], one["tokens"], "yes" if one.get("traced") else "no", show(one["ms"]),
         show(one.get("host_ms")), one.get("chunk") or "", f"{one.get('prefill_ms', 0):.0f}",
         f"{one.get('prefill_gib', 0):.2f}", f"{one.get('token_gib', 0):.2f}"]
        for one in found
    ]  # fmt: skip
    table(
        [
            "prefix",
            "rows",
            "tokens a row",
            "traced",
            "ms",
            "host's ms",
            "prompt's chunk",
            "prompt's ms",
            "its GiB above the weights",
            "tokens' GiB",
        ],
        body,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("quality")
    choices = commands.add_parser("auto")
    for each in (one, choices):
        each.add_argument("--model", help="folder or Hub id (default: the demo)")
        each.add_argument("--per-family", type=int, default=8)
        each.add_argument("--temperature", type=float, default=0.0)
        each.add_argument("--record", type=Path, required=each is choices, help="file of figures, a line a family")
    one.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--families", nargs="+", help="of prompts (default: all)")
    one.add_argument(
        "--costs", choices=["reckoned", "h200", "h200-4bit", "metal"], default="reckoned", help="of passes"
    )
    other = commands.add_parser("speed")
    add_arguments(other)
    other.add_argument("--mlx-lm", action="store_true", help="plain Gemma 4 of the same shape beside it, by mlx-lm")
    other.add_argument("--rows", type=int, nargs="+", default=[1])
    other.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256], help="of a row in a pass")
    other.add_argument("--chunk", type=int, nargs="+", default=[None], help="prompt tokens encoded at once")
    other.add_argument("--traces", choices=["no", "yes"], nargs="+", default=["yes"], help="of passes over one token")
    args = parser.parse_args()
    found = machine()
    if args.command == "quality":
        results = answers(args)
        print_answers(results)
    elif args.command == "auto":
        results = auto(args)
    else:
        results = speed(args)
    finish("causal", **found, results=results)


if __name__ == "__main__":
    main()
