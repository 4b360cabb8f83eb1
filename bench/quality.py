"""How many answers are right, and how much is denoised for one: prompts with known answers.

    python bench/quality.py                                        # the bundled demo, the default mode
    python bench/quality.py --mode default exact fast --seeds 0 1 2
    python bench/quality.py --vision --per-family 30               # pictures and frames
    python bench/quality.py --set entropy_bound=0.2                # any generation option

Most families are easy: a step or two, nearly always right. Stories, sudokus and sorting tell samplers
apart; counting fails in every mode, the model's own weakness. They are reported apart. `tasks/` makes
the prompts and marks the answers; `compare.py quality` runs peers on the same ones.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from report import attempt, finish, machine, table

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import score
import tasks

import mlx_dgemma

TEXT = [family for family in tasks.TEXT if family.__name__ != "arithmetic"]  # the model's own weakness
HARD = ("story", "sudoku", "sort")
WEAK = ("count",)


def cases(families: list, per_family: int, seed: int) -> list[dict]:
    """Prompts with their last, expected turn taken off."""
    out = []
    for family in families:
        source = random.Random(f"{family.__name__}-{seed}")
        for _ in range(per_family):
            case = family(source)
            answer = case["messages"][-1]
            out.append(
                {
                    "task": family.__name__,
                    "messages": case["messages"][:-1],
                    "answer": answer.get("content", ""),
                    "thinking": answer.get("thinking"),
                    "tool_calls": answer.get("tool_calls"),
                    "tools": case.get("tools"),
                    "enable_thinking": case.get("enable_thinking", False),
                    "images": case.get("images", []),
                    "video": case.get("video"),
                }
            )
    return out


def ours(engine: mlx_dgemma.Engine, mode: str, changes: dict[str, Any]):
    """A function from (case, seed) to (answer with markers, positions denoised, steps)."""
    options = {**changes, **({} if mode == "default" else {mode: True})}

    def answer(case: dict, seed: int) -> tuple[str, int, int]:
        r = engine.generate(
            case["messages"],
            images=case["images"],
            video=case["video"],
            seed=seed,
            thinking=case["enable_thinking"],
            tools=case["tools"],
            **options,
        )
        marked = r.text if not r.tool_calls else engine.tokenizer.decode(r.tokens)
        return marked, r.stats.canvas_positions, r.stats.denoising_steps

    return answer


def run(answer, args: argparse.Namespace) -> dict:
    """Answer and mark all prompts of all seeds: groups of families, each with its figures over the seeds."""
    families = tasks.VISION if args.vision else TEXT
    names = [family.__name__ for family in families]
    counted = {name: [[0, 0, 0] for _ in args.seeds] for name in names}  # right, positions, steps
    started = time.perf_counter()
    for i, seed in enumerate(args.seeds):
        for case in cases(families, args.per_family, seed):
            text, positions, *steps = answer(case, seed)  # peers do not tell their steps
            counted[case["task"]][i][0] += score.right(case, text)
            counted[case["task"]][i][1] += positions
            counted[case["task"]][i][2] += sum(steps)
    seconds = time.perf_counter() - started
    easy = [name for name in names if name not in (*HARD, *WEAK)]
    hard = [name for name in names if name in HARD]
    groups = {name: [name] for name in easy}
    if not args.vision:
        groups.update({"easy": easy, **{name: [name] for name in hard}, "hard": hard, **{w: [w] for w in WEAK}})
    groups["all"] = names
    answers = args.per_family * len(names) * len(args.seeds)
    return {
        "groups": {
            group: _figures([counted[name] for name in members], args.per_family * len(members))
            for group, members in groups.items()
        },
        "seconds_an_answer": round(seconds / answers, 3),
    }


def _figures(families: list[list[list[int]]], prompts: int) -> dict:
    """Right answers, and positions and steps an answer, mean and extremes over the seeds."""
    seeds = list(zip(*families))
    right = [sum(one[0] for one in seed) for seed in seeds]
    positions = [sum(one[1] for one in seed) / prompts for seed in seeds]
    steps = [sum(one[2] for one in seed) / prompts for seed in seeds]
    return {"prompts": prompts, "right": _mean(right), "positions": _mean(positions), "steps": _mean(steps)}


def _mean(values: list[float]) -> dict:
    return {"mean": round(statistics.mean(values), 1), "min": round(min(values), 1), "max": round(max(values), 1)}


def print_results(results: dict[str, dict]) -> None:
    """A row for every group, columns for every runtime or mode; failures below."""
    done = {name: result for name, result in results.items() if "failure" not in result}
    if done:
        groups = next(iter(done.values()))["groups"]
        header = ["", "prompts", *(f"{name} {what}" for name in done for what in ("right", "positions", "steps"))]
        rows = []
        for group, figures in groups.items():
            row = [group, figures["prompts"]]
            for result in done.values():
                own = result["groups"][group]
                steps = _show(own["steps"], 1) if own["steps"]["max"] else None
                row += [_show(own["right"], 1), _show(own["positions"], 0), steps]
            rows.append(row)
        print("\na seed's right answers, positions denoised and steps an answer: mean (min-max) over seeds")
        table(header, rows)
        print("seconds an answer: " + ", ".join(f"{name} {one['seconds_an_answer']:.2f}" for name, one in done.items()))
    for name, result in results.items():
        if "failure" in result:
            print(f"{name} failed: {result['failure']}")


def _show(one: dict, digits: int) -> str:
    mean = f"{one['mean']:.{digits}f}"
    return mean if one["min"] == one["max"] else f"{mean} ({one['min']:.0f}-{one['max']:.0f})"


def setting(text: str) -> tuple[str, Any]:
    """name=value, the value in JSON or else a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is asked, for `quality.py` and `compare.py quality`."""
    parser.add_argument("--mode", choices=["default", "exact", "fast"], nargs="+", default=["default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of prompts and generation")
    parser.add_argument("--per-family", type=int, default=8)
    parser.add_argument("--vision", action="store_true", help="pictures and frames instead of text")
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=VALUE", help="generation options")


def run_ours(
    model: str | None, dtype: str | None, args: argparse.Namespace, compute_dtype: str | None = None
) -> dict[str, dict]:
    """Our runtime in every mode asked for."""
    engine = mlx_dgemma.load(model, dtype=dtype, compute_dtype=compute_dtype)
    return {mode: attempt(run, ours(engine, mode, dict(args.set)), args) for mode in args.mode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the demo)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--compute-dtype", help="of matrix products: float16")
    add_arguments(parser)
    args = parser.parse_args()
    found = machine()
    results = run_ours(args.model, args.dtype, args, args.compute_dtype)
    print_results(results)
    finish("quality", **found, model=args.model, seeds=args.seeds, settings=dict(args.set), results=results)


if __name__ == "__main__":
    main()
