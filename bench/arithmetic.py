"""Arithmetic by LoRA on the bundled model: data with worked steps, held-out problems, and the other families.

    python bench/arithmetic.py FOLDER        # makes train.jsonl, arithmetic.jsonl and others.jsonl
    mlx-dgemma tune FOLDER --output adapter ...        # the command is in RESULTS.md
    mlx-dgemma evaluate FOLDER/arithmetic.jsonl --adapter adapter
    mlx-dgemma evaluate FOLDER/others.jsonl --adapter adapter --metric bench/arithmetic.py:right

Problems are those of `tasks/` with two-digit numbers, worked digit by digit as its thinking family works sums. None
that is asked is learnt, in no family, nor its numbers the other way round. A part of the data are the other families,
so that they are not forgotten; theirs are drawn again, from a random number of their own.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import score
import tasks

OTHERS = [family for family in tasks.TEXT if family is not tasks.arithmetic]
# Rehearsed more are those that suffered most; tool declarations are long, and a batch is as long as its longest prompt.
SPECIAL = {"sort": 3, "spell": 3, "compare": 3, "thinking": 2, "sudoku": 2, "weather": 0.3}
WEIGHTS = [SPECIAL.get(family.__name__, 1) for family in OTHERS]


def right(record: dict, text: str) -> bool:
    """Whether an answer is right, by the families' own marks: a story has many right answers."""
    if record["task"] == "story":
        return score.right(record, text)
    expected = record["messages"][-1]
    calls = [{k: one["function"][k] for k in ("name", "arguments")} for one in expected.get("tool_calls", [])]
    return text.strip() == (expected.get("content") or "\n".join(map(json.dumps, calls)))


def worked(sign: str, x: int, y: int) -> str:
    """A sum as the thinking family works it; a difference in the same manner, borrowing before the tens."""
    if sign == "+":
        ones, carry = x % 10 + y % 10, x % 10 + y % 10 > 9
        told = f"Write {ones - 10}, carry 1." if carry else "No carry."
        tens = f"{x // 10} + {y // 10}{' + 1' if carry else ''} = {x // 10 + y // 10 + carry}"
        return f"Ones: {x % 10} + {y % 10} = {ones}. {told} Tens: {tens}."
    borrow = x % 10 < y % 10
    top, told = x % 10 + 10 * borrow, "Borrow 1." if borrow else "No borrow."
    left = x // 10 - borrow
    return f"Ones: {top} - {y % 10} = {top - y % 10}. {told} Tens: {left} - {y // 10} = {left - y // 10}."


def problem(r: random.Random, sums: float) -> tuple[str, int, int]:
    """Sign and numbers; a difference is never negative."""
    x, y = r.randint(10, 99), r.randint(10, 99)
    return ("+", x, y) if r.random() < sums else ("-", max(x, y), min(x, y))


def arithmetic(r: random.Random, sign: str, x: int, y: int) -> dict:
    """A record of a problem."""
    asked, result = f"{x} {sign} {y}", x + y if sign == "+" else x - y
    question = r.choice([f"What is {asked}?", f"Compute {asked}.", f"{asked} = ?"])
    answer = tasks.a(f"{asked} = {result}.", reasoning_content=worked(sign, x, y))
    return {"messages": [tasks.u(question), answer], "thinking": True, "task": "arithmetic"}


def other(r: random.Random, family) -> dict:
    """A record of another family."""
    made = family(r)
    record = {"messages": [], "task": family.__name__, "thinking": made.get("enable_thinking", False)}
    for message in made["messages"]:
        record["messages"].append({"reasoning_content" if k == "thinking" else k: v for k, v in message.items()})
    return record | ({"tools": made["tools"]} if "tools" in made else {})


def write(path: Path, records: list[dict]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=25000)
    parser.add_argument("--others", type=float, default=0.22, help="share of the other families")
    parser.add_argument("--asked", type=int, default=200, help="problems held out")
    parser.add_argument("--each", type=int, default=20, help="questions of each other family")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    asked, learnt = random.Random(2 * args.seed), random.Random(2 * args.seed + 1)
    held: dict[tuple, None] = {}
    while len(held) < args.asked:
        held[problem(asked, 0.5)] = None
    hidden = {f"{a} {sign} {b}" for sign, x, y in held for a, b in ((x, y), (y, x))}
    args.folder.mkdir(parents=True)
    write(args.folder / "arithmetic.jsonl", [arithmetic(asked, *one) for one in held])
    write(args.folder / "others.jsonl", [other(asked, family) for family in OTHERS for _ in range(args.each)])
    records = []
    while len(records) < args.samples:
        if learnt.random() < args.others:
            record = other(learnt, learnt.choices(OTHERS, WEIGHTS)[0])
        else:
            record = arithmetic(learnt, *problem(learnt, 0.45))  # differences are new to the model
        asks = re.search(r"\d+ [+-] \d+", record["messages"][0]["content"])  # the thinking family asks sums too
        if not asks or asks[0] not in hidden:
            records.append(record)
    write(args.folder / "train.jsonl", records)


if __name__ == "__main__":
    main()
