"""The work per parameter: which bytes to read, how to cast or quantize them, and which tensors to write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

SLICE_BYTES = 16 * 2**20  # bytes of the source read at a time
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}
Range = tuple[Path, int, int]  # file[start:end]
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {name: short for short, name in NAMES.items()}  # {safetensors' name: MLX's name}


@dataclass(frozen=True)
class Job:
    """The conversion of one parameter.

    Attributes:
        target: name of the parameter in the result.
        shape: shape of the parameter as the source stores it.
        names: names of the source's tensors; two if gate and up are stored separately.
        sources: where these tensors are stored, in the order of `names`.
        dtype: safetensors dtype of the result.
        quantization: quantization to apply, or None.
    """

    target: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    sources: tuple[TensorInfo, ...]
    dtype: str
    quantization: Quantization | None = None

    @property
    def entries(self) -> list[Entry]:
        """The tensors to write."""
        return stored_entries(self.target, self.shape, self.dtype, self.quantization)

    @property
    def unchanged(self) -> bool:
        """True if the bytes are copied as they are."""
        return self.quantization is None and self.dtype == self.sources[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(info.nbytes for info in self.sources)

    @property
    def place(self) -> Range:
        """Where the first source lies."""
        return self.sources[0].file, self.sources[0].start, self.sources[0].end

    def read(self, piece: Any) -> bytearray:
        """The bytes of a slice."""
        return read_ranges(piece)

    def to_array(self, data: Any) -> mx.array:
        """The values of a slice, 1-D in the source's dtype."""
        return to_array(data, self.sources[0].dtype)

    def size(self, data: Any) -> int:
        """Bytes that were read for a slice."""
        return len(data)

    def whole(self) -> mx.array:
        """The parameter as the source stores it."""
        return self.to_array(read_ranges(list(self._ranges()))).reshape(self.shape)

    def slices(self) -> Iterator[list[Range]]:
        """The source's bytes in order, in slices of about `SLICE_BYTES`.

        A slice ends at the end of a row; if nothing is quantized, at the end of an element.
        """
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

    def equal_part(self, index: int, count: int) -> list[Range]:
        """The byte ranges of part `index` if the source's bytes are divided into `count` equal parts (experts)."""
        low, high, at = index * (self.nbytes // count), (index + 1) * (self.nbytes // count), 0
        piece = []
        for file, start, end in self._ranges():
            first, last = max(low - at, 0), min(high - at, end - start)
            if first < last:
                piece.append((file, start + first, start + last))
            at += end - start
        return piece

    def _ranges(self) -> Iterator[Range]:
        """Byte ranges of the parameter in order. If gate and up are separate, they alternate expert by expert."""
        count = 1 if len(self.sources) == 1 else self.shape[0]
        for i in range(count):
            for info in self.sources:
                size = info.nbytes // count
                yield info.file, info.start + i * size, info.start + (i + 1) * size


def stored_entries(target: str, shape: tuple[int, ...], dtype: str, quantization: Quantization | None) -> list[Entry]:
    """The tensors that store a parameter, quantized or not."""
    if quantization is None:
        return [Entry(target, dtype, shape)]
    tensors = quantization.stored_tensors(target.removesuffix(".weight"), shape, dtype)
    return [Entry(name, kind, stored) for name, (kind, stored) in tensors.items()]


def source_quantization(checkpoint: Checkpoint) -> dict[str, Quantization]:
    """{module path: its quantization} of every module of a checkpoint that has scales.

    Raises:
        CheckpointError: scales without an entry in config.json, an entry that MLX does not support, or
            separate gate and up tensors with different quantizations.
    """
    checkpoint.require_native()
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
            quantization = Quantization(**({"mode": "affine", **own} if isinstance(own, dict) else default))
        except (OptionError, TypeError) as error:
            raise CheckpointError(
                f"config.json gives {path} a quantization that MLX does not support: {error}"
            ) from None
        if found.setdefault(path, quantization) != quantization:
            raise CheckpointError(
                f"config.json quantizes the two halves of {path} differently; give both the same quantization."
            )
    return found


def make_jobs(
    checkpoint: Checkpoint, quantized: dict[str, Quantization], recipe: Recipe | None, dtype: str | None
) -> list[Job]:
    """One job for every parameter, in the order in which the source stores them.

    Args:
        checkpoint: the source.
        quantized: from `source_quantization`.
        recipe: quantization to apply to an unquantized source.
        dtype: dtype of the result's floats; None keeps the source's.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has a wrong shape or dtype.
    """
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}  # {parameter: (allowed dtypes, shape)}
    for name, shape in checkpoint.shapes.items():
        path = name.removesuffix(".weight")
        if path in quantized:
            for tensor, (kind, stored_shape) in quantized[path].stored_tensors(path, shape, "").items():
                expected[tensor] = (kind,) if kind else tuple(FLOATS), stored_shape
        else:
            expected[name] = tuple(FLOATS), shape
    jobs = []
    for target, sources in weights.plan(list(checkpoint.tensors), checkpoint.config, set(expected)).items():
        dtypes, shape = expected[target]
        infos = tuple(checkpoint.tensors[source.name] for source in sources)
        for source, info in zip(sources, infos):
            _check_tensor(source, info, shape, dtypes)
        if len({info.dtype for info in infos}) > 1:
            raise CheckpointError(f"{sources[0].name} and {sources[1].name} have different dtypes; cast them to one.")
        floating = infos[0].dtype in FLOATS
        path = target.removesuffix(".weight")
        quantization = recipe.fitted(path, shape[-1]) if recipe and floating and shape else None
        out = NAMES[dtype] if dtype and floating else infos[0].dtype
        jobs.append(Job(target, shape, tuple(source.name for source in sources), infos, out, quantization))
    return sorted(jobs, key=lambda job: job.place)


def float_dtype(jobs: Iterable[Any]) -> str:
    """Safetensors dtype of the weights that stay floats: that of the final norm."""
    return next(job.dtype for job in jobs if job.target == "model.decoder.norm.weight")


def _check_tensor(source: weights.Source, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if source.half is not None:
        shape = (shape[0], shape[1] // 2, *shape[2:])
    if info.shape != shape:
        raise CheckpointError(
            f"{source.name} has the shape {list(info.shape)}, but config.json asks for {list(shape)}."
        )
    if info.dtype not in dtypes:
        raise CheckpointError(f"{source.name} has the dtype {info.dtype}; it should be one of {', '.join(dtypes)}.")
    if info.nbytes != (nbytes := prod(shape) * ITEM[info.dtype]):
        raise CheckpointError(f"{source.name} has {info.nbytes} bytes, but its shape and dtype need {nbytes}.")


def read_ranges(ranges: list[Range]) -> bytearray:
    """Read byte ranges into one buffer. Memory mapping is not used, because mapped pages count as resident memory."""
    buffer = bytearray(sum(end - start for _, start, end in ranges))
    view = memoryview(buffer)
    for file, start, end in ranges:
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            part, view = view[: end - start], view[end - start :]
            while part:
                count = stream.readinto(part)
                if not count:
                    raise CheckpointError(f"{file} became shorter while it was being read; download it again.")
                part = part[count:]
    return buffer


def to_array(data: Any, dtype: str) -> mx.array:
    """A 1-D MLX array from the bytes of a tensor with a safetensors dtype."""
    array = mx.array(np.frombuffer(data, _NUMPY[dtype]))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def to_bytes(array: mx.array) -> np.ndarray:
    """The bytes of an evaluated MLX array, as a contiguous buffer."""
    return np.ascontiguousarray(np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array))
