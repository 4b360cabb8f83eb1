"""Stored copies of tied weights: equal ones need not be read, a different one would be another model.

Transformers unties what a checkpoint holds twice with different values; here nothing is untied, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .folder import Checkpoint
from .headers import FLOATS, TensorInfo
from .weights import original_of

COMPARED_BYTES = 16 * 2**20  # of a tensor at a time; a single row may take more
_PARTS = ("weight", "scales", "biases")
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}


def check_tied(checkpoint: Checkpoint) -> None:
    """Compare every stored copy of a tied weight with its original, in bounded memory.

    Copies are equal if their bytes are, or their values in the original's dtype; packed ones are unpacked for that.

    Raises:
        CheckpointError: a copy differs or has no original; it names the copy.
    """
    copies: dict[str, tuple[str, str]] = {}  # {module: (tensor, its original)}, the weight standing for all its parts
    for name in sorted(checkpoint.tensors):
        if original := original_of(name):
            copies[_module(name)] = name, original
    for module, (name, original) in copies.items():
        origin = _module(original)
        mine, theirs = _parts(checkpoint, module), _parts(checkpoint, origin)
        if not theirs:
            raise CheckpointError(f"The checkpoint holds {name}, but lacks {original}, which it is a copy of.")
        if not _same_bytes(mine, theirs) and not _same_values(checkpoint, (module, mine), (origin, theirs)):
            raise CheckpointError(
                f"{name} differs from {original}, but the two are one weight here; "
                "use a checkpoint that was trained with tied weights, or remove the tensor to go on without it."
            )


def _module(name: str) -> str:
    """The path that a tensor shares with its scales and biases; a bare tensor's own name."""
    path, _, part = name.rpartition(".")
    return path if part in _PARTS else name


def _parts(checkpoint: Checkpoint, module: str) -> dict[str, TensorInfo]:
    """{part: tensor} of a module; a bare tensor is its own weight."""
    tensors = checkpoint.tensors
    found = {part: tensors[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in tensors}
    return found or ({"weight": tensors[module]} if module in tensors else {})


def _same_bytes(mine: dict[str, TensorInfo], theirs: dict[str, TensorInfo]) -> bool:
    def same(a: TensorInfo, b: TensorInfo) -> bool:
        if (a.dtype, a.shape, a.nbytes) != (b.dtype, b.shape, b.nbytes):
            return False
        pieces = ((at, min(at + COMPARED_BYTES, a.nbytes)) for at in range(0, a.nbytes, COMPARED_BYTES))
        return all(_read(a, *piece) == _read(b, *piece) for piece in pieces)

    return mine.keys() == theirs.keys() and all(same(mine[part], theirs[part]) for part in mine)


def _same_values(
    checkpoint: Checkpoint, mine: tuple[str, dict[str, TensorInfo]], theirs: tuple[str, dict[str, TensorInfo]]
) -> bool:
    """Whether two weights are equal when both are unpacked and have the original's dtype."""
    rows = {prod(parts["weight"].shape[:-1]) if "weight" in parts else 0 for _, parts in (mine, theirs)}
    if len(rows) != 1 or not (count := rows.pop()):
        return False
    widest = max(info.nbytes for _, parts in (mine, theirs) for info in parts.values()) // count
    step = max(COMPARED_BYTES // max(widest, 1), 1)
    try:
        return all(
            bool(mx.array_equal(a.astype(b.dtype), b, equal_nan=True))
            for a, b in zip(_values(checkpoint, *mine, count, step), _values(checkpoint, *theirs, count, step))
        )
    except (ValueError, TypeError, KeyError):  # a dtype or quantization that MLX does not know: not comparable
        return False


def _values(
    checkpoint: Checkpoint, module: str, parts: dict[str, TensorInfo], count: int, step: int
) -> Iterator[mx.array]:
    """A weight's rows, [`step`, width] at a time, unpacked."""
    declared = checkpoint.quantization or {}
    own = declared.get(module)
    chosen = {"mode": "affine", **own} if isinstance(own, dict) else declared
    how = {key: chosen[key] for key in ("group_size", "bits", "mode") if key in chosen}
    if "scales" not in parts and parts["weight"].dtype not in FLOATS:
        raise TypeError(parts["weight"].dtype)
    for first in range(0, count, step):
        arrays = {part: _rows(info, count, first, min(first + step, count)) for part, info in parts.items()}
        if "scales" in arrays:
            yield mx.dequantize(arrays["weight"], arrays["scales"], arrays.get("biases"), **how)
        else:
            yield arrays["weight"]


def _rows(info: TensorInfo, count: int, first: int, last: int) -> mx.array:
    size = info.nbytes // count
    array = mx.array(np.frombuffer(_read(info, first * size, last * size), _NUMPY[info.dtype]))
    return (array.view(mx.bfloat16) if info.dtype == "BF16" else array).reshape(last - first, -1)


def _read(info: TensorInfo, start: int, end: int) -> bytes:
    """Bytes of a tensor. Memory mapping is not used, because mapped pages count as resident memory."""
    with info.file.open("rb") as stream:
        stream.seek(info.start + start)
        data = stream.read(end - start)
    if len(data) < end - start:
        raise CheckpointError(f"{info.file} became shorter while it was being read; download it again.")
    return data
