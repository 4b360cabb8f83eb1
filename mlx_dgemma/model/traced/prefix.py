"""A prefix inside a traced pass: its arrays and its length are arguments, so one trace serves many lengths.

Shapes must not depend on the length. Attention therefore takes as many slots as the trace was made for, and a mask or
the softmax's kernel hides those that hold nothing yet.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..kv_cache import LayerKV


class Slots(NamedTuple):
    """What a trace over one token knows of a layer's slots."""

    seen: int  # that attention takes, from the first one on
    ring_full: bool  # whether the token goes behind a full ring, and all slots but padding are seen


class TracedKV(LayerKV):
    """Keys and values of one layer, [1, heads, slots, D], of a pass over one token.

    Args:
        keys, values: the layer's buffers, which have a slot for the token.
        offset: [1] int32, positions of the prefix.
        slots: what is known of them.
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array, slots: Slots, window_slots: int | None):
        super().__init__(window_slots)
        self.keys, self.values = keys, values
        self._offset, self._slots = offset, slots

    def with_canvas(
        self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1, length: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """As `LayerKV.with_canvas`, of one position."""
        assert self.keys is not None and self.values is not None
        seen = self._slots.seen
        if self._slots.ring_full and self.window_slots is not None:
            self._write(keys, values, self.window_slots)
            seen += -seen % alignment
        else:  # a launch more, which computes where this is in memory
            self.keys = mx.slice_update(self.keys, keys, self._offset, (2,))
            self.values = mx.slice_update(self.values, values, self._offset, (2,))
        return self.keys[:, :, :seen], self.values[:, :, :seen]


class TracedMask:
    """The mask of one query, as attention takes it.

    Args:
        offset: as in `TracedKV`.
        slots: what is known of the layer's slots.
    """

    def __init__(self, offset: mx.array, slots: Slots):
        self.keys = np.arange(slots.seen)
        self.queries = self.keys[:1]
        one = mx.ones((1,), mx.int32)
        self.leading: tuple[int | mx.array, int] = (
            (slots.seen, 0) if slots.ring_full else (mx.concatenate([offset + 1, 0 * one, one]), 0)
        )
        self.all_keys = None if slots.ring_full else (mx.arange(slots.seen) <= offset)[None, None, None]


class TracedPrefix:
    """As much of `Prefix` as a pass over one token asks for."""

    def __init__(self, layers: list[TracedKV], offset: mx.array):
        self.layers, self.offset, self._offset = layers, 0, offset

    def rope_offset(self) -> mx.array:
        """[1], the position of the token."""
        return self._offset
