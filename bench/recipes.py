"""What recipes cost: KL over trajectories at equal bytes, right answers and positions.

    mlx-dgemma convert demo --mlx-path small --target-bits 5 --prompts FILE    # measures into small.search
    python bench/recipes.py kl --search small.search --prompts OTHER_FILE     # plans beside uniform bits, mlx-vlm
    python bench/recipes.py quality --search small.search --seeds 0 1 2       # right answers, positions of each
    python bench/recipes.py ranks --search small.search --count 60            # which estimate orders widths best
    python bench/recipes.py shape --layers 4                                  # a search at the release's shape

The prompts of `kl` should be others than those of the search. mlx-vlm's predicate holds everything but the experts and
self-conditioning at 8 bits.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import quality
from report import attempt, finish, machine, table

import mlx_dgemma
from convert import CARRIED, make_checkpoint
from mlx_dgemma.check.shapes import raw_config
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.recipes import Quantization, Recipe, width_name, width_named
from mlx_dgemma.convert.search import plan, prompts, replay, trajectories, widths
from mlx_dgemma.convert.search.candidate import by_recipe, measured, rounded
from mlx_dgemma.convert.search.search import expected_of, search
from mlx_dgemma.convert.search.sensitivity import known_costs
from mlx_dgemma.convert.search.shelf import Shelf
from mlx_dgemma.convert.sources.opened import find_source, open_source
from mlx_dgemma.convert.writer import write_json
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.prompt.endings import own_options

EIGHT = Quantization(8)


def uniform(width: Quantization) -> Recipe:
    """One width everywhere."""
    return Recipe(f"uniform {width_name(width)}", width, width, width, width, width, width)


def predicate(width: Quantization) -> Recipe:
    """What mlx-vlm's converter does with this width."""
    return Recipe(f"mlx-vlm {width_name(width)}", width, EIGHT, EIGHT, EIGHT, EIGHT, width)


def contenders(args: argparse.Namespace, shapes: dict, costs: dict, float_bytes: int) -> list[tuple[Recipe, Recipe]]:
    """(a baseline, the plan of its size); plans are written beside the search."""
    baselines = [uniform(width_named(one)) for one in args.uniform] + [predicate(width_named(one)) for one in args.vlm]
    found = []
    for one in baselines:
        size = one.nbytes(shapes, float_bytes)
        made, _ = plan.planned(f"searched, size of {one.name}", shapes, costs, size, float_bytes)
        plan.save(args.search / f"{one.name.replace(' ', '-')}.json", made)
        found.append((one, made))
    return found


def bits_of(recipe: Recipe, shapes: dict) -> float:
    """Bits a weight of the modules that are quantized."""
    modules = widths.modules_of(shapes)
    stored = sum(widths.nbytes(shape, recipe.fitted(path, shape[-1])) for path, shape in modules.items())
    return 8 * stored / sum(map(prod, modules.values()))


def held_out(source, shelf: Shelf, args: argparse.Namespace) -> list[trajectories.Trajectory]:
    """Trajectories of the prompts; they are kept beside the search."""
    file = args.search / "held-out.safetensors"
    if not file.exists():
        tokenizer = load_tokenizer(source.checkpoint)
        options, _ = own_options(source.checkpoint, tokenizer, source.checkpoint.config.text.vocab_size)
        asked = prompts.read(tokenizer, args.prompts)
        trajectories.save(file, trajectories.record(shelf.trunk(), options, asked, args.states, seed=1))
    return trajectories.load(file)


def kl(source, args: argparse.Namespace) -> dict:
    """Every recipe's KL over held-out trajectories."""
    shelf, shapes = Shelf(source), source.checkpoint.shapes
    costs = known_costs(args.search)
    seen = held_out(source, shelf, args)
    expected = replay.outputs(shelf.trunk(), shelf.layer, seen)
    rows = []
    for pair in contenders(args, shapes, costs.modules, shelf.stored.size):
        for recipe in pair:
            far, same = measured(shelf, by_recipe(recipe, shelf.stored), seen, expected)
            told = expected_of(recipe, shapes, costs)
            rows.append(
                [recipe.name, recipe.nbytes(shapes, shelf.stored.size), bits_of(recipe, shapes), far, same, told]
            )
            print(rows[-1], flush=True)
    table(["recipe", "bytes", "bits", "KL", "same top token", "sum of costs"], rows)
    return {"rows": rows, "states": sum(len(one.steps) for one in seen)}


def answers(source, args: argparse.Namespace) -> dict:
    """Right answers and positions of every recipe, and of the source."""
    shapes, found = source.checkpoint.shapes, {}
    costs = known_costs(args.search)
    pairs = contenders(args, shapes, costs.modules, 2)
    recipes = {"source": None, **{one.name: one for pair in pairs for one in pair}}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, recipe) in enumerate(recipes.items()):
            model = source.checkpoint.path
            if recipe is not None:
                model = Path(folder) / str(number)
                convert(source.checkpoint.path, model, recipe)
            engine = mlx_dgemma.load(model, dequantize=True)
            found[name] = attempt(quality.run, quality.ours(engine, "default", {}), args)
            print(json.dumps({name: found[name].get("groups", found[name])}), flush=True)
    quality.print_results(found)
    return found


