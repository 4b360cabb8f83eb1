"""What conversion does to each parameter: read which bytes, cast or pack them how, write which tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint import weights
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import FLOATS, TensorInfo
from mlx_dgemma.errors import CheckpointError, OptionError

from .recipes import Quantization, Recipe
from .writer import ITEM, Entry

SLICE_BYTES = 16 * 2**20  # of source read at a time
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}
Range = tuple[Path, int, int]  # file[start:end]
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {name: short for short, name in _NAMES.items()}  # safetensors' name: ours


@dataclass(frozen=True)
class Job:
    """One parameter's way from source to result."""

    target: str
    shape: tuple[int, ...]  # as the source stores it
    names: tuple[str, ...]  # of the source's tensors: two where gate and up lie apart
    sources: tuple[TensorInfo, ...]
    dtype: str  # of the result's floats
    quantization: Quantization | None = None  # to be applied

    @property
    def entries(self) -> list[Entry]:
        """The tensors it writes."""
        if self.quantization is None:
            return [Entry(self.target, self.dtype, self.shape)]
        stored = self.quantization.stored(self.target.removesuffix(".weight"), self.shape, self.dtype)
        return [Entry(name, dtype, shape) for name, (dtype, shape) in stored.items()]

    @property
    def raw(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.quantization is None and self.dtype == self.sources[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(info.nbytes for info in self.sources)

    def slices(self) -> Iterator[list[Range]]:
        """The source's bytes in order, cut into slices that end with a row (or, unquantized, an element)."""
        row = ITEM[self.sources[0].dtype] * (self.shape[-1] if self.quantization else 1)
        limit = max(SLICE_BYTES // row, 1) * row
        piece: list[Range] = []
        free = limit
        for file, start, end in self._ranges():
            at = start
            while at < end:
                stop = min(end, at + free)
                piece.append((file, at, stop))
                free -= stop - at
                at = stop
                if not free:
                    yield piece
                    piece, free = [], limit
        if piece:
            yield piece

    def part(self, index: int, count: int) -> list[Range]:
        """Where one of `count` equal parts of the source's bytes lies, such as one expert's."""
        low, high, at = index * (self.nbytes // count), (index + 1) * (self.nbytes // count), 0
        piece = []
        for file, start, end in self._ranges():
            first, last = max(low - at, 0), min(high - at, end - start)
            if first < last:
                piece.append((file, start + first, start + last))
            at += end - start
        return piece

    def _ranges(self) -> Iterator[Range]:
        """Where the parameter's bytes lie; halves alternate, expert by expert."""
        count = 1 if len(self.sources) == 1 else self.shape[0]
        for i in range(count):
            for info in self.sources:
                size = info.nbytes // count
                yield info.file, info.start + i * size, info.start + (i + 1) * size


def source_quantization(checkpoint: Checkpoint) -> dict[str, Quantization]:
    """{module path: how it is packed} of a checkpoint, by the scales that it holds.

    Raises:
        CheckpointError: scales without an entry in config.json, an entry that MLX does not compute, or
            gate and up packed differently where they lie apart.
    """
    declared = checkpoint.quantization or {}
    default: dict[str, Any] = {key: declared[key] for key in ("group_size", "bits", "mode") if key in declared}
    found: dict[str, Quantization] = {}
    for name in checkpoint.tensors:
        match = weights.match(name, checkpoint.config) if name.endswith(".scales") else None
        if match is None:
            continue
        if not declared:
            raise CheckpointError(f"The checkpoint holds {name}, but config.json has no quantization entry.")
        path = match[0].removesuffix(".scales")
        own = declared.get(name.removesuffix(".scales"), declared.get(path))
        try:
            one = Quantization(**({"mode": "affine", **own} if isinstance(own, dict) else default))
        except (OptionError, TypeError) as error:
            raise CheckpointError(
                f"config.json has a quantization of {path} that MLX cannot compute ({error})"
            ) from None
        if found.setdefault(path, one) != one:
            raise CheckpointError(
                f"config.json packs the two halves of {path} differently; both need one quantization."
            )
    return found


def make_jobs(
    checkpoint: Checkpoint, packed: dict[str, Quantization], recipe: Recipe | None, dtype: str | None
) -> list[Job]:
    """One job for every parameter, in the order in which the source stores them.

    Args:
        checkpoint: the source.
        packed: what `source_quantization` found there.
        recipe: quantization to be applied to a source that has none.
        dtype: of the result's floats; None keeps the source's.

    Raises:
        CheckpointError: a tensor missing, unknown, or of a wrong shape or dtype.
    """
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}  # parameter: dtypes, shape
    for name, shape in checkpoint.shapes.items():
        path = name.removesuffix(".weight")
        if path in packed:
            for tensor, (kind, stored) in packed[path].stored(path, shape, "").items():
                wanted[tensor] = (kind,) if kind else tuple(FLOATS), stored
        else:
            wanted[name] = tuple(FLOATS), shape
    jobs = []
    for target, sources in weights.plan(list(checkpoint.tensors), checkpoint.config, set(wanted)).items():
        dtypes, shape = wanted[target]
        infos = tuple(checkpoint.tensors[source.name] for source in sources)
        for source, info in zip(sources, infos):
            _check(source, info, shape, dtypes)
        if len({info.dtype for info in infos}) > 1:
            raise CheckpointError(f"{sources[0].name} and {sources[1].name} have different dtypes; cast them to one.")
        floating = infos[0].dtype in FLOATS
        path = target.removesuffix(".weight")
        fitting = None
        if recipe and floating and (asked := recipe.wanted(path)):
            fitting = asked.fit(shape[-1])
        out = _NAMES[dtype] if dtype and floating else infos[0].dtype
        jobs.append(Job(target, shape, tuple(source.name for source in sources), infos, out, fitting))
    return sorted(jobs, key=lambda job: (job.sources[0].file, job.sources[0].start))


def _check(source: weights.Source, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if source.half is not None:
        shape = (shape[0], shape[1] // 2, *shape[2:])
    if info.shape != shape:
        raise CheckpointError(
            f"{source.name} has the shape {list(info.shape)}, but config.json asks for {list(shape)}."
        )
    if info.dtype not in dtypes:
        raise CheckpointError(f"{source.name} has the dtype {info.dtype}; it should be one of {', '.join(dtypes)}.")
    if info.nbytes != prod(shape) * ITEM[info.dtype]:
        raise CheckpointError(f"{source.name} has {info.nbytes} bytes, but its shape asks for another number.")


def read(ranges: list[Range]) -> bytearray:
    """The bytes of a slice, read plainly: mapped pages would count as resident memory."""
    buffer = bytearray(sum(end - start for _, start, end in ranges))
    view = memoryview(buffer)
    for file, start, end in ranges:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            part, view = view[: end - start], view[end - start :]
            while part:
                count = stream.readinto(part)
                if not count:
                    raise CheckpointError(f"{file} became shorter while it was read; download it again.")
                part = part[count:]
    return buffer


def to_array(data: Any, dtype: str) -> mx.array:
    """An MLX vector from the bytes of a tensor."""
    array = mx.array(np.frombuffer(data, _NUMPY[dtype]))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def to_bytes(array: mx.array) -> np.ndarray:
    """The bytes of an evaluated MLX array, as a contiguous buffer."""
    return np.ascontiguousarray(np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array))
