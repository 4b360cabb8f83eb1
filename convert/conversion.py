"""`convert()`: a checkpoint in, an MLX checkpoint out, in bounded memory and all or nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.find import find
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.model.device import on_cpu

from . import card, hub
from .folder import carry, created, vacant
from .jobs import DTYPES, SLICE_BYTES, Job, make_jobs, read, source_quantization, to_array, to_bytes
from .recipes import PARTS, Quantization, Recipe, named, part_of
from .verify import Verification, verify_conversion
from .writer import INDEX, Writer

Progress = Callable[[int, int], None]  # bytes read, of so many
OPTION = "--mlx-path"  # what names the target, for messages


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str
    target: Path
    recipe: str | None
    dtype: str  # of the floats that stay floats
    unchanged: bool  # weights were copied byte for byte
    quantized: dict[str, str]  # {part of the model: how it is packed}
    regrouped: dict[str, str]  # {module path: how}, where the recipe's groups do not divide the input
    unquantized: tuple[str, ...]  # module paths that no group size fits
    nonfinite: tuple[str, ...]  # parameters with NaN or infinity, looked for when verifying
    parameters: int
    nbytes: int
    bits_per_weight: float
    seconds: float
    verification: Verification | None = None
    url: str | None = None  # where it was uploaded


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike = "mlx_model",
    recipe: str | Recipe | None = None,
    dtype: str | None = None,
    verify: bool = False,
    upload_repo: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint into the layout of MLX.

    Peak memory stays below 1 GB whatever the checkpoint's size (unless `verify`). The result appears at
    `target` when it is whole: an interruption or a failure leaves nothing.

    Args:
        source: a folder or a Hub id, in Hugging Face's layout or MLX's.
        target: the folder to make.
        recipe: a name in `RECIPES` or a `Recipe`; None keeps the floats.
        dtype: "float32", "bfloat16" or "float16" for the floats; None keeps the source's.
        verify: compare the logits of source and result, and look for weights that are not finite.
        upload_repo: a Hub id to upload the result to.
        progress: called with the bytes done and the bytes in all.

    Raises:
        OptionError: an unknown recipe or dtype, or a target that exists.
        CheckpointError: a source that is broken, of another model, or already quantized otherwise.
        DgemmaError: a target that cannot be written, a full disk, or an upload that fails.
    """
    start = time.perf_counter()
    chosen = named(recipe) if isinstance(recipe, str) else recipe
    if dtype is not None and dtype not in DTYPES.values():
        raise OptionError(f"dtype is {dtype!r}; it should be one of {', '.join(DTYPES.values())}.")
    target = vacant(target, OPTION)
    if upload_repo:
        hub.check(upload_repo)
    checkpoint = Checkpoint.open(find(source))
    if not (checkpoint.path / "tokenizer.json").exists():
        raise CheckpointError(
            f"{checkpoint.path} holds no tokenizer.json; download it, for nothing can be answered without a tokenizer."
        )
    work = _plan(checkpoint, chosen, dtype)
    with created(target, work.nbytes, OPTION) as folder:
        if work.unchanged:
            _copy(checkpoint, folder, progress)
            nonfinite = _scan(work.jobs) if verify else ()
        else:
            nonfinite = _write(work.jobs, folder, verify, progress)
        carry(checkpoint, folder, work.dtype, work.packed)
        verification = verify_conversion(checkpoint, Checkpoint.open(folder), work.exact) if verify else None
        report = _report(source, target, checkpoint, chosen, work, nonfinite, verification, start)
        card.write(folder, report, chosen, checkpoint.path / "README.md")
    url = hub.upload(target, upload_repo) if upload_repo else None
    return Report(**{**vars(report), "url": url})


@dataclass(frozen=True)
class _Work:
    """All that is decided before the first byte is written."""

    jobs: list[Job]
    packed: dict[str, Quantization]  # the result's quantized modules
    dtype: str
    unchanged: bool
    exact: bool  # every weight keeps its bits

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for job in self.jobs for entry in job.entries)


def _plan(checkpoint: Checkpoint, recipe: Recipe | None, dtype: str | None) -> _Work:
    packed = source_quantization(checkpoint)
    if packed and recipe:
        widths = {name.removesuffix(".weight"): shape[-1] for name, shape in checkpoint.shapes.items()}
        asked = {path: q for path in widths if (w := recipe.wanted(path)) and (q := w.fit(widths[path]))}
        if asked != packed:
            raise CheckpointError(
                f"{checkpoint.path} is already quantized at {checkpoint.bits_per_weight:.2f} bits per weight; "
                f"start from the original weights to get {recipe.name}."
            )
        recipe = None
    jobs = make_jobs(checkpoint, packed, recipe, dtype)
    packed = packed or {job.target.removesuffix(".weight"): job.quantization for job in jobs if job.quantization}
    exact = all(job.raw for job in jobs)
    unchanged = exact and {job.target for job in jobs} == set(checkpoint.tensors)
    stays = next(job.dtype for job in jobs if job.target == "model.decoder.norm.weight")
    return _Work(jobs, packed, DTYPES[stays], unchanged, exact)


