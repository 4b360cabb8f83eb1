"""How often `choose` is right, in one denoising step, beside reading a generated answer.

    python bench/choose.py                                  # the bundled demo, 60 prompts a family
    python bench/choose.py --family compare --per-family 200 --seeds 0 1 2

Prompts with known answers from `tasks/`; the labels are what could be an answer. `choose` reads them without a
template, calibrated, and with one; of a generated answer the label counts that it names first. `names a label` is
the largest probability that the labels have together at a position, `and none` that of labels which cannot be
the answer: between the two lies the bound of its warning.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from report import finish, machine, show, spread, table

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import tasks

import mlx_dgemma
from mlx_dgemma.tasks import choose

FAMILIES = ("compare", "capital", "v_one", "v_count", "v_two", "v_video")
WRONG = ["yes", "perhaps", "seventeen", "Bogota"]  # in no answer
WAYS = ("choose", "calibrated", "template", "generated")
MASSES = 20  # prompts of a family whose labels' joint probability is told


class Case(NamedTuple):
    """A prompt, its labels, the right one, and how its answer goes."""

    messages: list[dict]
    media: dict[str, Any]
    labels: list[str]
    truth: str
    template: str


def cases(family: str, count: int, seed: int) -> list[Case]:
    """Prompts of a family that no other seed has."""
    source = random.Random(f"choose-{family}-{seed}")
    return [_case(family, getattr(tasks, family)(source)) for _ in range(count)]


def _case(family: str, made: dict) -> Case:
    *messages, answer = made["messages"]
    answer, asked = answer["content"], messages[-1]["content"]
    asked = asked if isinstance(asked, str) else asked[-1]["text"]
    labels = _labels(family, asked, answer)
    truth = found(answer, labels)
    assert truth is not None
    media = {"images": made.get("images", []), "video": made.get("video")}
    head, _, tail = answer.partition(truth)
    if family == "compare":
        tail = " is larger"  # what follows names the other label
    if family == "v_count":
        head, tail = "There are ", ""  # "is" would tell
    return Case(messages, media, labels, truth, head + "{}" + tail)


def _labels(family: str, asked: str, answer: str) -> list[str]:
    colors, shapes = list(tasks.COLORS), tasks.SHAPES
    if family == "compare":
        return re.findall(r"\d+", asked)
    if family == "capital":
        labels = list(tasks.CAPITALS if "which country" in asked else tasks.CAPITALS.values())
        return [label.upper() for label in labels] if answer.isupper() else labels
    if family == "v_one":
        if "color" in asked:
            return colors
        return shapes if "shape" in asked else [f"{color} {shape}" for color in colors for shape in shapes]
    if family == "v_count":
        return list("1234")
    if family == "v_video":
        return ["right", "left", "up", "down"]
    things = [tasks.art(f"{color} {shape}") for color in colors for shape in shapes]
    relations = ("to the left of", "above")
    pairs = [(one, other) for one in things for other in things if one.split()[1] != other.split()[1]]
    return [f"{one.capitalize()} {relation} {other}." for one, other in pairs for relation in relations]


def found(text: str, labels: list[str]) -> str | None:
    """The label that a text names first, the longest of those."""
    hits = [(m.start(), -len(one), one) for one in labels if (m := re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text))]
    return min(hits)[2] if hits else None


def best(probabilities: dict[str, float]) -> str:
    """The most probable label."""
    return max(probabilities, key=probabilities.__getitem__)


def ways(engine: mlx_dgemma.Engine, case: Case, seed: int) -> dict[str, Callable[[], str | None]]:
    """The ways to find a case's label, each to be called."""

    def read(**options) -> str:
        return best(engine.choose(case.messages, case.labels, **case.media, **options))

    return {
        "choose": read,
        "calibrated": lambda: read(calibrate=True),
        "template": lambda: read(answer=case.template),
        "generated": lambda: found(engine.generate(case.messages, **case.media, seed=seed).text, case.labels),
    }


def run(engine: mlx_dgemma.Engine, family: str, args: argparse.Namespace) -> dict:
    """A family's prompts in every way: how many are right, seconds each, and what the labels have together."""
    right: dict[str, int] = defaultdict(int)
    seconds: dict[str, list[float]] = defaultdict(list)
    asked = [(case, seed) for seed in args.seeds for case in cases(family, args.per_family, seed)]
    for case, seed in asked:
        for way, answer in ways(engine, case, seed).items():
            started = time.perf_counter()
            right[way] += answer() == case.truth
            seconds[way].append(time.perf_counter() - started)

    def together(case: Case, labels: list[str]) -> float:
        return choose.choose(engine.model, engine.builder, case.messages, labels, **case.media).named[""]

    return {
        "prompts": len(asked),
        "right": dict(right),
        "seconds": {way: spread(times, 3) for way, times in seconds.items()},
        "named": spread([together(case, case.labels) for case, _ in asked[:MASSES]], 4),
        "none": spread([together(case, WRONG) for case, _ in asked[:MASSES]], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: the demo)")
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=FAMILIES)
    parser.add_argument("--per-family", type=int, default=60, help="prompts of a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of prompts and generation")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of labels that are no answer
    found_machine = machine()
    engine = mlx_dgemma.load(args.model)
    results = {family: run(engine, family, args) for family in args.family}
    print("\nright answers of a family's prompts")
    table(
        ["", "prompts", *WAYS, "names a label", "and none"],
        [
            [
                family,
                one["prompts"],
                *(one["right"][way] for way in WAYS),
                show(one["named"], 3),
                show(one["none"], 4),
            ]
            for family, one in results.items()
        ],
    )
    print("\nseconds a prompt: median (min-max)")
    table(["", *WAYS], [[name, *(show(one["seconds"][way], 3) for way in WAYS)] for name, one in results.items()])
    total = sum(one["prompts"] for one in results.values())
    share = {way: sum(one["right"][way] for one in results.values()) / total for way in WAYS}
    print("in all: " + ", ".join(f"{way} {value:.1%}" for way, value in share.items()))
    finish("choose", **found_machine, model=args.model, seeds=args.seeds, results=results)


if __name__ == "__main__":
    main()
