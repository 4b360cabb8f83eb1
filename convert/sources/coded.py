"""A weight stored as codes and scales in safetensors files, as ModelOpt, compressed-tensors and FP8 lay it out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mlx_dgemma.checkpoint.headers import TensorInfo
from mlx_dgemma.errors import CheckpointError

from ..jobs import Range
from .codes import E4M3, E8M0, fp4, integers

MX_GROUP = 32  # of the formats whose scales are powers of two
_NUMPY: dict[str, Any] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.uint32, "U32": np.uint32, "I64": np.int64,
    "I8": np.int8, "U8": np.uint8, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A tensor as a matrix; each of its rows stands for `repeat` rows of the weight."""

    info: TensorInfo
    rows: int
    repeat: int

    @property
    def width(self) -> int:
        """Elements of a row."""
        return prod(self.info.shape) // self.rows

    def _span(self, first: int, last: int) -> tuple[int, int]:
        return first // self.repeat, -(-last // self.repeat)

    def range(self, first: int, last: int) -> Range:
        """The bytes for the weight's rows [first, last)."""
        low, high = self._span(first, last)
        row = self.info.nbytes // self.rows
        return self.info.file, self.info.start + low * row, self.info.start + high * row

    def values(self, data: memoryview, first: int, last: int) -> np.ndarray:
        """[last - first, width] of these bytes, as stored: for floats float32, for codes their codes."""
        low, high = self._span(first, last)
        found = np.frombuffer(data, _NUMPY[self.info.dtype]).reshape(high - low, -1)
        if self.info.dtype == "BF16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        if self.repeat > 1:
            found = found[np.arange(first, last) // self.repeat - low]
        return found.astype(np.float32) if found.dtype == np.float16 else found


@dataclass(frozen=True)
class Coded:
    """A weight of `rows` x `width` elements: code * scale, scales by groups of a row.

    Attributes:
        name: of the tensor that holds the codes, for messages.
        codes: the codes; `kind` is "float", "fp8", "int8", "fp4" or "bits".
        bits: of a code where they are packed into words.
        group: elements of a row that share a scale.
        factor: of all scales, or None; `inverse` divides by it.
        zero: the code that stands for 0, by groups; `packed` for packed into words column by column.
        order: the group of each element, where it is not the next one.
    """

    name: str
    rows: int
    width: int
    codes: Table
    kind: str
    bits: int = 0
    scale: Table | None = None
    group: int = 1
    factor: Table | None = None
    inverse: bool = False
    zero: Table | None = None
    packed: bool = False
    order: Table | None = None

    @property
    def _tables(self) -> list[Table]:
        return [one for one in (self.codes, self.scale, self.factor, self.zero, self.order) if one is not None]

    def _rows(self, table: Table, first: int, last: int) -> tuple[int, int]:
        """The rows of a table that a slice needs: all where rows are packed together or shared."""
        whole = table is self.order or (table is self.zero and self.packed)
        return (0, table.rows) if whole else (first, last)

    def ranges(self, first: int, last: int) -> list[Range]:
        """The bytes that hold rows [first, last)."""
        return [table.range(*self._rows(table, first, last)) for table in self._tables]

    def decode(self, data: bytearray, first: int, last: int) -> np.ndarray:
        """What these bytes stand for, [last - first, width] float32."""
        found, view = {}, memoryview(data)
        for table in self._tables:
            rows = self._rows(table, first, last)
            _, start, end = table.range(*rows)
            found[id(table)] = table.values(view[: end - start], *rows)
            view = view[end - start :]
        values = self._codes(found[id(self.codes)])
        if self.zero is not None:
            values = values - self._spread(self._zeros(found[id(self.zero)], first, last), found)
        if self.scale is not None:
            values = self._scaled(values, self._scales(found), found)
        return values

    def _codes(self, stored: np.ndarray) -> np.ndarray:
        if self.kind == "fp4":
            return fp4(stored)
        if self.kind == "fp8":
            return np.take(E4M3, stored)
        if self.kind == "bits":
            return integers(stored, self.bits, self.width)
        return stored.astype(np.float32, copy=False)

    def _scales(self, found: dict[int, np.ndarray]) -> np.ndarray:
        """[rows, groups] float32, the factor applied."""
        assert self.scale is not None
        scales, kind = found[id(self.scale)], self.scale.info.dtype
        if kind == "F8_E8M0" or (kind == "U8" and self.group == MX_GROUP):
            scales = E8M0[scales]
        elif kind in ("F8_E4M3", "U8"):
            scales = E4M3[scales]
        if self.factor is None:
            return scales
        factor = found[id(self.factor)]
        return scales / factor if self.inverse else scales * factor

    def _zeros(self, stored: np.ndarray, first: int, last: int) -> np.ndarray:
        """[rows, groups] float32."""
        if self.packed:
            return integers(np.ascontiguousarray(stored.T), self.bits, self.rows).T[first:last]
        return stored.astype(np.float32)

    def _spread(self, grouped: np.ndarray, found: dict[int, np.ndarray]) -> np.ndarray:
        """[rows, groups] -> [rows, width]."""
        if self.order is not None:
            return grouped[:, found[id(self.order)].reshape(-1)]
        return np.repeat(grouped, self.group, axis=1)[:, : self.width]

    def _scaled(self, values: np.ndarray, scales: np.ndarray, found: dict[int, np.ndarray]) -> np.ndarray:
        if self.order is not None or self.width != self.group * scales.shape[1]:
            return values * self._spread(scales, found)
        return (values.reshape(len(values), -1, self.group) * scales[:, :, None]).reshape(len(values), -1)


def coded(name: str, tensors: dict[str, TensorInfo], rows: int, width: int, block: tuple[int, int] | None) -> Coded:
    """The weight that a module's tensors hold.

    Args:
        name: of the module.
        tensors: {part, such as "weight_scale": tensor}.
        rows, width: of the weight; its leading axes are rows.
        block: rows and columns that share a scale, where config.json says so.

    Raises:
        CheckpointError: an unknown dtype or shapes that do not agree.
    """
    held = tensors.get("weight_packed", tensors.get("weight"))
    if held is None:
        raise CheckpointError(f"The checkpoint holds scales of {name}, but lacks {name}.weight; download it again.")
    kinds = {"I32": "bits", "U32": "bits", "U8": "fp4", "F8_E4M3": "fp8", "I8": "int8"}
    kind = "float" if held.dtype in ("F32", "F16", "BF16") else kinds.get(held.dtype)
    per_row = {"fp4": width / 2, "bits": None}.get(kind or "", width)
    words = prod(held.shape) // rows
    bits = next((n for n in range(1, 9) if -(-width * n // 32) == words), 0) if kind == "bits" else 0
    scale = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    if kind is None or prod(held.shape) % rows or held.shape[-1] != words or (words != per_row and not bits):
        raise CheckpointError(
            f"The codes of {name} have the dtype {held.dtype} and the shape {list(held.shape)}, which is not read as "
            f"{rows} x {width} weights; start from the original weights."
        )
    if scale is None:
        if kind != "float":
            raise CheckpointError(f"The checkpoint lacks the scales of {name}; download it again.")
        return Coded(f"{name}.weight", rows, width, Table(held, rows, 1), kind)
    scales, group = _scale_table(name, scale, rows, width, block)
    zero, order = tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
    packed = zero is not None and zero.dtype in ("I32", "U32") and kind == "bits"
    zeros = None if zero is None else Table(zero, zero.shape[0], 1)
    if zero is not None and not packed:
        zeros = _scale_table(name, zero, rows, width, block)[0]
    global_scale = tensors.get("weight_global_scale")
    factor = tensors.get("weight_scale_2", global_scale)
    return Coded(
        name,
        rows,
        width,
        Table(held, rows, 1),
        kind,
        bits,
        scales,
        group,
        None if factor is None else Table(factor, prod(factor.shape), rows // prod(factor.shape)),
        global_scale is not None,
        zeros,
        packed,
        None if order is None else Table(order, prod(order.shape), 1),
    )


def _scale_table(
    name: str, info: TensorInfo, rows: int, width: int, block: tuple[int, int] | None
) -> tuple[Table, int]:
    """(scales, elements of a row that share one): per tensor, expert, row, group of a row, or block."""
    size, flat = prod(info.shape), len(info.shape) == 2
    high = size if len(info.shape) < 2 else prod(info.shape[:-1])
    if high == rows and width % (size // rows) == 0:
        return Table(info, rows, 1), width * rows // size
    tall, wide = block or (128, 128)
    if flat and size > 1 and (-(-rows // tall), -(-width // wide)) == info.shape:
        return Table(info, high, tall), wide
    if size == high and rows % high == 0:
        return Table(info, high, rows // high), width
    raise CheckpointError(
        f"The scales of {name} have the shape {list(info.shape)}, which does not fit {rows} x {width} weights; "
        "download it again."
    )
