"""What constraints, infill and edits get right on the bundled demo, and what they cost.

    python bench/control.py schema     # is every answer valid, and is it still right
    python bench/control.py regex
    python bench/control.py infill     # holes cut from answers, against going on to where the suffix begins
    python bench/control.py edit       # against answering anew
    python bench/control.py overhead   # of a constraint at a vocabulary of 262,144, random weights
    python bench/control.py overhead --full --count 12    # in the 26B shape, 4bit, on a GPU

Every failure is printed with what makes it happen again.
"""

import argparse
import json
import random
import re
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from quality import TEXT, cases, tasks
from report import finish, machine, spread, table

import mlx_dgemma
from mlx_dgemma.check.shapes import random_model, random_prompt, raw_config
from mlx_dgemma.checkpoint.build import choose_kernels, suit_device
from mlx_dgemma.constraints.language import Language
from mlx_dgemma.constraints.patterns import python_regex_to_plain
from mlx_dgemma.constraints.schema import translate
from mlx_dgemma.constraints.search import Marginals, best_text
from mlx_dgemma.constraints.tokens import TokenBytes
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.tasks.constrained import Constrained
from mlx_dgemma.tasks.infill import HoleContext

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
from constraints import PATTERNS, PERSON, SCHEMAS, TEN, Pieces, determined, hole

WAYS: dict[str, dict[str, Any]] = {"default": {}, "one step": {"max_denoising_steps": 1}, "fast": {"fast": True}}
FAILURES: list[dict] = []


def fail(what: str, **case: Any) -> None:
    """Print and keep a case to be repaired."""
    FAILURES.append({"what": what, **case})
    print(f"FAILURE {what}: {json.dumps(case, ensure_ascii=False)}", flush=True)


def tried(known: dict, call: Callable, *given: Any, **arguments: Any) -> Any:
    """What a call returns; None where it raises, which is a failure of the case that is `known`."""
    try:
        return call(*given, **arguments)
    except Exception as error:
        return fail(f"raised {type(error).__name__}", error=str(error)[:300], **known)


