"""`Decoded`: the conversion of a parameter whose parts are stored as codes, read and decoded some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..jobs import Range, read_ranges, stored_entries
from ..recipes import Quantization
from ..writer import Entry

SLICE_VALUES = 2**22  # decoded at a time; a single row may have more
Piece = tuple[int, int, int]  # rows [first, last) of part i


class Part(Protocol):
    """A matrix of the source, or a range of its rows."""

    @property
    def rows(self) -> int:
        """Of the matrix."""

    @property
    def width(self) -> int:
        """Elements of a row."""

    def ranges(self, first: int, last: int) -> list[Range]:
        """The bytes that hold rows [first, last)."""

    def decode(self, data: bytearray, first: int, last: int) -> np.ndarray:
        """What these bytes stand for, [last - first, width] float32."""


@dataclass(frozen=True)
class Decoded:
    """The conversion of one parameter; it has what a `Job` has.

    Attributes:
        target: name of the parameter in the result.
        shape: shape of the parameter.
        parts: the matrices that follow each other in it: one, or those of the experts.
        dtype: safetensors dtype of the result's floats.
        quantization: quantization to apply, or None.
    """

    target: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: str
    quantization: Quantization | None = None
    unchanged = False

    @property
    def entries(self) -> list[Entry]:
        """The tensors to write."""
        return stored_entries(self.target, self.shape, self.dtype, self.quantization)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(_size(part.ranges(0, part.rows)) for part in self.parts)

    @property
    def place(self) -> Range:
        """Where the first part lies."""
        return self.parts[0].ranges(0, 1)[0]

    def slices(self) -> Iterator[Piece]:
        """The rows in order, in slices of about `SLICE_VALUES`."""
        for i, part in enumerate(self.parts):
            step = max(SLICE_VALUES // part.width, 1)
            for first in range(0, part.rows, step):
                yield i, first, min(first + step, part.rows)

    def read(self, piece: Any) -> tuple[Piece, bytearray]:
        """The bytes of a slice."""
        i, first, last = piece
        return piece, read_ranges(self.parts[i].ranges(first, last))

    def to_array(self, data: Any) -> mx.array:
        """The values of a slice, 1-D float32."""
        (i, first, last), raw = data
        return mx.array(np.ascontiguousarray(self.parts[i].decode(raw, first, last), np.float32).reshape(-1))

    def size(self, data: Any) -> int:
        """Bytes that were read for a slice."""
        return len(data[1])

    def whole(self) -> mx.array:
        """The parameter in the result's float dtype."""
        kind: Any = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[self.dtype]
        pieces = []
        for piece in self.slices():
            pieces.append(self.to_array(self.read(piece)).astype(kind))
            mx.eval(pieces[-1])
        return mx.concatenate(pieces).reshape(self.shape)


def _size(ranges: list[Range]) -> int:
    return sum(end - start for _, start, end in ranges)
