"""`Candidate`: a source whose weights were rounded, layer by layer, for `replay`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint.build import suit_device
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.layers import Layer

from ..recipes import Quantization, Recipe, part_of
from . import replay
from .replay import Hidden
from .shelf import LAYERS, Shelf
from .trajectories import Trajectory

Rounding = Callable[[str, mx.array], mx.array]  # (module path, its weight) -> what it becomes
PIECE_BYTES = 256 * 2**20  # of a weight in float32 that is rounded at once


def rounded(weight: mx.array, width: Quantization | None, stored: mx.Dtype) -> mx.array:
    """What a weight becomes at a width, in its own dtype; `stored` is the dtype of scales."""
    if width is None:
        return weight
    size = max(PIECE_BYTES // (4 * weight[0].size), 1)
    parts = []
    for start in range(0, len(weight), size):
        packed = mx.quantize(weight[start : start + size].astype(stored), **width.as_dict)
        parts.append(mx.dequantize(*packed, **width.as_dict).astype(weight.dtype))
        mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def by_recipe(recipe: Recipe, stored: mx.Dtype) -> Rounding:
    """The rounding to nearest that a conversion with this recipe does."""
    return lambda path, weight: rounded(weight, recipe.fitted(path, weight.shape[-1]), stored)


class Candidate:
    """The weights of a shelf, rounded whenever a layer is taken.

    Args:
        shelf: the source.
        rounding: of every module that a conversion quantizes.
    """

    def __init__(self, shelf: Shelf, rounding: Rounding):
        self.shelf, self.rounding = shelf, rounding

    def layer(self, index: int) -> Layer:
        """A layer with rounded weights."""
        layer = Layer(self.shelf.config.text, self.shelf.config.text.layer_types[index])
        self._fill(layer, self.shelf.layer(index), f"{LAYERS}{index}.")
        suit_device(layer)
        return layer

    def trunk(self) -> DiffusionGemma:
        """A model with rounded embedding and self-conditioning; its layers are not filled."""
        source, model = self.shelf.trunk(), DiffusionGemma(self.shelf.config)
        decoder, old = model.model.decoder, source.model.decoder
        decoder.norm = old.norm
        self._fill(decoder.self_conditioning, old.self_conditioning, "model.decoder.self_conditioning.")
        self._fill(decoder.embed_tokens, old.embed_tokens, "model.decoder.embed_tokens.")
        model.model.encoder.language_model = source.model.encoder.language_model
        for layer, like in zip(decoder.layers, old.layers):
            layer.layer_scalar = like.layer_scalar
        model.eval()
        return model

    def _fill(self, module: nn.Module, source: nn.Module, prefix: str) -> None:
        parameters: Any = tree_flatten(source.parameters())
        for name, array in parameters:
            path = f"{prefix}{name}".removesuffix(".weight")
            new = self.rounding(path, array) if part_of(path) else array
            mx.eval(new)
            module.load_weights([(name, new)], strict=False)
        module.eval()


def measured(
    shelf: Shelf, rounding: Rounding, trajectories: Sequence[Trajectory], expected: Sequence[Hidden]
) -> tuple[float, float]:
    """What a candidate's outputs come to: as `replay.divergence`.

    Args:
        shelf: the source.
        rounding: the candidate's.
        trajectories: of the source.
        expected: the source's outputs over them, from `replay.outputs`.
    """
    candidate = Candidate(shelf, rounding)
    model = candidate.trunk()
    found = replay.outputs(model, candidate.layer, trajectories)
    return replay.divergence(shelf.trunk(), expected, model, found, trajectories)
