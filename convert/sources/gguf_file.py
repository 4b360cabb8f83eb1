"""The header of a GGUF file and its tensors as matrices (ggml-org/ggml, docs/gguf.md); the file is not mapped."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.installation import add_extra
from mlx_dgemma.model.config import refuse_pointer

from ..jobs import Range

MAGIC = b"GGUF"
VERSIONS = (2, 3)
READ = frozenset(
    """F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S
    IQ1_M IQ4_NL IQ4_XS""".split()
)
_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Stored:
    """A tensor: `rows` x `width` values of ggml's type number `kind`, the rows of all leading axes."""

    name: str
    file: Path
    start: int
    shape: tuple[int, ...]
    kind: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return int(np.prod(self.shape[:-1]))

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.rows * self.row_bytes

    def ranges(self, first: int, last: int) -> list[Range]:
        """The bytes that hold rows [first, last)."""
        return [(self.file, self.start + first * self.row_bytes, self.start + last * self.row_bytes)]

    def decode(self, data: bytearray, first: int, last: int) -> np.ndarray:
        """What these bytes stand for, [last - first, width] float32."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.frombuffer(data, np.uint8).reshape(last - first, self.row_bytes)
        return dequantize(raw, GGMLQuantizationType(self.kind)).reshape(last - first, self.width)

    def part(self, index: int, count: int) -> Stored:
        """Rows of equal part `index` of `count`."""
        rows = self.rows // count
        return replace(self, start=self.start + index * rows * self.row_bytes, shape=(rows, self.width))


@dataclass(frozen=True)
class GGUF:
    """Metadata and tensors of a model, which may lie in several files."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(path: Path) -> GGUF:
    """The headers of a GGUF file, and of the other files of a split.

    Raises:
        CheckpointError: no GGUF file, truncated, a type that is not read, or the package `gguf` is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{path} is a GGUF file, whose codes the package gguf reads; run `{add_extra('gguf')}`."
        ) from None
    metadata, tensors = _read(path)
    if found := _SPLIT.fullmatch(path.name):
        for i in range(2, int(found[2]) + 1):
            more = path.with_name(f"{found[1]}-{i:05d}-of-{found[2]}.gguf")
            if not more.exists():
                raise CheckpointError(f"{more} is missing; download it beside {path.name}.")
            tensors |= _read(more)[1]
    return GGUF(path, metadata, tensors)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = stream.read(32)
            refuse_pointer(file, start)
            if start[:4] != MAGIC or int.from_bytes(start[4:8], "little") not in VERSIONS:
                raise CheckpointError(f"{file} is not a GGUF file of version 2 or 3; download it again.")
            stream.seek(8)
            count, keys = struct.unpack("<QQ", stream.read(16))
            metadata = {}
            for _ in range(keys):
                key = _string(stream)
                metadata[key] = _value(stream, _number(stream, "I"))
            places = [_place(stream) for _ in range(count)]
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            base = -(-stream.tell() // alignment) * alignment
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError):
        raise CheckpointError(f"{file} is truncated: its header is cut off; download it again.") from None
    tensors = {name: _stored(name, file, base + offset, shape, kind) for name, shape, kind, offset in places}
    end = max((one.start + one.nbytes for one in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(f"{file} is truncated: it has {size} of {end} bytes; download it again.")
    return metadata, tensors


def _stored(name: str, file: Path, start: int, shape: tuple[int, ...], kind: int) -> Stored:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    label = GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else f"type {kind}"
    if label not in READ:
        raise CheckpointError(f"{file} holds {name} as {label}, which is not read here; take another quantization.")
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise CheckpointError(f"{name} has rows of {shape[-1]}, which {label} does not divide; download {file} again.")
    return Stored(name, file, start, shape, kind, shape[-1] // block * nbytes)


def _place(stream: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) of a tensor; GGUF gives the last axis first."""
    name, axes = _string(stream), _number(stream, "I")
    shape = tuple(_number(stream, "Q") for _ in range(axes))[::-1]
    return name, shape or (1,), _number(stream, "I"), _number(stream, "Q")


def _number(stream: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]


def _string(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    data = stream.read(length)
    if len(data) < length:
        raise struct.error
    return data.decode("utf-8", errors="replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _number(stream, _SCALARS[kind])
    inner, count = _number(stream, "I"), _number(stream, "Q")
    if inner in _SCALARS:
        code = _SCALARS[inner]
        data = stream.read(count * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", data))
    return [_value(stream, inner) for _ in range(count)]
