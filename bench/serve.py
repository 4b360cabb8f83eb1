"""Requests denoised together against the same requests one after another, at any shape.

    python bench/serve.py                                            # a small shape, for a CPU
    python bench/serve.py --shape 26b --requests 8 --prefix 1024     # a GPU

Prompts and weights are random, every canvas takes all its steps, and every request has as many canvases. The floor is
what one pass over the weights takes for each step, however many requests share it.
"""

import argparse
import time

import mlx.core as mx
import numpy as np
from meter import settle
from report import GIB, finish, machine, spread, table
from shapes import add_arguments, from_arguments
from step import nbytes

from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import choose_kernels, suit_device
from mlx_dgemma.decoding.events import Block
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.request import Request
from mlx_dgemma.decoding.session import PromptTokens, Session


class Reader:
    """An answer of so many canvases."""

    text, thinking, tool_calls, finish_reason = "", "", (), "length"

    def __init__(self, blocks: int):
        self.left, self._blocks, self.taken, self.tokens, self.log_probs = 2**30, blocks, [], [], []

    def feed(self, tokens: tuple[int, ...], log_probs: tuple[float, ...]) -> str | None:
        """Take a canvas; "length" after the last one."""
        self.taken.append(tokens)
        return "length" if len(self.taken) == self._blocks else None

    def take(self) -> tuple[str, str]:
        """No text."""
        return "", ""


def answer(model, prompts: list[np.ndarray], args: argparse.Namespace, together: bool) -> dict:
    """Seconds, peak memory and tokens of all requests."""
    options = GenerationOptions(
        max_denoising_steps=args.steps, confidence_threshold=0.0, certainty_threshold=0.0, patience=0
    )
    requests = []
    for seed, prompt in enumerate(prompts):
        room = len(prompt) + (args.blocks + 1) * model.config.canvas_length
        asked = PromptTokens(prompt.tolist(), prompt.tolist())
        requests.append((Request(asked, seed, options, Reader(args.blocks)), Session(model, room)))
    settle()
    base, first = mx.get_active_memory(), 0.0
    mx.reset_peak_memory()
    began = time.perf_counter()
    for group in [requests] if together else [[one] for one in requests]:
        loop = Loop(model)
        for one in group:
            loop.add(*one)
        while loop.requests:
            for _, event in loop.step():
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Block) and not first:
                    first = time.perf_counter() - began
    seconds = time.perf_counter() - began
    peak = (mx.get_peak_memory() - base) / GIB
    return {
        "seconds": seconds,
        "first": first,
        "peak": peak,
        "taken": [request.reader.taken for request, _ in requests],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2, help="canvases of an answer")
    args = parser.parse_args()
    found = machine()
    raw, dtype, model = from_arguments(args)
    weights = nbytes(model)
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    print(f"shape {args.shape}, {args.recipe or dtype}, weights {weights / GIB:.3f} GiB, {args.requests} requests")
    print(f"each: prompt of {args.prefix[0]}, {args.blocks} canvases of {args.steps} steps")
    whole = np.asarray(random_prompt(raw, args.prefix[0] + args.requests)).astype(np.int32)[0]
    prompts = [whole[i : i + args.prefix[0]] for i in range(args.requests)]
    ways: dict[str, list[dict]] = {"one after another": [], "together": []}
    for turn in range(args.runs + 1):  # the first is for kernels and the allocator
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            told = answer(model, prompts, args, way == "together")
            ways[way] += [told] if turn else []
    rows = [
        [way, *(spread([one[name] for one in told], 2)["median"] for name in ("seconds", "first", "peak"))]
        for way, told in ways.items()
    ]
    alone, together = (told[0]["taken"] for told in ways.values())
    same = np.mean([np.mean(np.array(a) == np.array(b)) for a, b in zip(alone, together)])
    ratio = rows[1][1] / rows[0][1]
    print()
    table(["", "seconds", "first canvas after", "GiB above weights, KV included"], rows)
    print(f"together / one after another: {ratio:.2f}; tokens that are the same: {same:.1%}")
    finish("serve", **found, config=raw, recipe=args.recipe, dtype=dtype, rows=rows, ratio=ratio, same=float(same))


if __name__ == "__main__":
    main()