def ranks(source, args: argparse.Namespace) -> dict:
    """Rank correlations of estimates with the KL that single widths really cause."""
    shelf, costs = Shelf(source), known_costs(args.search).modules
    seen = held_out(source, shelf, args)
    expected = replay.outputs(shelf.trunk(), shelf.layer, seen)
    pairs = [(path, name) for path, own in costs.items() for name in own]
    rows = []
    for path, name in random.Random(0).sample(pairs, min(args.count, len(pairs))):
        width = width_named(name)

        def one(where: str, weight: mx.array, path: str = path, width: Quantization | None = width) -> mx.array:
            return rounded(weight, width, shelf.stored) if where == path else weight

        weight = shelf.weight(path)
        error = rounded(weight, width, shelf.stored) - weight
        relative = float((error * error).sum() / (weight * weight).sum())
        far, _ = measured(shelf, one, seen, expected)
        rows.append((path, name, far, costs[path][name], relative))
        print(rows[-1], flush=True)
    order = [np.argsort(np.argsort([row[i] for row in rows])) for i in (2, 3, 4)]
    gradient, error = (float(np.corrcoef(order[0], one)[0, 1]) for one in order[1:])
    print(f"rank correlation with the KL of {len(rows)} single widths: this estimate {gradient:.3f}, "
          f"relative error of the weights {error:.3f}")  # fmt: skip
    return {"estimate": gradient, "relative error": error, "rows": rows}


def random_source(folder: Path, args: argparse.Namespace) -> Path:
    """A checkpoint of random weights in the release's sizes but for these flags, with the demo's tokenizer."""
    raw = raw_config("26b", args.layers, args.hidden, args.vocab, args.canvas)
    raw = {"architectures": ["DiffusionGemmaForBlockDiffusion"], "dtype": "bfloat16", **raw}
    folder.mkdir()
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", {"max_denoising_steps": args.steps})
    for name in CARRIED:
        shutil.copy(DEMO / name, folder)
    make_checkpoint(folder, DiffusionGemma(ModelConfig.from_dict(raw)))
    return folder


def shape(args: argparse.Namespace) -> dict:
    """A search at the release's shape, on random weights: memory, and time by the layer."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = random_source(Path(folder) / "source", args)
        marks: list[tuple[str, int, float, float]] = []
        started = time.perf_counter()

        def note(what: str, done: int, total: int) -> None:
            marks.append((what, done, time.perf_counter() - started, mx.get_peak_memory() / 1e9))
            print("{} {}: {:.1f} s, {:.2f} GB".format(*marks[-1]), flush=True)

        tried = [width_named(one) for one in args.widths]
        where = Path(folder) / "search"
        with open_source(path) as source:
            found = search(source, where, None, args.bits, args.prompts, tried, args.states, args.samples, note, False)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak: {found.peak / 1e9:.2f} GB of arrays in the search, {resident / 1e9:.2f} GB resident; "
          "the resident peak counts making the random checkpoint, too")  # fmt: skip
    return {"peak": found.peak, "resident": resident, "seconds": found.seconds, "marks": marks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kl", "quality", "ranks", "shape"])
    parser.add_argument("--model", help="folder or Hub id (default: the demo)")
    parser.add_argument("--search", type=Path, help="folder of a search of that model")
    parser.add_argument("--prompts", help="a file of prompts")
    parser.add_argument("--states", type=int, default=3)
    parser.add_argument("--uniform", nargs="*", default=["3g64", "4g64"], metavar="WIDTH")
    parser.add_argument("--vlm", nargs="*", default=["2g64"], metavar="WIDTH")
    parser.add_argument("--count", type=int, default=60, help="single widths of `ranks`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--per-family", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="of `shape`")
    for name in ("hidden", "vocab", "canvas"):
        parser.add_argument(f"--{name}", type=int, help=f"of `shape`: the release's {name}, replaced")
    parser.add_argument("--steps", type=int, default=8, help="of `shape`: denoising steps, since noise never settles")
    parser.add_argument("--widths", nargs="+", default=["2g64", "3g64", "4g64", "6g64", "8g64"], help="of `shape`")
    parser.add_argument("--samples", type=int, default=4, help="of `shape`")
    parser.add_argument("--bits", type=float, default=4.5, help="of `shape`")
    parser.add_argument("--folder", help="of `shape`: for its temporary files")
    args = parser.parse_args()
    args.vision = False
    found = machine()
    if args.what == "shape":
        finish("recipes", **found, shape=shape(args))
        return
    with open_source(find_source(args.model)) as source:
        result = {"kl": kl, "quality": answers, "ranks": ranks}[args.what](source, args)
    finish("recipes", **found, model=args.model, what=args.what, result=result)


if __name__ == "__main__":
    main()
