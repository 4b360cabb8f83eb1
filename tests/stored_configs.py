"""Models of random configurations, whose weights are made anew from a seed instead of being stored."""

import json
import zlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from support import DATA

from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

FILE = DATA / "random_configs.safetensors"
TEMPERATURE = 0.8  # of the logits that the second step is conditioned on
MOST = 4  # positions of an output that are kept, evenly spread


def model_of(raw: dict, seed: int) -> DiffusionGemma:
    """The model of a config.json's content with random weights."""
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    model.load_weights([(name, mx.array(values(name, shape, seed))) for name, shape in shapes.items()])
    return model


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A tensor's values: they depend on seed and name alone. `RandomState` draws the same with every NumPy."""
    drawn = np.random.RandomState([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith(("_min", "_max")):  # bounds of clipped maps
        drawn = (1.5 + np.abs(drawn)) * (-1 if name.endswith("_min") else 1)
    elif len(shape) == 1:  # norms and scalars
        drawn = 1 + 0.2 * drawn
    else:
        drawn = drawn * (0.5 if "embed" in name else 0.5 * shape[-1] ** -0.5)
    return drawn.astype(np.float32)


def kept(array: Any) -> np.ndarray:
    """`MOST` positions of an output [B, L, N], evenly spread."""
    array = np.asarray(array)
    return array[:, np.linspace(0, array.shape[1] - 1, min(MOST, array.shape[1])).astype(int)]


def cases() -> list[dict]:
    """The stored cases: "config", "seed", "given" arrays, and "expected" outputs of Transformers."""
    held, metadata = mx.load(str(FILE), return_metadata=True)
    found = json.loads(metadata["cases"])
    for number, case in enumerate(found):
        for part in ("given", "expected"):
            head = f"{number:02}.{part}."
            case[part] = {name.removeprefix(head): one for name, one in held.items() if name.startswith(head)}
    return found


def computed(model: DiffusionGemma, given: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """Our outputs of a case, under Transformers' names."""
    tokens, canvas = given["input_ids"], given["canvas"]
    images = (given["pixels"], given["positions"]) if "pixels" in given else None
    prefix = model.new_prefix()
    found = {"hidden": model.encode(tokens, prefix, images=images)}
    first = found["logits"] = model.logits(model.denoise(canvas, prefix))
    found["conditioned"] = model.logits(model.denoise(canvas, prefix, model.condition(first / TEMPERATURE)))
    model.encode(given["committed"], prefix)
    found["second"] = model.logits(model.denoise(canvas[:, ::-1], prefix))
    if "mask" in given:
        batch = model.new_prefix(2)
        rows = mx.concatenate([tokens, tokens[:, ::-1]])
        model.encode(rows, batch, mask=np.asarray(given["mask"]) != 0)
        found["padded"] = model.logits(model.denoise(mx.concatenate([canvas, canvas[:, ::-1]]), batch))
    return {name: kept(array) for name, array in found.items()}
