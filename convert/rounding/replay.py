"""Recorded states taken through the model one layer at a time, so that one layer's weights are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dgemma.model.attention import LayerContext
from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.model.layers import SelfConditioning

from ..search.trajectories import Trajectory

ROWS = 4096  # taken through a map at once


class Replay:
    """The hidden states of recorded trajectories in front of a layer, as the encoder and the decoder have them.

    Args:
        config: the text stack's sizes.
        trajectories: what is taken through it.
        embed: tokens [N] to their scaled embeddings [N, H] float32.

    Attributes:
        h: [T, H] float32: for one trajectory after the other, the states of its prompt, then those of its canvases.
    """

    def __init__(self, config: TextConfig, trajectories: Sequence[Trajectory], embed: Callable[[mx.array], mx.array]):
        self._config = config
        self._shapes = [(len(one.prefix), *one.canvases.shape) for one in trajectories]
        self._conditioning = [one.conditioning for one in trajectories]
        parts = [part for one in trajectories for part in (mx.array(one.prefix), mx.array(one.canvases).reshape(-1))]
        self.h = embed(mx.concatenate(parts))
        mx.eval(self.h)

    def condition(self, module: SelfConditioning) -> None:
        """Add the conditioning to the canvases."""
        parts = []
        for (start, middle, end), (_, count, length), known in zip(self._spans(), self._shapes, self._conditioning):
            canvases = self.h[middle:end].reshape(count, length, -1)
            made = module(canvases, mx.array(known).astype(mx.float32))
            parts += [self.h[start:middle], made.reshape(end - middle, -1)]
            mx.eval(made)
        self.h, self._conditioning = mx.concatenate(parts), []
        mx.eval(self.h)

    def conditioning(self) -> mx.array:
        """[N, H] float32, the rows that condition canvases; those of first steps are left out."""
        kept = np.concatenate([one[one.any(axis=(1, 2))] for one in self._conditioning])
        return mx.array(kept).reshape(-1, self._config.hidden_size).astype(mx.float32)

    def attend(self, index: int, attention: Callable[[mx.array, LayerContext], mx.array]) -> mx.array:
        """What a layer's attention makes of the states.

        Args:
            index: the layer's place in the stack.
            attention: of states [B, L, H] in a context, to [B, L, D].

        Returns:
            [T, D].
        """
        kind, parts = self._config.layer_types[index], []
        for (start, middle, end), (length, count, size) in zip(self._spans(), self._shapes):
            prefix = Prefix(self._config)
            cache, mask = prefix.layers[index], prefix.encode_masks(length)[kind]
            encoded = attention(self.h[None, start:middle], LayerContext([cache], [0], [mask], 0, False))
            prefix.offset = length
            mask = prefix.denoise_masks(size)[kind]
            context = LayerContext([cache] * count, [length] * count, [mask] * count, length, True)
            denoised = attention(self.h[middle:end].reshape(count, size, -1), context)
            parts += [encoded[0], denoised.reshape(count * size, -1)]
            mx.eval(parts[-2:])
        return mx.concatenate(parts)

    def factors(self, encoder: mx.array, decoder: mx.array) -> mx.array:
        """[T, 1], the encoder's layer scalar for prompts and the decoder's for canvases."""
        parts = []
        for start, middle, end in self._spans():
            parts += [mx.broadcast_to(encoder, (middle - start,)), mx.broadcast_to(decoder, (end - middle,))]
        return mx.concatenate(parts)[:, None]

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Where the prompt of each trajectory begins, where its canvases do, and where they end."""
        start = 0
        for length, count, size in self._shapes:
            yield start, start + length, (end := start + length + count * size)
            start = end


def by_rows(function: Callable[..., mx.array], *rows: mx.array) -> mx.array:
    """A function of rows [T, ...], of some at a time."""
    parts = []
    for start in range(0, max(rows[0].shape[0], 1), ROWS):
        parts.append(function(*(one[start : start + ROWS] for one in rows)))
        mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)
