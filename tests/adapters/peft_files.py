"""Small adapters in PEFT's layout for the demo."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dgemma.adapters.deltas import Delta

BOUND = 1e-4
THEIRS = "base_model.model.model"
Q = "model.decoder.layers.0.self_attn.q_proj"  # [192, 192]
DOWN = "model.decoder.layers.1.mlp.down_proj"  # [192, 384]
GATE_UP = "model.decoder.layers.2.experts.gate_up_proj"  # [8, 256, 192]
EXPERTS_DOWN = "model.decoder.layers.2.experts.down_proj"  # [8, 192, 128]
GATE = "model.decoder.self_conditioning.gate_proj"  # [384, 192]
SIGHT = "model.encoder.vision_tower.encoder.layers.1.self_attn.v_proj.linear"  # [96, 96]
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "gate_proj"]}
A, B = "lora_A.weight", "lora_B.weight"


def array(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32))


def pair(module: str, out: int = 192, inputs: int = 192, rank: int = 2) -> dict[str, mx.array]:
    """The tensors of a module's LoRA, as PEFT names them."""
    return {f"{THEIRS}.{module}.{A}": array(rank, inputs), f"{THEIRS}.{module}.{B}": array(out, rank)}


def save(folder: Path, tensors: dict[str, mx.array], **changes) -> Path:
    """Write a folder in PEFT's layout; None removes a key from the configuration."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return folder


def same(a: dict[str, Delta], b: dict[str, Delta]) -> bool:
    """True if all paths, arrays and scales are exactly equal."""
    pairs = [(a[path], b[path]) for path in a if path in b]
    return a.keys() == b.keys() and all(
        one.scale == other.scale
        and mx.array_equal(one.a, other.a).item()
        and mx.array_equal(one.b, other.b).item()
        and (one.magnitude is None) == (other.magnitude is None)
        and (one.magnitude is None or mx.array_equal(one.magnitude, other.magnitude).item())
        for one, other in pairs
    )


def delta(shapes, path: str, rank: int = 2, scale: float = 2.0, dora: bool = False, seed: int = 0) -> Delta:
    *experts, out, inputs = shapes[f"{path}.weight"]
    a, b = array(*experts, rank, inputs, seed=seed), array(*experts, out, rank, seed=seed)
    return Delta(a, b, scale, array(out, seed=seed) if dora else None)
