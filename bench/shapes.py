"""Models of random weights at any shape: a step's time does not depend on the weights' values."""

import argparse

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from report import on_cpu

from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

# Spelt out, because every runtime has other defaults.
SHAPES = {
    "26b": {
        "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
        "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704, "max_position_embeddings": 262144,
    },
    "small": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "global_head_dim": 128,
        "num_global_key_value_heads": 2, "sliding_window": 256, "num_experts": 16, "top_k_experts": 4,
        "moe_intermediate_size": 128, "max_position_embeddings": 262144,
    },
}  # fmt: skip
CANVAS = {"26b": 256, "small": 64}
TOWER = {
    "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "position_embedding_size": 10240,
    "standardize": True,
}  # fmt: skip


def raw_config(
    shape: str, layers: int | None = None, hidden: int | None = None, vocab: int | None = None,
    canvas: int | None = None,
) -> dict:  # fmt: skip
    """config.json of a shape, with some sizes replaced; every sixth layer and the last are full layers."""
    changes = {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocab}
    text = {**SHAPES[shape], **{name: value for name, value in changes.items() if value}}
    count = text["num_hidden_layers"]
    text["layer_types"] = [
        "full_attention" if i % 6 == 5 or i == count - 1 else "sliding_attention" for i in range(count)
    ]
    text.update(model_type="diffusion_gemma_text", use_bidirectional_attention="vision")
    return {"model_type": "diffusion_gemma", "canvas_length": canvas or CANVAS[shape], "text_config": text}


def random_model(raw: dict, dtype: mx.Dtype, recipe: str | None) -> DiffusionGemma:
    """A model of random weights, quantized by a recipe."""
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    keys = iter(mx.random.split(mx.random.key(0), 4096))

    def fill(path: str, a: mx.array) -> mx.array:
        key = next(keys)
        if a.ndim < 2:
            return mx.ones(a.shape, dtype)
        return (mx.random.normal(a.shape, key=key, dtype=dtype) * a.shape[-1] ** -0.5).astype(dtype)

    model.update(tree_map_with_path(fill, model.parameters()))
    quantize(model, recipe)
    mx.eval(model.parameters())
    return model


def quantize(model: nn.Module, recipe: str | None) -> None:
    """Give both runtimes the same quantized modules."""
    if recipe is None:
        return
    rules = RECIPES[recipe]

    def choose(path: str, module: nn.Module):
        if not hasattr(module, "to_quantized"):
            return False
        return rules.quantization(path, module.weight.shape[-1]) or False

    nn.quantize(model, class_predicate=choose)


def random_prompt(raw: dict, length: int) -> mx.array:
    """[1, length] tokens below the release's image placeholders, which would ask for pictures."""
    return mx.random.randint(0, min(raw["text_config"]["vocab_size"], 255_000), (1, length), key=mx.random.key(2))


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