def mixed(count: int) -> list[dict]:
    """Prompts of all families in turn."""
    return [one for turn in zip(*(cases([f], -(-count // len(TEXT)), 0) for f in TEXT)) for one in turn][:count]


def of(family: Callable, count: int) -> list[dict]:
    """Prompts of one family, the request of each as a text."""
    return [{**case, "prompt": case["messages"][-1]["content"]} for case in cases([family], count, 0)]


def share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else "-"


def read(text: str) -> Any:
    """The value of a JSON text, or an error."""
    try:
        return json.loads(text)
    except ValueError as error:
        return error


def schema(engine: mlx_dgemma.Engine, count: int) -> list[list]:
    """Validity over many schemas, and right answers in the one that the model knows."""
    from jsonschema import Draft202012Validator, FormatChecker

    checks = [Draft202012Validator(one, format_checker=FormatChecker()) for one in SCHEMAS.values()]
    names, valid, plain = list(SCHEMAS), Counter(), 0
    for seed, case in enumerate(mixed(count)):
        which = (seed + seed // len(TEXT)) % len(names)
        asked = {"prompt": case["messages"], "seed": seed, "thinking": case["enable_thinking"]}
        plain += checks[which].is_valid(read(engine.generate(**asked).text))
        for way, changes in WAYS.items():
            known = {"way": way, "schema": names[which], **asked}
            r = tried(known, engine.generate, **asked, **changes, schema=SCHEMAS[names[which]])
            value = read(r.text) if r else None
            problem = str(value) if isinstance(value, ValueError) else next(checks[which].iter_errors(value), None)
            valid[way] += r is not None and problem is None
            if r and (problem or r.finish_reason != "stop"):
                fail("invalid", text=r.text, problem=str(problem)[:200], **known)
    found, positions = Counter(), [0, 0]
    for seed, case in enumerate(asked := of(tasks.extract, count // 2)):
        both = [engine.generate(case["prompt"], seed=seed, **more) for more in ({}, {"schema": PERSON})]
        free, held = (read(r.text) == json.loads(case["answer"]) for r in both)
        found.update({"without": free, "with": held, "both": free and held})
        positions = [total + r.stats.canvas_positions for total, r in zip(positions, both)]
        if free and not held:
            fail("wrong only in the schema", seed=seed, prompt=case["prompt"], text=both[1].text)
    rows = [["valid without", share(plain, count)], *([f"valid, {way}", share(valid[way], count)] for way in WAYS)]
    rows += [[f"'extract' right {what}", share(found[what], len(asked))] for what in ("without", "with")]
    rows.append(["right with, of right without", share(found["both"], found["without"])])
    return [*rows, *([f"positions {what}", n / len(asked)] for what, n in zip(("without", "with"), positions))]


def regex(engine: mlx_dgemma.Engine, count: int) -> list[list]:
    """Whether the whole text matches, also in a step and with hardly room for it."""
    patterns, found = PATTERNS[:count], Counter()
    for seed, (pattern, case) in enumerate(zip(patterns, mixed(len(patterns)))):
        asked = {"prompt": case["messages"], "seed": seed, "regex": pattern}
        language = tried(asked, lambda pattern=pattern: engine.builder.language(python_regex_to_plain(pattern), "it"))
        least = int(language.distance[0]) + 1 if language else 1
        ways = {**WAYS, "least tokens": {"max_tokens": least}, "least + 2": {"max_tokens": least + 2}}
        for way, changes in ways.items():
            r = tried(asked, engine.generate, **asked, **changes)
            good = r is not None and r.finish_reason == "stop" and re.fullmatch(pattern, r.text) is not None
            found[way] += good
            if r and not good:
                fail("no match", text=r.text, reason=r.finish_reason, changes=changes, **asked)
    return [[f"matches, {way}", share(good, len(patterns))] for way, good in found.items()]


def infill(engine: mlx_dgemma.Engine, count: int) -> list[list]:
    """Holes recovered exactly, those that their surroundings determine apart."""
    source, tally, kinds, seconds, positions = random.Random(0), Counter(), Counter(), [], []
    for i, case in enumerate(of(tasks.code, count // 2) + of(tasks.story, count // 2)):
        answer, (start, stop) = case["answer"], hole(source, case["answer"], inside=i % 3 == 0)
        prefix, cut, suffix = answer[:start], answer[start:stop], answer[stop:]
        asked = {"prefix": prefix, "suffix": suffix, "prompt": case["prompt"], "seed": 0}
        began = time.perf_counter()
        r = tried(asked, engine.infill, **asked)
        seconds, positions = [*seconds, time.perf_counter() - began], [*positions, r.stats.canvas_positions if r else 0]
        going, anew = engine.infill(**{**asked, "suffix": ""}).text, engine.generate(case["prompt"], seed=0).text
        good, other = r is not None and r.text == cut, until(going, suffix) == cut
        third = until(anew[len(prefix) :], suffix) == cut
        fixed = determined(case, start, stop)
        groups = ["all", case["task"]] + fixed * ["determined", f"determined {case['task']}"]
        for group in groups + fixed * (i % 3 == 0) * ["determined, cut in a word"]:
            tally.update({(group, "n"): 1, (group, "ours"): good, (group, "other"): other, (group, "third"): third})
        if r and not good:
            context = HoleContext.of(engine.tokenizer, prefix, suffix)
            right = len(engine.tokenizer.encode(context.tail + cut + context.head, add_special_tokens=False))
            told = tried(asked, engine.infill, length=right, **asked)
            kind = "too long" if len(r.tokens) > right else "too short" if len(r.tokens) < right else "wrong word"
            kind += ", determined" if fixed else ", open"
            kinds.update({kind: 1, f"{kind}, right if told the length": int(told is not None and told.text == cut)})
            fail(kind, cut=cut, text=r.text, length=len(r.tokens), right=right, told=told and told.text, **asked)
    rows = [["holes", "infill", "going on", "answering anew"]]
    rows += [
        [g, *(share(tally[g, who], tally[g, "n"]) for who in ("ours", "other", "third"))] for g, w in tally if w == "n"
    ]
    rows += [[kind, n, "", ""] for kind, n in sorted(kinds.items())]
    for what, one in (("seconds", spread(seconds)), ("positions", spread(positions, 0))):
        rows.append([f"{what} a hole: median, most", one["median"], one["max"], ""])
    return rows


def until(text: str, suffix: str) -> str:
    """A text before where a suffix, or at least its first characters, begins."""
    at = text.find(suffix) if suffix in text else text.find(suffix[:8])
    return text[:at] if at >= 0 else text


def edit(engine: mlx_dgemma.Engine, count: int) -> list[list]:
    """Right edits and what they cost, by strength; answering anew for comparison."""
    ways: dict[str, dict] = {"anew": {}, "anew, exact": {"exact": True}}
    ways.update({f"strength {strength}": {"strength": strength} for strength in (0, 0.25, 0.5, 0.75, 1)})
    rows = [["", "right", "positions", "steps", "words kept that should be"]]
    for way, changes in ways.items():
        sums = np.zeros(5)
        for seed, case in enumerate(of(tasks.edit, count)):
            instruction, _, text = case["prompt"].partition(": ")
            asked = {"text": text, "instruction": instruction} if "strength" in changes else {"prompt": case["prompt"]}
            r = tried(asked, engine.edit if "text" in asked else engine.generate, seed=seed, **asked, **changes)
            if r:
                words = zip(text.split(), case["answer"].split(), [*r.text.split(), *[""] * 99])
                same = [old == new for old, wanted, new in words if old == wanted]
                wrong, stats = r.text != case["answer"], r.stats
                sums += [not wrong, stats.canvas_positions, stats.denoising_steps, sum(same), len(same)]
                if wrong:
                    fail("wrong edit", way=way, seed=seed, answer=r.text, **asked)
        rows.append([way, share(int(sums[0]), count), *(sums[1:3] / count).tolist(), share(*map(int, sums[3:]))])
    return rows


def search(language: Language, count: int) -> list[tuple[str, list[float]]]:
    """Seconds of the search for the best text, of arrays as a step has them."""
    draws, found = np.random.default_rng(0), []
    ends = np.log(draws.dirichlet(np.ones(2), 256))[:, :1].astype(np.float32)
    anchors = np.log(draws.dirichlet(np.ones(len(language.always_scored_tokens) + 1000), 256))[:, :-1000]
    anchors, text = anchors.astype(np.float32), np.zeros(256, np.int32)
    for what, probabilities in (
        ("diffuse", [0.9 / 32] * 32),
        ("settled", [1 - 1e-5] + [1e-7] * 31),
        ("settled on a text of 100 tokens", [1 - 1e-5] + [1e-7] * 31),
    ):
        spent = []
        for _ in range(count):
            likely = draws.integers(3, 262144, (256, 32))
            if "text" in what:
                likely[:, 0], ends[:], ends[100] = text, -16, -1e-5
            log_p = np.log(np.broadcast_to(np.array(probabilities, np.float32), likely.shape))
            seen = Marginals(likely, log_p, likely[:, 0], log_p[:, 0], anchors, ends, ends[:, :0])
            for _ in range(2):
                began = time.perf_counter()
                best = best_text(language, seen, 0, [1], 512)
                spent.append(time.perf_counter() - began)
        if what == "diffuse":
            seen.end_log_p[100] = 999
            text = best_text(language, seen, 0, [1], 512)
            assert text[100] == 1, "the text ends there"
        found += [
            (f"canvas 256, {what}, {which}", some) for which, some in (("new", spent[::2]), ("known", spent[1::2]))
        ]
        assert "text" not in what or best[:101].tolist() == text[:101].tolist()
    return found


def overhead(_: None, count: int, full: bool = False) -> list[list]:
    """What a constraint of ten fields takes to make, and adds to a step, at a large vocabulary."""
    raw = raw_config("26b") if full else raw_config("small", 2, 512, 262144, 64)
    rows, made = [["", "seconds", "MiB kept", "MiB at most"]], []
    pieces, pattern = Pieces(262144), translate(TEN).expression
    makers = {"TokenBytes": lambda: TokenBytes(pieces, 262144), "Language": lambda: Language(pattern, made[0])}
    for what, make in makers.items():
        began = time.perf_counter()
        made.append(make())
        rows.append([what, round(time.perf_counter() - began, 2)])
        tracemalloc.start()  # which slows it down
        _ = make()
        rows[-1] += [held / 2**20 for held in tracemalloc.get_traced_memory()]
        tracemalloc.stop()
    language = made[1]
    rows.append([f"table, {len(language.distance)} states", "", language.table.nbytes / 2**20, ""])
    rows += [
        [f"best_text, canvas 256, {what}", spread(some, 4)["median"], "", ""] for what, some in search(language, count)
    ]
    never = {"patience": 0, "confidence_threshold": 0, "certainty_threshold": 0}  # settled
    options = GenerationOptions(max_denoising_steps=count + 2, **never)
    model = random_model(raw, mx.bfloat16, "4bit") if full else random_model(raw, mx.float32, None)
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for what in ("without", "with") * 2:
        guide = Constrained(language, [1]).guide(512) if what == "with" else None
        prefix = model.new_prefix(capacity=256)
        prefill(model, prefix, np.asarray(random_prompt(raw, 64)), None)
        steps = denoise_block(model, prefix, options, mx.random.key(1)[None], None, None, guide)
        for i in range(count + 1):
            began = time.perf_counter()
            next(steps)
            times[what] += [time.perf_counter() - began] * (i > 0)
    rows += [
        [f"step {w}, canvas {raw['canvas_length']}: {spread(some)}", spread(some, 3)["median"], "", ""]
        for w, some in times.items()
    ]
    return rows


COMMANDS = {"schema": (schema, 200), "regex": (regex, 999), "infill": (infill, 200), "edit": (edit, 112),
            "overhead": (overhead, 3)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, count) in COMMANDS.items():
        commands.add_parser(name).add_argument("--count", type=int, default=count, help="prompts, holes or steps")
    commands.choices["overhead"].add_argument("--full", action="store_true", help="the 26B shape in 4bit")
    args = parser.parse_args()
    found, function = machine(), COMMANDS[args.command][0]
    given = (None, args.count, args.full) if function is overhead else (mlx_dgemma.load(), args.count)
    rows = function(*given)
    print()
    table(rows[0], rows[1:])
    finish("control", command=args.command, **found, rows=rows, failures=FAILURES)


if __name__ == "__main__":
    main()
