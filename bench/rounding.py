"""How much closer to the source better rounding brings a recipe: KL over denoising steps of other prompts.

    python bench/rounding.py                                          # the demo, 3bit and 4bit, every method
    python bench/rounding.py --recipe 3bit --method nearest gptq --prompts 64 --judged 24

The prompts that weights are rounded on and those that judge come from the same families, with other numbers and names.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from quality import TEXT, cases
from report import finish, machine, table

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import find
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.rounding.methods import METHODS
from mlx_dgemma.convert.search import plan, prompts, replay, trajectories
from mlx_dgemma.prompt.endings import own_options

STATES = 4
SEEDS = {"rounded": 1000, "judged": 0}  # of the prompts


def write_prompts(file: Path, count: int, seed: int) -> Path:
    """So many prompts of all families in turn, as JSON lines."""
    found = [one for one in cases(TEXT, -(-count // len(TEXT)), seed) if not one["images"]]
    random.Random(seed).shuffle(found)
    file.write_text("".join(json.dumps({"messages": one["messages"]}) + "\n" for one in found[:count]))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of the source (default: the demo)")
    parser.add_argument("--recipe", nargs="+", default=["3bit", "4bit"], help="names, or files of searched plans")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=64, help="that weights are rounded on")
    parser.add_argument("--judged", type=int, default=24, help="prompts that judge")
    args = parser.parse_args()
    found, checkpoint = machine(), Checkpoint.open(find(args.model))
    source, tokenizer = build(checkpoint, "float32"), load_tokenizer(checkpoint)
    options, _ = own_options(checkpoint, tokenizer, checkpoint.config.text.vocab_size)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {
            kind: write_prompts(folder / f"{kind}.jsonl", count, SEEDS[kind])
            for kind, count in (("rounded", args.prompts), ("judged", args.judged))
        }
        asked = prompts.read(tokenizer, files["judged"])
        seen = trajectories.record(source, options, asked, STATES, seed=1)
        expected = replay.outputs(source, lambda i: source.model.decoder.layers[i], seen)
        for recipe in args.recipe:
            nearest = None
            for method in args.method:
                target, started = folder / f"{len(rows)}", time.perf_counter()
                given = {} if method == "nearest" else {"rounding": method, "prompts": files["rounded"]}
                chosen = plan.load(Path(recipe)) if recipe.endswith(".json") else recipe
                convert(checkpoint.path, target, chosen, **given)
                seconds = time.perf_counter() - started
                model = build(Checkpoint.open(target), "float32", dequantize=True)
                layers = model.model.decoder.layers
                outputs = replay.outputs(model, lambda i, layers=layers: layers[i], seen)
                far, same = replay.divergence(source, expected, model, outputs, seen)
                nearest = far if nearest is None else nearest
                rows.append([recipe, method, f"{far:.3g}", f"{far / nearest - 1:+.0%}", f"{same:.2%}", round(seconds)])
                print(rows[-1], flush=True)
    table(["recipe", "rounding", "KL, nats a position", "beside the first", "same top token", "seconds"], rows)
    states = sum(len(one.steps) for one in seen)
    finish("rounding", **found, model=args.model, prompts=args.prompts, judged=args.judged, states=states, rows=rows)


if __name__ == "__main__":
    main()
