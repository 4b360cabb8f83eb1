"""Recorded states taken through the model one layer at a time, so that one layer's weights are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.model.attention import LayerContext
from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.functions import rms_norm
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.model.layers import Layer, SelfConditioning

from .states import Trajectory

Embed = Callable[[mx.array], mx.array]


class Replay:
    """The hidden states of recorded trajectories in front of a layer, encoder's and decoder's.

    Args:
        config: the text stack's sizes.
        trajectories: what is taken through it.
        embed: tokens [...] to their scaled embeddings [..., H] float32.

    Attributes:
        prefixes: [1, L, H] of each trajectory.
        canvases: [S, C, H] of each trajectory.
    """

    def __init__(self, config: TextConfig, trajectories: Sequence[Trajectory], embed: Embed):
        self.config = config
        self.conditioning = [mx.array(one.conditioning).astype(mx.float32) for one in trajectories]
        self.prefixes = [embed(mx.array([one.prefix], mx.int32)) for one in trajectories]
        self.canvases = [embed(mx.array(one.canvases)) for one in trajectories]
        mx.eval(self.prefixes, self.canvases)

    def condition(self, module: SelfConditioning) -> None:
        """Add the conditioning to the canvases."""
        for i, conditioning in enumerate(self.conditioning):
            self.canvases[i] = module(self.canvases[i], conditioning)
            mx.eval(self.canvases[i])
        self.conditioning = []

    def run(self, layer: Layer, index: int, scalars: tuple[mx.array, mx.array], keep: bool) -> None:
        """Take all states through a layer.

        Args:
            layer: the layer.
            index: its place in the stack.
            scalars: its factor as encoder and as decoder.
            keep: whether the states go on behind the layer, or only modules in it look at their inputs.
        """
        kind = self.config.layer_types[index]
        for i, (h, canvas) in enumerate(zip(self.prefixes, self.canvases)):
            prefix = Prefix(self.config)
            cache = prefix.layers[index]
            mask = prefix.encode_masks(h.shape[1])[kind]
            encoded = layer(h, scalars[0], LayerContext([cache], [0], [mask], 0, False))
            prefix.offset = h.shape[1]
            count, length = canvas.shape[:2]
            mask = prefix.denoise_masks(length)[kind]
            context = LayerContext([cache] * count, [prefix.offset] * count, [mask] * count, prefix.offset, True)
            denoised = layer(canvas, scalars[1], context)
            mx.eval(encoded, denoised)
            if keep:
                self.prefixes[i], self.canvases[i] = encoded, denoised


class Inputs(nn.Module):
    """Keeps the rows that a module gets, and hands them on to it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module, self._rows = module, []

    def __call__(self, x: mx.array, *more: mx.array) -> mx.array:
        """The module's result."""
        self._rows.append((x.reshape(-1, x.shape[-1]), *more))
        return self._module(x, *more)

    def rows(self) -> tuple[mx.array, ...]:
        """All rows, [N, ...] each."""
        return tuple(mx.concatenate(part) for part in zip(*self._rows))
