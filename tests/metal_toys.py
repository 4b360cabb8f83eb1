"""Small models and checkpoints for the paths of `test_metal.py`."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from support import FULL, SLIDING, random_tokens, small_config, small_model

import mlx_dgemma
from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.step import plain_step
from mlx_dgemma.engine import Engine
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

# Multiples of every quantization's group.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "global_head_dim": 64,
}


def write_toy(folder: Path) -> Path:
    """A checkpoint with the demo's tokenizer and random weights: a layer of each type, and a tower of one layer."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("model*"))
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"].update(
        SIZES, num_hidden_layers=2, layer_types=[SLIDING, FULL], num_attention_heads=4, num_experts=4
    )
    raw["vision_config"].update(num_hidden_layers=1, use_clipped_linears=True)
    raw["canvas_length"] = 16
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(0)

    def drawn(a: mx.array) -> mx.array:
        noise = random.random(a.shape, np.float32) - 0.5
        return mx.array(noise * 2 * a.shape[-1] ** -0.5 if a.ndim > 1 else 1 + noise / 4).astype(mx.bfloat16)

    weights = tree_map(drawn, DiffusionGemma(ModelConfig.from_dict(raw)).parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)))
    return folder


def loaded(dtype: str, folder: Path, **options) -> Engine:
    return mlx_dgemma.load(folder / "toy", dtype=dtype, ignore_memory=True, dequantize=False, **options)


def small(dtype: str) -> DiffusionGemma:
    """A small random model in a dtype; its sizes are multiples of every quantization's group."""
    mx.random.seed(0)  # or the graph of MLX's random state grows with every model whose first weights are not computed
    model = DiffusionGemma(ModelConfig.from_dict(small_config(**SIZES)))
    model.update(tree_map(lambda a: a.astype(DTYPES[dtype]), weights()))
    return model


@lru_cache
def weights() -> dict:
    """Random weights of a small model."""
    return small_model(scale=0.1, **SIZES).parameters()


def one_step(model: nn.Module) -> list[mx.array]:
    """Prefill and two steps as a graph: of every layer, the head and the conditioning."""
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 40), prefix)
    batch = CanvasBatch(model, prefix, GenerationOptions(), mx.random.key(0)[None])
    for dense in (4, 2):
        forward = plain_step(batch, batch.rows.last, batch.steps, dense)
        batch.rows = batch.rows._replace(last=forward)
    return [forward.canvas, model.logits(model.denoise(forward.canvas, prefix))]
