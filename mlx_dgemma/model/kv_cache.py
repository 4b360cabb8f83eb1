"""The KV cache of the prefix: the keys and values of all positions encoded so far.

Full layers keep every position. Sliding layers keep a ring of the last `window - 1` positions, which are all that the
next token can attend to. Attention does not depend on the order of its keys (RoPE was applied to them), so the ring is
never reordered. A canvas writes its keys and values into the free slots behind the prefix, and the next canvas
overwrites them: a denoising step neither copies nor changes the prefix.
"""

from __future__ import annotations

from copy import copy
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from . import device
from .config import TextConfig
from .masks import Mask

BUFFER_STEP = 256  # slots; buffers grow by multiples of this
Handles = tuple[mx.array | None, ...]  # the arrays of a layer


class LayerKV:
    """Keys and values of one layer, [B, heads, slots, D].

    Args:
        window_slots: slots of the ring of a sliding layer; None for a full layer.
        capacity: slots that are allocated at once.

    Attributes:
        padding: left padding of each row, [B] int32, or None where no row has any.
        fresh: keys and values of the last pass of `ahead`, until `accept`.
    """

    kept: ClassVar[tuple[str, ...]] = ("keys", "values")  # attributes that hold the prefix, with slots on axis 2
    names: ClassVar[tuple[str, ...]] = kept  # of all arrays

    def __init__(self, window_slots: int | None, capacity: int = 0):
        self.window_slots = window_slots
        self.capacity = capacity
        self.padding: mx.array | None = None
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.fresh: tuple[mx.array, ...] = ()
        self.stages: list[mx.array] = []  # of the last attention to these keys, if it was computed in chunks

    @property
    def arrays(self) -> Handles:
        """All arrays, by `names`; None where there is none yet."""
        return tuple(getattr(self, name) for name in self.names)

    @arrays.setter
    def arrays(self, arrays: Handles) -> None:
        for name, array in zip(self.names, arrays):
            setattr(self, name, array)

    def handles(self) -> Handles:
        """The present arrays as new objects, which later writes do not change."""
        return tuple(_handle(array) for array in self.arrays)

    @property
    def stage(self) -> Any:
        """What a pass writes, for `device.Queue`."""
        return _handle(self.keys)

    def used(self, offset: int) -> int:
        """How many slots hold the prefix after `offset` positions."""
        return offset if self.window_slots is None else min(offset, self.window_slots)

    def extend(self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1) -> tuple[mx.array, mx.array]:
        """Append L positions.

        Args:
            keys: [B, heads, L, D].
            values: [B, heads, L, D].
            offset: positions that the prefix holds.
            alignment: the number of keys that is returned is a multiple of it, where earlier keys are returned too.

        Returns:
            The keys and values that these positions attend to; a mask decides which of them each position sees. Free
            slots stand behind them, or in front of those of a full ring.
        """
        length = keys.shape[2]
        used = self.used(offset)
        if self.window_slots is None or offset + length <= self.window_slots:
            self._write(keys, values, used, alignment)
            return self._first(used + length, alignment)
        seen = keys, values
        if used and self.keys is not None and self.values is not None:
            free = -(used + length) % alignment
            seen = (
                mx.concatenate([self.keys[:, :, :free], self.keys[:, :, :used], keys], axis=2),
                mx.concatenate([self.values[:, :, :free], self.values[:, :, :used], values], axis=2),
            )
        first = max(length - self.window_slots, 0)
        self._write_ring(keys[:, :, first:], values[:, :, first:], offset + first)
        return seen

    def with_canvas(
        self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1, length: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """Write the canvas, or its first positions, into the free slots behind the prefix.

        Args:
            keys: [B, heads, L, D].
            values: [B, heads, L, D].
            offset: positions that the prefix holds.
            alignment: the number of keys that is returned is a multiple of it.
            length: positions of the canvas; those behind the first L keep what an earlier pass wrote. None: L.

        Returns:
            The keys and values of prefix and canvas, and behind them free slots up to a multiple of `alignment`, which
            divides `BUFFER_STEP`.
        """
        used = self.used(offset)
        self._write(keys, values, used, alignment)
        return self._first(used + (length or keys.shape[2]), alignment)

    def ahead(self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1) -> tuple[mx.array, mx.array]:
        """As `with_canvas`, for positions that `accept` may make part of the prefix."""
        self.fresh = keys, values
        return self.with_canvas(keys, values, offset, alignment)

    def accept(self, offset: int, count: int) -> None:
        """Make the first `count` positions that `ahead` wrote part of the prefix, which holds `offset`."""
        fresh, self.fresh, end = self.fresh, (), offset + count
        if self.window_slots is None or end <= self.window_slots:
            return  # they lie where they belong
        assert fresh, "positions are accepted that no pass of `ahead` wrote"
        start = max(end - self.window_slots, self.window_slots, offset)
        # Not read from the buffers, which could not be written in place while they are read.
        keys, values = (a[:, :, start - offset : count] for a in fresh)
        self._write_ring(keys, values, start)

    def _write_ring(self, keys: mx.array, values: mx.array, position: int) -> None:
        """Write at most a ring full of positions, the first of which is given."""
        assert self.window_slots is not None
        start = position % self.window_slots
        head = self.window_slots - start  # up to the end of the ring; the rest go to its beginning
        self._write(keys[:, :, :head], values[:, :, :head], start)
        if head < keys.shape[2]:
            self._write(keys[:, :, head:], values[:, :, head:], 0)

    def _write(self, keys: mx.array, values: mx.array, at: int, alignment: int = 1) -> None:
        end = at + keys.shape[2]
        self._reserve(end + -end % alignment, keys, values)  # buffers that were trimmed may end in between
        assert self.keys is not None and self.values is not None
        self.keys[:, :, at:end] = keys
        self.values[:, :, at:end] = values

    def _first(self, slots: int, alignment: int) -> tuple[mx.array, mx.array]:
        slots += -slots % alignment
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, :slots], self.values[:, :, :slots]

    def _reserve(self, slots: int, keys: mx.array, values: mx.array) -> None:
        have = 0 if self.keys is None else self.keys.shape[2]
        if slots <= have:
            return
        total = -(-max(slots, self.capacity) // BUFFER_STEP) * BUFFER_STEP

        def grown(old: mx.array | None, like: mx.array) -> mx.array:
            new = mx.zeros((*like.shape[:2], total - have, like.shape[3]), like.dtype)
            return new if old is None else mx.concatenate([old, new], axis=2)

        self.keys, self.values = grown(self.keys, keys), grown(self.values, values)

    def trim(self, offset: int) -> None:
        """Free the slots that do not hold the prefix of `offset` positions."""
        used = self.used(offset)
        for name in self.names:
            array = getattr(self, name)
            if name not in self.kept:
                setattr(self, name, None)
            elif array is not None and array.shape[2] > used:
                setattr(self, name, mx.contiguous(array[:, :, :used]))
        mx.eval([array for array in self.arrays if array is not None])

    def select_rows(self, index: mx.array) -> None:
        """Keep these rows of the batch."""
        self.arrays = tuple(None if array is None else array[index] for array in self.arrays)
        self.padding = None if self.padding is None else self.padding[index]


class Prefix:
    """The encoded positions of a batch: one `LayerKV` per layer, and how many positions they hold.

    Args:
        config: the text stack's sizes.
        batch_size: number of rows.
        capacity: positions that the full layers allocate at once; beyond it they grow in steps.

    Attributes:
        offset: positions that are encoded, left padding included.
        padding: left padding of each row, [B] int32, or None where no row has any.
        low_memory: whether less may be in flight.
    """

    def __init__(self, config: TextConfig, batch_size: int = 1, capacity: int = 0):
        self.window = config.sliding_window
        self.batch_size = batch_size
        self.low_memory = False
        self.offset = 0
        self.padding: mx.array | None = None
        self.layers = [
            LayerKV(None, capacity) if kind == "full_attention" else LayerKV(max(self.window - 1, 1))
            for kind in config.layer_types
        ]
        self._window_slots = max(self.window - 1, 1)
        self._rewind_point: tuple[int, list[Handles]] | None = None

    @property
    def state(self) -> list[mx.array]:
        """All arrays of the cache, to be evaluated after each chunk of a prompt."""
        return [a for layer in self.layers for a in layer.arrays if a is not None]

    @property
    def stages(self) -> list[Any]:
        """The layers' keys and chunks of attention, in the order in which they are computed, for `device.Queue`."""
        return [stage for layer in self.layers for stage in (layer.stage, *layer.stages)]

    @property
    def in_flight(self) -> int:
        """Bytes that a `device.Queue` of these stages may have in flight: more where attention goes by groups."""
        limit = device.GROUPS_LIMIT if any(layer.stages for layer in self.layers) else device.SOFT_LIMIT
        return limit // device.LOW_MEMORY if self.low_memory else limit

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, preallocated slots and the rewind point included."""
        saved = [a for ring in self._rewind_point[1] for a in ring if a is not None] if self._rewind_point else []
        return sum(a.nbytes for a in [*self.state, *saved])

    def rope_offset(self) -> int | mx.array:
        """Position of the next token for RoPE: an int, or [B] if rows are padded."""
        return self.offset if self.padding is None else self.offset - self.padding

    def pad(self, mask: Any) -> None:
        """Record the left padding of the tokens that are encoded next.

        Args:
            mask: [B, L], false on padding.

        Raises:
            OptionError: a padded position comes after a real one, or the shape is wrong.
        """
        real = np.asarray(mask).astype(bool)
        if real.ndim != 2 or real.shape[0] != self.batch_size:
            raise OptionError(f"mask has the shape {real.shape}; it should be [batch_size = {self.batch_size}, L].")
        count = (~real).sum(axis=1)
        if not count.any():
            return
        before = np.zeros(self.batch_size, np.int32) if self.padding is None else np.asarray(self.padding)
        if (np.diff(real.astype(np.int8), axis=1) < 0).any() or ((before < self.offset) & (count > 0)).any():
            raise OptionError("mask pads positions behind real ones; only padding on the left is possible.")
        self.padding = mx.array((before + count).astype(np.int32))
        for layer in self.layers:
            layer.padding = self.padding

    def _window_positions(self) -> np.ndarray:
        """The position that each used slot of the ring holds."""
        last, used = self.offset - 1, min(self.offset, self._window_slots)
        return last - (last - np.arange(used)) % self._window_slots

    def _key_positions(self, length: int, sliding: bool) -> np.ndarray:
        earlier = self._window_positions() if sliding else np.arange(self.offset)
        return np.concatenate([earlier, np.arange(self.offset, self.offset + length)])

    def encode_masks(self, length: int, spans: np.ndarray | None = None, alignment: int = 1) -> dict[str, Mask]:
        """Causal masks for `length` new positions, by layer type.

        Args:
            length: L, the number of new positions.
            spans: [B, L] ids of image spans, 0 for text; a span attends to itself in both directions.
            alignment: as `LayerKV.extend` takes it.
        """
        sliding = self._key_positions(length, True)
        if self.offset and self.offset + length > self._window_slots:
            hidden = np.full(-len(sliding) % alignment, self.offset - self.window)  # of the slots in front
            sliding = np.concatenate([hidden, sliding])
        queries = np.arange(self.offset, self.offset + length)
        return {
            "full_attention": Mask(self._key_positions(length, False), queries, None, self._padding(), spans),
            "sliding_attention": Mask(sliding, queries, self.window, self._padding(), spans),
        }

    def denoise_masks(self, length: int) -> dict[str, Mask]:
        """Masks for a canvas of `length` positions, which attend to everything but padding, by layer type."""
        return {
            kind: Mask(self._key_positions(length, kind == "sliding_attention"), padding=self._padding())
            for kind in ("full_attention", "sliding_attention")
        }

    def accept(self, count: int) -> None:
        """Extend the prefix by the first `count` positions of the last pass of `encode_ahead`."""
        for layer in self.layers:
            layer.accept(self.offset, count)
        self.offset += count

    def handles(self) -> list[Handles]:
        """The layers' present buffers, for `restore`. While they are kept, the next write copies the buffers."""
        return [layer.handles() for layer in self.layers]

    def restore(self, handles: list[Handles]) -> None:
        """Undo all writes since `handles` was called, of the last layers where some were taken from its beginning.

        Lazy writes are then never computed.
        """
        for layer, arrays in zip(self.layers[len(self.layers) - len(handles) :], handles):
            layer.arrays, layer.stages = arrays, []

    def _padding(self) -> np.ndarray:
        return np.zeros(1, np.int32) if self.padding is None else np.asarray(self.padding)

    def set_rewind_point(self) -> None:
        """Save this state, so that `rewind` can return to it after the rings have been overwritten."""
        rings = [layer.handles() for layer in self.layers if layer.window_slots]
        self._rewind_point = (self.offset, rings)

    def rewindable_length(self, offset: int) -> int:
        """How many positions `rewind(offset)` would keep."""
        if offset >= self.offset or self.offset <= self._window_slots:
            return min(offset, self.offset)
        saved = self._rewind_point[0] if self._rewind_point else 0
        if saved <= self._window_slots:  # the saved rings hold every position
            return min(offset, saved)
        return saved if saved <= offset else 0

    def rewind(self, offset: int) -> int:
        """Drop the positions from `offset` on, or more, if the rings do not hold that state any more.

        Returns:
            How many positions are left, at most `offset`.
        """
        kept = self.rewindable_length(offset)
        if kept < self.offset and self.offset > self._window_slots:
            self._restore_rings()
        self.offset = kept
        if self._rewind_point and self._rewind_point[0] > kept:
            self._rewind_point = None
        return kept

    def _restore_rings(self) -> None:
        saved = self._rewind_point[1] if self._rewind_point else []
        for layer, arrays in zip((one for one in self.layers if one.window_slots), saved):
            layer.arrays, layer.stages = tuple(_handle(array) for array in arrays), []

    def undo(self, offset: int, length: int) -> bool:
        """Leave a pass over `length` tokens that was interrupted; the prefix held `offset` positions before.

        Slots behind the prefix may have been written, which changes nothing. Where a ring may have been overwritten,
        the prefix goes back to its rewind point.

        Returns:
            Whether that was possible; if not, the prefix must not be used any more.
        """
        self.offset = offset
        if offset + length <= self._window_slots:
            return True
        if self._rewind_point is None:
            return False
        self.offset = self._rewind_point[0]
        self._restore_rings()
        return True

    def fork(self) -> Prefix:
        """A copy that can be extended independently; buffers are copied when one of the two writes."""
        other = copy(self)
        other.layers = [copy(layer) for layer in self.layers]
        other.restore(self.handles())
        return other

    def trim(self) -> None:
        """Free the unused slots, and a rewind point at the end of the prefix."""
        if self._rewind_point and self._rewind_point[0] == self.offset:
            self._rewind_point = None
        for layer in self.layers:
            layer.trim(self.offset)  # one layer's copy at a time

    def to_arrays(self) -> tuple[dict[str, mx.array], int, int]:
        """(arrays by name, offset, offset of the rewind point or 0), for `load_arrays`."""
        arrays: dict[str, mx.array] = {}
        rings = iter(self._rewind_point[1] if self._rewind_point else [])
        for i, layer in enumerate(self.layers):
            held = {"": layer.arrays}
            if self._rewind_point and layer.window_slots:
                held["mark."] = next(rings)
            for name, found in held.items():
                for kind, array in zip(layer.kept, found):
                    if array is not None:
                        arrays[f"{name}{i}.{kind}"] = array
        return arrays, self.offset, self._rewind_point[0] if self._rewind_point else 0

    def load_arrays(self, arrays: dict[str, mx.array], offset: int, mark: int) -> None:
        """Take over what `to_arrays` returned for a prefix of the same model.

        Args:
            arrays: by name.
            offset: positions that they hold.
            mark: offset of the rewind point, or 0.

        Raises:
            KeyError: an array is missing.
        """
        self.offset = offset
        for i, layer in enumerate(self.layers):
            layer.arrays = tuple(arrays[f"{i}.{kind}"] for kind in layer.kept)
        rings = [i for i, layer in enumerate(self.layers) if layer.window_slots]
        saved: list[Handles] = (
            [tuple(arrays[f"mark.{i}.{kind}"] for kind in LayerKV.kept) for i in rings] if mark else []
        )
        self._rewind_point = (mark, saved) if mark else None

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows of the batch, in this order, and drop the others and the rewind point."""
        index = mx.array(rows)
        for layer in self.layers:
            layer.select_rows(index)
        if self.padding is not None:
            self.padding = self.padding[index]
        self.batch_size = len(rows)
        self._rewind_point = None


def _handle(array: mx.array | None) -> mx.array | None:
    """The same array as a new object, which assignments to slices of the old object do not change.

    `mx.array` would copy it.
    """
    return None if array is None else array.astype(array.dtype)
