"""Random adapters of small models, and the logits that they lead to."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from support import gap, random_tokens, small_config, small_model

from mlx_dgemma.adapters import deltas as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta, target_paths
from mlx_dgemma.checkpoint import build as build_module
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.upstream import SwitchLinear

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
    """Random deltas of all modules of some groups; the entries of b @ a are about `size`."""
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
    """Deltas that are equal in both modes, different, or only in one mode."""
    first, second = (deltas(model, groups, dora, seed) for seed in (1, 2))
    encode = {path: delta for path, delta in first.items() if path.startswith(LAYERS)}
    if modes == "equal":
        return Adapter(encode, first)
    return Adapter({} if modes == "denoise" else encode, {} if modes == "encode" else second)


def changed(model, changes: dict[str, Delta]):
    """The model with the deltas added to its weights, computed by NumPy."""
    for path, delta in changes.items():
        module = adapters._module(model, path)
        weight = np.array(module.weight) + delta.scale * np.array(delta.b) @ np.array(delta.a)
        if delta.magnitude is not None:
            weight = weight / np.sqrt((weight**2).sum(-1, keepdims=True)) * np.array(delta.magnitude)[:, None]
        module.weight = mx.array(weight)
    return model


def logits(encoder, decoder=None) -> list[mx.array]:
    """Logits of the prompt and of two denoising steps, the second self-conditioned.

    The prompt is long enough that rows are sorted by expert.
    """
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


def quantized_pair(mode, bits=4):
    """A quantized model (if mode is None, a float model), and the same model dequantized."""
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
    """A model from `quantized_pair`, written as a checkpoint."""
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


def save_lora(demo, folder):
    """A LoRA of everything but the vision tower, equal in both modes, large enough to change answers."""
    model = build(Checkpoint.open(demo), "float32")
    changes = deltas(model, ALL, seed=5, size=0.06)
    shared = {path: delta for path, delta in changes.items() if path.startswith(LAYERS)}
    return written(Adapter(shared, changes), folder)


def save_denoising_dora(demo, folder):
    """A DoRA of denoising alone."""
    model = build(Checkpoint.open(demo), "float32")
    return written(Adapter({}, deltas(model, DENSE, True, 6, 0.02)), folder)
