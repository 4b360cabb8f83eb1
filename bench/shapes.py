"""The flags that say which model of random weights is timed, and the release's vision tower."""

import argparse

from report import on_cpu

from mlx_dgemma.check.shapes import SHAPES, random_model, raw_config
from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

TOWER = {
    "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "position_embedding_size": 10240,
    "standardize": True,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is timed, for `step.py` and `compare.py step`."""
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name in ("layers", "hidden", "vocab", "canvas"):
        parser.add_argument(f"--{name}", type=int, help=f"the shape's {name}, replaced")
    parser.add_argument("--recipe", choices=RECIPES, help="quantize (default: as --dtype says)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024], help="prompt tokens")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run; the first two are warm-up")
    parser.add_argument("--mode", choices=["default", "exact", "fast"], nargs="+", default=["default"])
    parser.add_argument("--runs", type=int, default=2, help="times that each prefix is encoded and denoised")


def from_arguments(args: argparse.Namespace) -> tuple[dict, str, DiffusionGemma]:
    """(config.json's content, the dtype's name, a random model)."""
    raw = raw_config(args.shape, args.layers, args.hidden, args.vocab, args.canvas)
    dtype = args.dtype or ("float32" if on_cpu() else "bfloat16")
    return raw, dtype, random_model(raw, DTYPES[dtype], args.recipe)
