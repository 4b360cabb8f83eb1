"""Random adapters of small models, and the logits that they lead to."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from support import gap, random_tokens, small_config, small_model

from mlx_dgemma.adapters import deltas as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta, target_paths
from mlx_dgemma.checkpoint import build as build_module

BOUND = 1e-4
LINEAR = (nn.Linear, SwitchLinear)
DENSE = ("attention", "mlp", "self-conditioning")
ALL = (*DENSE, "experts", "router")
KINDS = {"lora": (ALL, False), "dora": (DENSE, True)}
LAYERS = "model.decoder.layers."
Q = "model.decoder.layers.0.self_attn.q_proj"
EXPERTS = "model.decoder.layers.0.experts.down_proj"
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}  # groups of 32 fit


def small():
    return small_model(scale=0.2)


def deltas(model, groups=ALL, dora=False, seed=0, size=0.2, rank=2) -> dict[str, Delta]:
    """Random changes of all modules of some groups; entries of b @ a are about `size`."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return mx.array((random.normal(size=shape) * (size / rank**0.5) ** 0.5).astype(np.float32))

    found = {}
    for path in target_paths(model, groups):
        weight = adapters.dequantized_weight(adapters._module(model, path)).astype(mx.float32)
        *experts, out, width = weight.shape
        a, b = draw(*experts, rank, width), draw(*experts, out, rank)
        length = mx.linalg.norm(weight, axis=-1) * mx.array(random.uniform(0.5, 1.5, out).astype(np.float32))
        found[path] = Delta(a, b, 0.75, length if dora else None)
    return found


def modes_of(model, groups, dora, modes) -> Adapter:
    """Changes that are equal in both modes' layers, different, or in one mode alone."""
    first, second = (deltas(model, groups, dora, seed) for seed in (1, 2))
    encode = {path: delta for path, delta in first.items() if path.startswith(LAYERS)}
    if modes == "equal":
        return Adapter(encode, first)
    return Adapter({} if modes == "denoise" else encode, {} if modes == "encode" else second)


def changed(model, changes: dict[str, Delta]):
    """The model with the changes in its weights, by the formula."""
    for path, delta in changes.items():
        module = adapters._module(model, path)
        weight = np.array(module.weight) + delta.scale * np.array(delta.b) @ np.array(delta.a)
        if delta.magnitude is not None:
            weight = weight / np.sqrt((weight**2).sum(-1, keepdims=True)) * np.array(delta.magnitude)[:, None]
        module.weight = mx.array(weight)
    return model


def logits(encoder, decoder=None) -> list[mx.array]:
    """Of the prompt, and of two denoising steps, the second self-conditioned; 24 rows and more are sorted by expert."""
    decoder, prefix = decoder or encoder, encoder.new_prefix()
    vocab = encoder.config.text.vocab_size
    prompt = encoder.logits(encoder.encode(random_tokens(3, 1, 40, vocab=vocab), prefix))
    canvas = random_tokens(4, 1, encoder.config.canvas_length, vocab=vocab)
    one = decoder.logits(decoder.denoise(canvas, prefix))
    return [prompt, one, decoder.logits(decoder.denoise(canvas, prefix, decoder.condition(one / 0.8)))]


def gaps(a: list[mx.array], b: list[mx.array]) -> list[float]:
    return [gap(*pair) for pair in zip(a, b, strict=True)]


def equal(a: list[mx.array], b: list[mx.array]) -> bool:
    return all(mx.array_equal(*pair).item() for pair in zip(a, b, strict=True))


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in tree_flatten(model.parameters())}


def packed(mode, bits=4):
    """A model with packed linear maps, or without where the mode is None, and its unpacked twin."""
    found = []
    for unpack in (False, True):
        model = small_model(scale=0.2, **WIDE)
        if mode:
            nn.quantize(model, 32, bits, mode=mode, class_predicate=lambda _, m: isinstance(m, LINEAR))
        if unpack:
            build_module._dequantize(model, mx.float32)
        found.append(model)
    return found


def stored(model, folder):
    """A packed model, or one of the same sizes, as a checkpoint."""
    config = small_config(**WIDE)
    for mode in {module.mode for module in model.modules() if "scales" in module}:
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": mode}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def written(adapter, folder):
    peft.write(adapter, folder, "base")
    return folder
