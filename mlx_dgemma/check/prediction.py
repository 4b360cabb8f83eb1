"""From measured parts to a predicted denoising step."""

from __future__ import annotations

from typing import NamedTuple

CLOSE = 0.2  # relative error that a prediction is allowed


class Parts(NamedTuple):
    """Milliseconds of the parts of a step, each started and awaited alone."""

    layers: float  # a pass through `depth` layers, embedding and final norm included
    depth: int
    head: float  # the pass over the vocabulary, and the conditioning from the likely tokens
    dense_head: float  # the same with every position conditioned on the whole vocabulary
    sampler: float  # acceptance, noise and the stop rule
    wait: float  # of these, what starting and awaiting an evaluation takes


def layer_ms(parts: Parts) -> float:
    """Milliseconds of one layer, averaged over sliding and full ones."""
    return max(parts.layers - parts.wait, 0) / parts.depth


def predicted_ms(parts: Parts, layers: int, dense: bool = False) -> float:
    """Milliseconds of a step with so many layers.

    A step waits once, and each part was awaited on its own, so the waits of all but one are taken off.
    """
    head = parts.dense_head if dense else parts.head
    rest = max(head - parts.wait, 0) + max(parts.sampler - parts.wait, 0)
    return layers * layer_ms(parts) + rest + parts.wait


def is_close(predicted: float, measured: float) -> bool:
    """Whether a prediction is near enough to what was measured."""
    return abs(predicted - measured) <= CLOSE * measured
