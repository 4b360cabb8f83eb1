"""What drafts must not change: the text, its distribution, its form, and memory.

    python bench/drafts.py equal --recipes float32 bfloat16 8bit 4bit     # greedy and drawn, drafts of any length
    python bench/drafts.py frequencies --draws 20000                      # first token and bigram, chi-square
    python bench/drafts.py valid --prompts 200                            # ten schemas, and 100 patterns
    python bench/drafts.py memory --tokens 10000

All but `valid` take small models of random weights, whose next tokens are as uncertain as can be.
Each prints as it goes.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import quality
from constraints import PATTERNS, SCHEMAS
from report import finish, machine, table

import mlx_dgemma
from mlx_dgemma.check.shapes import random_model, raw_config
from mlx_dgemma.checkpoint.build import suit_device
from mlx_dgemma.decoding import speculative
from mlx_dgemma.decoding.causal import TokenLoop
from mlx_dgemma.decoding.costs import reckoned
from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.request import Request
from mlx_dgemma.decoding.session import PromptTokens, Session
from mlx_dgemma.model import device
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}


class Counting:
    """Takes so many tokens, at a cost that does not grow with them."""

    text, thinking, tool_calls, log_probs = "", "", (), ()

    def __init__(self, count: int):
        self.tokens: list[int] = []
        self.left, self.finish_reason = count, None

    def feed(self, tokens: list[int], log_probs: list[float]) -> str | None:
        """Take tokens; returns "length" with the last."""
        self.tokens += tokens
        self.left -= len(tokens)
        self.finish_reason = "length" if self.left <= 0 else None
        return self.finish_reason

    def cut(self, reason: str) -> None:
        """End here."""
        self.finish_reason = reason

    def take(self) -> tuple[str, str]:
        """No text: tokens are all that counts."""
        return "", ""


def generate(model: DiffusionGemma, asked: list[tuple[list[int], int, int]], mode: str, options: dict) -> list[list]:
    """Tokens of (prompt, count, seed) each, generated together."""
    loop, requests = Loop(model), []
    for prompt, count, seed in asked:
        known = GenerationOptions(mode=mode, end_tokens=(), **options)
        requests.append(Request(PromptTokens(list(prompt), list(prompt)), seed, known, Counting(count)))
        loop.add(requests[-1], Session(model))
    while loop.requests:
        for _, event in loop.step():
            if isinstance(event, Exception):
                raise event
    return [one.reader.tokens for one in requests]


def model_of(recipe: str, layers: int, vocab: int, hidden: int = 128) -> DiffusionGemma:
    raw = raw_config("small", layers=layers, hidden=hidden, vocab=vocab)
    dtype = mx.bfloat16 if recipe == "bfloat16" or (not device.on_cpu() and recipe != "float32") else mx.float32
    model = random_model(raw, dtype, None if recipe in ("float32", "bfloat16") else recipe)
    suit_device(model)
    return model


def draft_always(length: int) -> None:
    """Let every draft have so many tokens, where there are so many, whatever they cost."""
    speculative.Pace.length = property(lambda _: length)  # type: ignore[misc,method-assign]
    speculative.paying = lambda sure, *_: (min(len(sure), length), float(len(sure) > 0))


def equal(args: argparse.Namespace) -> list[list]:
    """Share of equal texts, and where the first difference is, for drafts of each length and for batches."""
    rows = []
    for recipe in args.recipes:
        model, random = model_of(recipe, 3, 512), np.random.default_rng(0)
        asked = [(random.integers(2, 500, 8 + 40 * i).tolist(), args.tokens, 5 + i) for i in range(4)]
        for name, options in (("greedy", GREEDY), ("drawn", DRAWN)):
            alone = [generate(model, [one], "causal", options)[0] for one in asked]
            for length in (1, 4, 16, 64):
                draft_always(length)
                texts = [generate(model, [one], "speculative", options)[0] for one in asked]
                texts += generate(model, asked, "speculative", options)
                same = [a == b for a, b in zip(texts, [*alone, *alone])]
                pairs = [zip(a, b) for a, b in zip(texts, [*alone, *alone])]
                first = min((i for pair in pairs for i, (a, b) in enumerate(pair) if a != b), default="")
                rows.append([recipe, name, length, f"{sum(same[:4])} of 4", f"{sum(same[4:])} of 4", first])
                print(*rows[-1], sep=" | ", flush=True)
    table(["", "", "draft", "alone", "batch of 4", "first difference"], rows)
    return rows


def frequencies(args: argparse.Namespace) -> list[list]:
    """Counts of first tokens and of the two first tokens, causal beside speculative, by seeds of their own."""
    model, prompt = model_of("float32", 2, 64), list(range(2, 14))
    held = Session(model)
    held.encode_all(PromptTokens(prompt[:-1], prompt[:-1]))
    counts: dict[str, list[Counter]] = {}
    for number, mode in enumerate(("causal", "speculative")):
        draft_always(4)
        firsts, pairs = counts[mode] = [Counter(), Counter()]
        options = GenerationOptions(mode=mode, end_tokens=(), temperature=1.0)
        for start in range(0, args.draws, 64):
            loop, requests = TokenLoop(model, 0.0, partial(reckoned, model.config.text)), []
            for seed in range(start, min(start + 64, args.draws)):
                given = PromptTokens(prompt, list(prompt))
                requests.append(Request(given, 10**6 * number + seed, options, Counting(2)))
                requests[-1].session = held.fork()
                loop.add(requests[-1])
            going = len(requests)
            while going:
                going -= sum(isinstance(event, Finished) for _, event in loop.step())
            for one in requests:
                firsts[one.reader.tokens[0]] += 1
                pairs[tuple(one.reader.tokens)] += 1
    rows = []
    for i, what in enumerate(("first token", "two tokens")):
        statistic, freedom = chi_square(*(counts[mode][i] for mode in counts))
        # Wilson and Hilferty: a cube root of chi-square over its freedom is nearly normal.
        z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
        rows.append([what, args.draws, f"{statistic:.1f}", freedom, f"{z:.2f}"])
    table(["", "draws", "chi-square", "degrees of freedom", "standard deviations"], rows)
    return rows


def chi_square(one: Counter, other: Counter, least: int = 10) -> tuple[float, int]:
    """Of two samples of equal size; what is rarer than `least` in both together is one kind."""
    kinds: Counter = Counter()
    for counter, at in ((one, 0), (other, 1)):
        for kind, count in counter.items():
            kinds[kind if one[kind] + other[kind] >= least else "rare", at] += count
    names = {kind for kind, _ in kinds}
    parts = [(kinds[kind, 0], kinds[kind, 1]) for kind in names]
    return sum((a - b) ** 2 / (a + b) for a, b in parts), len(parts) - 1


def valid(args: argparse.Namespace) -> list[list]:
    """Texts that are in their language, in both modes and at several temperatures."""
    from jsonschema import Draft202012Validator, FormatChecker

    engine, found = mlx_dgemma.load(), Counter()
    cases, names = quality.cases(quality.TEXT, -(-args.prompts // len(quality.TEXT)), 5)[: args.prompts], list(SCHEMAS)
    checks = {name: Draft202012Validator(one, format_checker=FormatChecker()) for name, one in SCHEMAS.items()}
    for seed, case in list(enumerate(cases))[args.skip :]:
        name, pattern = names[seed % len(names)], PATTERNS[seed % min(len(PATTERNS), 100)]
        for mode in ("causal", "speculative"):
            options = {"mode": mode, "seed": seed, "temperature": (0.0, 0.7, 1.5)[seed % 3]}
            for kind, form in (("schema", {"schema": SCHEMAS[name]}), ("pattern", {"regex": pattern})):
                try:
                    text = engine.generate(case["messages"], **options, **form).text
                    good = checks[name].is_valid(json.loads(text)) if kind == "schema" else re.fullmatch(pattern, text)
                except (mlx_dgemma.DgemmaError, ValueError) as error:
                    good = print(f"{kind} {name if kind == 'schema' else pattern!r}, {options}: {error}")
                found[mode, kind, bool(good)] += 1
        if seed % 10 == 9:
            wrong = sum(count for (*_, good), count in found.items() if not good)
            print(f"{seed + 1} prompts, {found.total()} texts, {wrong} not valid", flush=True)
    rows = [
        [mode, kind, f"{found[mode, kind, True]} of {len(cases) - args.skip}"]
        for mode, kind in sorted({k[:2] for k in found})
    ]
    table(["", "", "valid"], rows)
    return rows


def memory(args: argparse.Namespace) -> list[list]:
    """Memory after every thousand tokens of one text: MLX's arrays without the keys and values, and the process.

    A mode that kept something of every token, or of every pass, would show it by a figure that grows.
    """
    model, rows = model_of("float32", 2, 256, hidden=64), []
    header = ["", "tokens", "seconds", "MiB in use", "peak", "freed buffers", "keys and values", "process"]
    print(*header, sep=" | ", flush=True)
    for mode in args.modes:
        loop, session, done, mark, began = Loop(model), Session(model), 0, 1000, time.perf_counter()
        prompt = list(range(2, 66))
        options = GenerationOptions(mode=mode, temperature=1.0, end_tokens=())
        loop.add(Request(PromptTokens(prompt, list(prompt)), 0, options, Counting(args.tokens)), session)
        mx.reset_peak_memory()
        while loop.requests:
            for _, event in loop.step():
                done += len(event.tokens) if isinstance(event, mlx_dgemma.Block) else 0
            if done >= mark:
                held, mark = session.nbytes, mark + 1000
                figures = [mx.get_active_memory() - held, mx.get_peak_memory() - held, mx.get_cache_memory(), held]
                figures.append(resident())
                seconds = f"{time.perf_counter() - began:.0f}"
                rows.append([mode, done, seconds, *(f"{one / 2**20:.2f}" for one in figures)])
                print(*rows[-1], sep=" | ", flush=True)
                mx.reset_peak_memory()
    return rows


def resident() -> int:
    """Bytes of this process in memory now; where the system does not tell, the most that it ever had."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["equal", "frequencies", "valid", "memory"])
    parser.add_argument("--recipes", nargs="+", default=["float32", "bfloat16", "8bit", "4bit"])
    parser.add_argument("--modes", nargs="+", default=["causal", "speculative"], help="of memory")
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="prompts of `valid` that an earlier run has asked")
    parser.add_argument("--tokens", type=int, help="to generate (equal 48, memory 10000)")
    args = parser.parse_args()
    args.tokens = args.tokens or (10_000 if args.command == "memory" else 48)
    found = machine()
    finish("drafts", **found, command=args.command, rows=globals()[args.command](args))


if __name__ == "__main__":
    main()
