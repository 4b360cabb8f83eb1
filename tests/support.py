"""What several test files share: the demo loaded once, reference files, and a random model of three layers."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image, ImageDraw
from shared import Shared

import mlx_dgemma
from mlx_dgemma.checkpoint.headers import INDEX
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

DATA = Path(__file__).parent / "data"
SLIDING, FULL = "sliding_attention", "full_attention"
RED, BLUE, GREEN = (220, 40, 40), (50, 80, 220), (40, 170, 60)


# The engine of a path in float32, for tests that leave it as it is; `conftest.py` looks after each file.
engine_of = Shared(lambda path: mlx_dgemma.load(path, dtype="float32"))


def reference(name: str) -> dict[str, mx.array]:
    held = mx.load(str(DATA / f"{name}.safetensors"))
    if "pixel_values" in held:
        held["pixel_values"] = held["pixel_values"].astype(mx.float32) / 255
    return held


def gap(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


def small_config(layers: tuple[str, ...] = (SLIDING, SLIDING, FULL), **changes) -> dict:
    """config.json of a model that computes in milliseconds: window 5, canvas 4, vocabulary 40."""
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": len(layers),
        "layer_types": list(layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_global_key_value_heads": 1,
        "global_head_dim": 16,
        "sliding_window": 5,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 8,
        "max_position_embeddings": 64,
        "use_bidirectional_attention": "vision",
    }
    return {"model_type": "diffusion_gemma", "canvas_length": 4, "text_config": {**text, **changes}}


def small_model(seed: int = 0, scale: float = 0.5, **changes) -> DiffusionGemma:
    """Random weights, norms and scalars included; `scale` is the matrices' deviation, the embedding's is 0.5."""
    model = DiffusionGemma(ModelConfig.from_dict(small_config(**changes)))
    random = np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        spread = 0.2 if array.ndim == 1 else 0.5 if "embed_tokens" in name else scale
        values = random.normal(size=array.shape) * spread + (array.ndim == 1)
        weights.append((name, mx.array(values.astype(np.float32))))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def write_checkpoint(path: Path, tensors: dict[str, mx.array], config: dict | None = None, shards: int = 1) -> Path:
    """A checkpoint folder that holds these tensors, in so many shards."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or small_config()))
    if shards == 1:
        mx.save_safetensors(str(path / "model.safetensors"), tensors)
        return path
    names, index = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(str(path / file), {name: tensors[name] for name in names[i::shards]})
        index.update(dict.fromkeys(names[i::shards], file))
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def random_tokens(seed: int, *shape: int, vocab: int = 40) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32))


def square(color, x=80, y=80, half=26, size=(160, 160)):
    picture = Image.new("RGB", size, (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((x - half, y - half, x + half, y + half), fill=color)
    return picture


def strip(color, x=40):
    """35 soft tokens, half as many as a square picture has, for tests of which pictures are seen."""
    return square(color, x, 10, 9, (180, 10))


def refusal(kind, call, *arguments, **options):
    """The message of the error that a call ends in."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return str(caught.value)


def prompt_of(engine, prompt, images=(), video=None, **options):
    """A prompt as the model reads it; nothing is computed."""
    return engine.prepare(prompt, images=images, video=video, seed=0, **options).prompt


def feed(reader, tokens):
    """Hand a reader tokens whose log-probabilities do not matter."""
    return reader.feed(tokens, [0.0] * len(tokens))
