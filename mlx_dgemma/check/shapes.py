"""Models of random weights at any shape: a step's time does not depend on the weights' values."""

from __future__ import annotations

from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten

from ..checkpoint.build import choose_kernels, slices_of, suit_device
from ..checkpoint.folder import parameter_shapes
from ..checkpoint.slices import held
from ..convert.recipes import RECIPES
from ..distributed.group import Group
from ..model.config import ModelConfig
from ..model.diffusion_gemma import DiffusionGemma

# Spelt out, because every runtime has other defaults.
SHAPES: dict[str, dict[str, int]] = {
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
AT_ONCE = 2**26  # numbers that are drawn at once, in float32 and one piece after another, to bound memory
CANVAS = {"26b": 256, "small": 64}


def raw_config(
    shape: str, layers: int | None = None, hidden: int | None = None, vocab: int | None = None,
    canvas: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """config.json of a shape, with some sizes replaced; every sixth layer and the last are full layers."""
    changes = {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocab}
    text: dict[str, Any] = {**SHAPES[shape], **{name: value for name, value in changes.items() if value}}
    count = text["num_hidden_layers"]
    text["layer_types"] = [
        "full_attention" if i % 6 == 5 or i == count - 1 else "sliding_attention" for i in range(count)
    ]
    text.update(model_type="diffusion_gemma_text", use_bidirectional_attention="vision")
    return {"model_type": "diffusion_gemma", "canvas_length": canvas or CANVAS[shape], "text_config": text}


def random_model(raw: dict[str, Any], dtype: mx.Dtype, recipe: str | None) -> DiffusionGemma:
    """A model of random weights, quantized by a recipe."""
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    fill(model, dtype)
    quantize(model, recipe)
    mx.eval(model.parameters())
    return model


def fill(module: nn.Module, dtype: mx.Dtype) -> None:
    """Give a module random matrices of deviation 1 / sqrt(inputs), and ones in its vectors; nothing is computed yet."""
    keys = iter(mx.random.split(mx.random.key(0), 4096))
    module.update(tree_map_with_path(lambda path, a: drawn(a.shape, dtype, next(keys)), module.parameters()))


def drawn(shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> mx.array:
    """A random matrix of deviation 1 / sqrt(inputs), or a vector of ones."""
    if len(shape) < 2:
        return mx.ones(shape, dtype)
    count = min(-(-prod(shape) // AT_ONCE), shape[0])
    ends = [shape[0] * i // count for i in range(count + 1)]
    pieces: list[mx.array] = []
    for own, start, end in zip(mx.random.split(key, count), ends, ends[1:]):
        later = mx.depends(own, pieces[-1:]) if pieces else own
        piece = mx.random.normal((end - start, *shape[1:]), key=later) * shape[-1] ** -0.5
        pieces.append(piece.astype(dtype))
    return mx.concatenate(pieces)


def quantize(model: nn.Module, recipe: str | None, prefix: str = "") -> None:
    """Quantize the modules of a model, or of the part of one at the path `prefix`, by a recipe; None: keep floats."""
    if recipe is None:
        return
    rules = RECIPES[recipe]

    def choose(path: str, module: nn.Module):
        if not hasattr(module, "to_quantized"):
            return False
        return rules.quantization(prefix + path, module.weight.shape[-1]) or False

    nn.quantize(model, class_predicate=choose)


def sliced_model(raw: dict[str, Any], dtype: mx.Dtype, recipe: str | None, group: Group) -> DiffusionGemma:
    """As `random_model`, of which a rank holds its slices alone: one parameter is whole at a time.

    The weights that are dealt are the same for every number of ranks.
    """
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    shapes = parameter_shapes(model)
    quantize(model, recipe)
    mine = slices_of(model, group.rank, group.size)
    keys, found = mx.random.split(mx.random.key(0), len(shapes)), []
    for key, (name, shape) in zip(keys, shapes.items()):
        path, _, kind = name.rpartition(".")
        parts = {kind: drawn(shape, dtype, key)}
        cut, stored = mine.cut(name), mine.quantized.get(path)
        if stored is not None:
            arrays = mx.quantize(parts[kind], stored.group_size, stored.bits, mode=stored.mode)
            parts = dict(zip(("weight", "scales", "biases"), arrays))
        for part, array in parts.items():
            made = held(array, cut, part, stored)
            mx.eval(made)
            found.append((f"{path}.{part}" if path else part, made))
        del parts
        mx.clear_cache()
    model.update(tree_unflatten(found))
    if group.size > 1:
        model.join(group)
    return model


def shared_model(raw: dict[str, Any], dtype: mx.Dtype, recipe: str | None) -> DiffusionGemma:
    """As `random_model`, but all layers of a kind are one layer, so that two layers' weights serve for any depth.

    It computes a step as the whole model does, in a fraction of its memory: at the release's size no cache of a device
    holds a layer until its next use.
    """
    text = raw["text_config"]
    kinds = list(dict.fromkeys(text["layer_types"]))
    few = {**raw, "text_config": {**text, "num_hidden_layers": len(kinds), "layer_types": kinds}}
    source = random_model(few, dtype, recipe)
    suit_device(source)
    mx.eval(source.parameters())
    made = DiffusionGemma(ModelConfig.from_dict(raw))
    own, held = made.model.decoder, source.model.decoder
    by_kind = dict(zip(kinds, held.layers))
    own.layers = [by_kind[kind] for kind in text["layer_types"]]
    own.embed_tokens, own.norm, own.self_conditioning = held.embed_tokens, held.norm, held.self_conditioning
    for one in made.model.encoder.language_model.layers:
        one.layer_scalar = mx.ones((1,), dtype)
    choose_kernels(made)
    return made


def random_prompt(raw: dict[str, Any], length: int) -> mx.array:
    """[1, length] tokens below the release's image placeholders, which would ask for pictures."""
    return mx.random.randint(0, min(raw["text_config"]["vocab_size"], 255_000), (1, length), key=mx.random.key(2))