def _copy(checkpoint: Checkpoint, folder: Path, progress: Progress | None) -> None:
    """Copy the shards and their index as they are."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        with file.open("rb") as source, (folder / file.name).open("wb") as copy:
            while data := source.read(SLICE_BYTES):
                copy.write(data)
                done += len(data)
                if progress:
                    progress(done, total)
    if (checkpoint.path / INDEX).exists():
        shutil.copyfile(checkpoint.path / INDEX, folder / INDEX)


def _scan(jobs: list[Job]) -> tuple[str, ...]:
    """The parameters that hold NaN or infinity."""
    floats = [job for job in jobs if job.dtype in DTYPES]
    return tuple(
        job.target
        for job in floats
        if not all(mx.isfinite(to_array(read(piece), job.dtype)).all().item() for piece in job.slices())
    )


def _write(jobs: list[Job], folder: Path, scan: bool, progress: Progress | None) -> tuple[str, ...]:
    """Convert every job slice by slice; returns the parameters that hold NaN or infinity, if asked to scan."""
    writer = Writer(folder, [job.entries for job in jobs])
    # A CPU stream is one thread; one more than there are cores keeps them busy while a slice is written.
    count = min(8, (os.cpu_count() or 1) + 1) if on_cpu() else 3
    streams = [mx.new_stream(mx.default_device()) for _ in range(count)]
    pending: deque[tuple[Job, dict[str, int], list[mx.array], mx.array | None, int]] = deque()
    nonfinite: dict[str, None] = {}
    total, done, turn = sum(job.nbytes for job in jobs), 0, 0

    def settle() -> None:
        """Write the oldest slice under way."""
        nonlocal done
        job, offsets, arrays, finite, nbytes = pending.popleft()
        for (name, offset), array in zip(offsets.items(), arrays):
            writer.write(name, offset, to_bytes(array))
        if finite is not None and not finite.item():
            nonfinite[job.target] = None
        done += nbytes
        if progress:
            progress(done, total)

    try:
        for job in jobs:
            offsets = dict.fromkeys((entry.name for entry in job.entries), 0)
            for piece in job.slices():
                data = read(piece)
                if job.raw and not (scan and job.dtype in DTYPES):
                    writer.write(job.target, offsets[job.target], data)
                    offsets[job.target] += len(data)
                    done += len(data)
                    if progress:
                        progress(done, total)
                    continue
                with mx.stream(streams[turn % count]):
                    arrays, finite = _compute(job, data, scan)
                mx.async_eval(*arrays, *([] if finite is None else [finite]))
                pending.append((job, dict(offsets), arrays, finite, len(data)))
                for name, array in zip(offsets, arrays):
                    offsets[name] += array.nbytes
                turn += 1
                if len(pending) == count:
                    settle()
        while pending:
            settle()
        writer.finish()
    finally:
        writer.close()
    return tuple(nonfinite)


def _compute(job: Job, data: Any, scan: bool) -> tuple[list[mx.array], mx.array | None]:
    """A slice's arrays, in the order of the job's entries, and whether all it holds is finite."""
    floats = to_array(data, job.sources[0].dtype)
    cast = floats.astype(getattr(mx, DTYPES[job.dtype]))
    finite = mx.all(mx.isfinite(cast)) if scan else None
    if job.quantization is None:
        return [cast], finite
    return list(mx.quantize(cast.reshape(-1, job.shape[-1]), **job.quantization.as_dict)), finite


def _report(
    source: str | os.PathLike,
    target: Path,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    work: _Work,
    nonfinite: tuple[str, ...],
    verification: Verification | None,
    start: float,
) -> Report:
    regrouped, unquantized = {}, []
    for job in work.jobs:
        path = job.target.removesuffix(".weight")
        asked = recipe.wanted(path) if recipe and job.target.endswith(".weight") else None
        if asked and path not in work.packed:
            unquantized.append(path)
        elif asked and work.packed[path] != asked:
            regrouped[path] = str(work.packed[path])
    quantized = {}
    for part in PARTS:
        kinds = {str(q): None for path, q in work.packed.items() if part_of(path) == part}
        if kinds:
            quantized[part] = "; ".join(kinds)
    return Report(
        source=str(source),
        target=target,
        recipe=recipe.name if recipe else None,
        dtype=work.dtype,
        unchanged=work.unchanged,
        quantized=quantized,
        regrouped=regrouped,
        unquantized=tuple(unquantized),
        nonfinite=nonfinite,
        parameters=checkpoint.parameters,
        nbytes=work.nbytes,
        bits_per_weight=work.nbytes * 8 / checkpoint.parameters,
        seconds=time.perf_counter() - start,
        verification=verification,
    )
