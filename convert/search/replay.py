"""Trajectories on their way through a stack of layers: every prefix by the encoder, every canvas by the decoder.

A layer is needed once, for all trajectories, so a stack that does not fit into memory is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_dgemma.model.attention import LayerContext
from mlx_dgemma.model.config import TextConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import LayerKV, Prefix
from mlx_dgemma.model.layers import Layer

from .trajectories import Trajectory

Hidden = tuple[mx.array, mx.array]  # a trajectory's states: of its prefix [1, L, H], of its canvases [S, C, H]
HEAD_BYTES = 256 * 2**20  # of float32 logits at once


@dataclass(frozen=True)
class Passage:
    """How a layer of one type is passed.

    Attributes:
        config: the text stack's sizes.
        kind: the layer's type.
    """

    config: TextConfig
    kind: str

    def __call__(self, layer: Layer, hidden: Hidden, scalars: tuple[mx.array, mx.array]) -> Hidden:
        """Run one layer over a trajectory: its prefix causally, then its canvases behind the layer's own prefix.

        Args:
            layer: of this type; whatever stands in its modules' places.
            hidden: the layer's inputs.
            scalars: its factors as encoder and as decoder.
        """
        before, canvases = hidden
        places = Prefix(self.config)
        cache = LayerKV(None if self.kind == "full_attention" else max(self.config.sliding_window - 1, 1))
        masks = places.encode_masks(before.shape[1])[self.kind]
        encoded = layer(before, scalars[0], LayerContext([cache], [0], [masks], 0, False))
        places.offset = offset = before.shape[1]
        assert cache.keys is not None and cache.values is not None
        shape = (canvases.shape[0], *cache.keys.shape[1:])
        cache.keys, cache.values = mx.broadcast_to(cache.keys, shape), mx.broadcast_to(cache.values, shape)
        masks = places.denoise_masks(canvases.shape[1])[self.kind]
        context = LayerContext([cache], [offset], [masks], offset, True)
        return encoded, layer(canvases, scalars[1], context)


def embed(model: DiffusionGemma, trajectory: Trajectory) -> Hidden:
    """The inputs of the first layer."""
    table, scale = model.model.decoder.embed_tokens, model.head.embed_scale
    rows = [table(mx.array(one)).astype(model.dtype) * scale for one in (trajectory.prefix, trajectory.canvases)]
    conditioning = mx.array(trajectory.conditioning).astype(model.dtype)  # zeros add nothing
    return rows[0][None], model.model.decoder.self_conditioning(rows[1], conditioning)


def through(model: DiffusionGemma, layers: Iterable[Layer], hidden: Sequence[Hidden]) -> Iterator[list[Hidden]]:
    """Run trajectories through layers, one after the other.

    Args:
        model: for its sizes and scalars.
        layers: in order; each is taken when it is needed.
        hidden: the inputs of the first, from `embed`.

    Yields:
        Each layer's outputs, evaluated.
    """
    text, states = model.config.text, list(hidden)
    encoder = model.model.encoder.language_model.layers
    for i, layer in enumerate(layers):
        passage = Passage(text, text.layer_types[i])
        scalars = encoder[i].layer_scalar, model.model.decoder.layers[i].layer_scalar
        for j, one in enumerate(states):
            states[j] = passage(layer, one, scalars)
            mx.eval(states[j])
        yield list(states)


def positions_at_once(model: DiffusionGemma) -> int:
    """Positions whose logits take `HEAD_BYTES`."""
    return max(HEAD_BYTES // (4 * model.config.text.vocab_size), 1)


def logits(
    model: DiffusionGemma, hidden: Hidden, trajectory: Trajectory, table: nn.Module | None = None
) -> Iterator[mx.array]:
    """The processed logits of a trajectory's states, some positions at a time: [n, V] float32.

    Args:
        model: for its final norm and head.
        hidden: outputs of the last layer.
        trajectory: theirs.
        table: an embedding to take in place of the model's.
    """
    states = model.model.decoder.norm(hidden[1])
    warm = mx.array(trajectory.temperatures)[:, None]
    flat = states.reshape(-1, states.shape[-1])
    temperatures = mx.broadcast_to(warm, states.shape[:2]).reshape(-1, 1)
    head = model.head if table is None else replace(model.head, table=table)
    size = positions_at_once(model)
    for start in range(0, flat.shape[0], size):
        yield head.logits(flat[None, start : start + size])[0] / temperatures[start : start + size]


def kl(expected: mx.array, found: mx.array) -> mx.array:
    """KL(expected || found) of logits [n, V], in nats, [n]."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (expected, found))
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def divergence(
    source: DiffusionGemma,
    expected: Sequence[Hidden],
    candidate: DiffusionGemma,
    found: Sequence[Hidden],
    trajectories: Sequence[Trajectory],
) -> tuple[float, float]:
    """How far a candidate's outputs are from the source's.

    Args:
        source, candidate: for their final norms and heads.
        expected, found: outputs of the last layer of each.
        trajectories: theirs.

    Returns:
        KL(source || candidate) of the processed distributions in nats, and the share of positions with the same most
        probable token, both averaged over positions.
    """
    total = agreed = 0.0
    count = 0
    for a, b, one in zip(expected, found, trajectories):
        for p, q in zip(logits(source, a, one), logits(candidate, b, one)):
            far, same = kl(p, q), p.argmax(axis=-1) == q.argmax(axis=-1)
            total, agreed, count = total + float(far.sum()), agreed + float(same.sum()), count + far.size
    return total / count, agreed / count


def outputs(model: DiffusionGemma, layer: Callable[[int], Layer], trajectories: Sequence[Trajectory]) -> list[Hidden]:
    """The last layer's outputs.

    Args:
        model: with embedding and self-conditioning.
        layer: gives the layer of a number, such as `Shelf.layer`.
        trajectories: what is replayed.
    """
    states = [embed(model, one) for one in trajectories]
    mx.eval(states)
    for found in through(model, map(layer, range(len(model.config.text.layer_types))), states):
        states = found
    return states
