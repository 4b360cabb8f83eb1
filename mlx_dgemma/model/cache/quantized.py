"""Quantized keys and values of full layers.

In a full layer keys and values are the same output of `k_proj`: the values are its norm, the keys are that norm times
a weight, turned by RoPE. The values alone are kept, quantized in groups along a head, and keys are computed of them.

A position is quantized when it is encoded, and from then on every position sees it so, itself included. What is
encoded is therefore the same at once and in chunks. A canvas sees its own keys and values as they are; they are no part
of the prefix and are kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ...errors import OptionError
from ..config import TextConfig
from ..kv_cache import BUFFER_STEP, LayerKV

BITS = (8, 4)
GROUP = {8: 64, 4: 32}  # numbers that share a scale and a bias

Packed = tuple[mx.array, mx.array, mx.array]  # codes, scales and biases of slots
# (all slots, group size, bits, the first slot and the one behind the last, position of the first, by kernel)
# -> keys, values
Unpack = Callable[[Packed, int, int, tuple[int, int], Any, bool], Iterable[mx.array]]


def check(config: TextConfig, bits: int | None) -> None:
    """Refuse what cannot be quantized.

    Raises:
        OptionError: unknown bits, or heads that are no multiple of a group.
    """
    if bits is None:
        return
    if bits not in BITS:
        raise OptionError(f"kv_bits is {bits!r}; it should be 8, 4 or None.")
    if "full_attention" not in config.layer_types:
        raise OptionError(f"kv_bits is {bits}, but this model has no layers of full attention; leave it out.")
    dim = config.kv_shape("full_attention")[1]
    if dim % GROUP[bits]:
        raise OptionError(
            f"kv_bits is {bits}, which takes heads of a multiple of {GROUP[bits]}, but this model's have {dim}; "
            "leave it out."
        )


def bytes_per_position(heads: int, dim: int, bits: int, itemsize: int) -> int:
    """Bytes of a position of a full layer: the codes, and a scale and a bias for each group."""
    return heads * (dim * bits // 8 + 2 * (dim // GROUP[bits]) * itemsize)


class Part(NamedTuple):
    """Keys and values of neighbouring positions."""

    start: int  # the first position
    keys: mx.array  # [B, heads, N, D]
    values: mx.array  # [B, heads, N, D]


class QuantizedKV(LayerKV):
    """Quantized values of a full layer, of which keys are computed.

    Args:
        capacity: slots that are allocated at once.
        bits: 8 or 4.
        unpack: computes keys and values, as `Attention.unpack`.
        by_kernel: by a custom kernel.

    Attributes:
        codes: [B, heads, slots, D * bits / 32] uint32.
        scales, biases: [B, heads, slots, D / group].
        keys, values: of a canvas, [B, heads, C, D].
    """

    kept: ClassVar[tuple[str, ...]] = ("codes", "scales", "biases")
    names: ClassVar[tuple[str, ...]] = (*kept, "keys", "values")

    def __init__(self, capacity: int, bits: int, unpack: Unpack, by_kernel: bool = False):
        super().__init__(None, capacity)
        self.bits, self.group_size, self.unpack, self.by_kernel = bits, GROUP[bits], unpack, by_kernel
        self.codes: mx.array | None = None
        self.scales: mx.array | None = None
        self.biases: mx.array | None = None

    @property
    def stage(self) -> Any:
        """What a pass writes, for `device.Queue`."""
        codes, _, _, keys, _ = self.handles()
        return [one for one in (codes, keys) if one is not None]

    def extend(self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1) -> tuple[mx.array, mx.array]:
        """As `LayerKV.extend`. The keys are those of the quantized values, those of the new positions included."""
        self.keys = self.values = None
        end = offset + values.shape[2]
        # MLX's kernel for CUDA reads an array that is transposed as if it were not.
        found = mx.quantize(mx.contiguous(values), self.group_size, self.bits)
        for name, new in zip(self.kept, found):
            held = self._room(getattr(self, name), new, end + -end % alignment)
            held[:, :, offset:end] = new
            setattr(self, name, held)
        return self.part(0, end + -end % alignment)[1:]  # free slots hold zeros, or what was rewound

    def ahead(self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1) -> tuple[mx.array, mx.array]:
        """As `extend`: what lies behind the prefix is no part of it."""
        return self.extend(keys, values, offset, alignment)

    def with_canvas(
        self, keys: mx.array, values: mx.array, offset: int, alignment: int = 1, length: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """As `LayerKV.with_canvas`; keys and values of the canvas are not quantized."""
        computed = keys.shape[2]
        if length is None or length == computed:
            self.keys, self.values = keys, values
        else:
            assert self.keys is not None and self.values is not None
            self.keys[:, :, :computed], self.values[:, :, :computed] = keys, values
        (whole,) = self.parts(offset, True, offset + 1, -(offset + self.keys.shape[2]) % alignment)
        return whole[1:]

    def part(self, start: int, end: int) -> Part:
        """Keys and values of these positions of the prefix."""
        assert self.codes is not None and self.scales is not None and self.biases is not None
        packed = self.codes, self.scales, self.biases
        position = start if self.padding is None else start - self.padding
        return Part(start, *self.unpack(packed, self.group_size, self.bits, (start, end), position, self.by_kernel))

    def parts(self, offset: int, canvas: bool, size: int, free: int = 0) -> Iterator[Part]:
        """All positions, at most `size` at once but for the last part, which has those of the canvas, too.

        Args:
            offset: positions of the prefix.
            canvas: whether those of the canvas come behind them.
            size: positions.
            free: zeros that stand behind the canvas.
        """
        starts = range(0, offset, size)
        for start in starts[:-1]:
            yield self.part(start, start + size)
        last = self.part(starts[-1], offset) if offset else None
        if canvas:
            assert self.keys is not None and self.values is not None
            zeros = [mx.zeros((*self.keys.shape[:2], free, self.keys.shape[3]), self.keys.dtype)] * (free > 0)
            before = ([], []) if last is None else ([last.keys], [last.values])
            own = zip(before, (self.keys, self.values))
            last = Part(last.start if last else offset, *(mx.concatenate([*a, b, *zeros], axis=2) for a, b in own))
        if last is not None:
            yield last

    def _room(self, held: mx.array | None, new: mx.array, slots: int) -> mx.array:
        """What is held, with at least so many slots."""
        have = 0 if held is None else held.shape[2]
        if held is not None and slots <= have:
            return held
        total = -(-max(slots, self.capacity) // BUFFER_STEP) * BUFFER_STEP
        more = mx.zeros((*new.shape[:2], total - have, new.shape[3]), new.dtype)
        return more if held is None else mx.concatenate([held, more], axis=2)
