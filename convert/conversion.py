"""`convert()`: convert a checkpoint to MLX, in bounded memory and all or nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.tied import check_tied
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.files import atomic_folder, require_absent
from mlx_dgemma.model.device import on_cpu

from . import card, hub
from .folder import copy_metadata
from .jobs import (
    DTYPES,
    SLICE_BYTES,
    Job,
    float_dtype,
    make_jobs,
    source_quantization,
    to_bytes,
)
from .recipes import PARTS, Quantization, Recipe, part_of, recipe_named
from .report import Report
from .rounding.methods import NEAREST
from .rounding.run import SCRATCH, Calibrated, Stage, is_plain
from .sources.opened import STALE, Source, find_source, open_source
from .sources.parts import Decoded
from .verify import Verification, check_decoded_fits, verify_conversion
from .writer import INDEX, Writer

Progress = Callable[[int, int], None]  # called with the bytes read so far and in total
OPTION = "--mlx-path"  # the option that sets the target, for error messages


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike = "mlx_model",
    recipe: str | Recipe | None = None,
    dtype: str | None = None,
    verify: bool = False,
    upload_repo: str | None = None,
    progress: Progress | None = None,
    rounding: str = NEAREST,
    prompts: str | os.PathLike | None = None,
    stage: Stage | None = None,
) -> Report:
    """Convert a checkpoint to MLX's layout.

    Peak memory stays below 1 GB for checkpoints of any size (without `verify` and `rounding`). The folder `target` only
    appears when it is complete: an interruption or an error leaves nothing behind.

    Args:
        source: a folder or a Hub id, laid out as by Hugging Face, MLX, ModelOpt or compressed-tensors, or a GGUF file,
            on the Hub as `find_source` takes it.
        target: the folder to make.
        recipe: a name in `RECIPES` or a `Recipe`; None does not quantize.
        dtype: "float32", "bfloat16" or "float16" for the weights that stay floats; None keeps the source's dtype.
        verify: compare the logits of source and result, and look for weights that are NaN or infinite.
        upload_repo: a Hub id to upload the result to.
        progress: called with the bytes done so far and in total.
        rounding: a name in `rounding.METHODS`: how codes and scales are chosen. Others than "nearest" run the source.
        prompts: a file of prompts whose answers' denoising steps rounding looks at; None takes the bundled ones.
        stage: called with what rounding does, how far it is, and of how much.

    Raises:
        OptionError: an unknown recipe, dtype or rounding, or a target that exists.
        CheckpointError: a source that is broken, of another model, or already quantized in another way.
        MemoryLimitError: rounding needs more memory than there is.
        DgemmaError: a target that cannot be written, a full disk, or a failed upload.
    """
    start = time.perf_counter()
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if dtype is not None and dtype not in DTYPES.values():
        raise OptionError(f"dtype is {dtype!r}; it should be one of {', '.join(DTYPES.values())}.")
    target = require_absent(target, OPTION)
    if upload_repo:
        hub.check(upload_repo)
    wanted = None if is_plain(rounding) else partial(Calibrated, rounding, prompt_file=prompts, stage=stage)
    if prompts is not None and wanted is None:
        raise OptionError(f"prompts is {os.fspath(prompts)!r}, but rounding is {rounding}, which looks at none.")
    with open_source(find_source(source)) as origin:
        report = _convert(origin, str(source), target, chosen, dtype, verify, progress, start, wanted)
    url = hub.upload(target, upload_repo) if upload_repo else None
    return replace(report, url=url)


def _convert(
    origin: Source,
    source: str,
    target: Path,
    chosen: Recipe | None,
    dtype: str | None,
    verify: bool,
    progress: Progress | None,
    start: float,
    wanted: Callable[..., Calibrated] | None = None,
) -> Report:
    """Convert what was opened; `source` is what the user calls it, `wanted` rounds if nearest codes will not do."""
    checkpoint = origin.checkpoint
    if not (checkpoint.path / "tokenizer.json").exists():
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer.json; download it, because the model cannot be used without it."
        )
    work = _prepare(origin, chosen, dtype)
    decoded = work.jobs if origin.decode else None
    if verify and decoded:
        check_decoded_fits(checkpoint)
    with atomic_folder(target, work.nbytes, OPTION) as folder:
        calibrated = wanted(origin, work.jobs, folder / SCRATCH) if wanted else None
        if work.unchanged:
            _copy(checkpoint, folder, progress)
            nonfinite = _find_nonfinite(work.jobs) if verify else ()
        else:
            rounded = calibrated.round() if calibrated else {}
            nonfinite = _write(work.jobs, folder, verify, progress, rounded)
        copy_metadata(checkpoint, folder, work.dtype, work.quantized)
        if decoded:
            for name in STALE:
                (folder / name).unlink(missing_ok=True)
        result = Checkpoint.open(folder)
        if calibrated:
            calibrated.close()
        verification = verify_conversion(checkpoint, result, work.exact, decoded) if verify else None
        report = _report(source, target, checkpoint, chosen, work, nonfinite, verification, start)
        report = replace(report, rounding=calibrated.rounding if calibrated else None)
        card.write(folder, report, chosen, checkpoint.path / "README.md")
    return report


@dataclass(frozen=True)
class _Work:
    """Everything that is decided before the first byte is written.

    Attributes:
        jobs: the conversion of each parameter.
        quantized: {module path: its quantization} of the result.
        dtype: dtype of the weights that stay floats.
        unchanged: True if the files can be copied as they are.
        exact: True if every weight keeps its bits.
        notes: what of the source is not used, one sentence each.
    """

    jobs: list[Job | Decoded]
    quantized: dict[str, Quantization]
    dtype: str
    unchanged: bool
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for job in self.jobs for entry in job.entries)


def _prepare(origin: Source, recipe: Recipe | None, dtype: str | None) -> _Work:
    checkpoint = origin.checkpoint
    if origin.decode is not None:
        decoded, notes = origin.decode(recipe, dtype)
        return _Work(list(decoded), _quantized(decoded), DTYPES[float_dtype(decoded)], False, False, tuple(notes))
    quantized = source_quantization(checkpoint)
    if quantized and recipe:
        widths = {name.removesuffix(".weight"): shape[-1] for name, shape in checkpoint.shapes.items()}
        requested = {path: q for path, width in widths.items() if (q := recipe.fitted(path, width))}
        if requested != quantized:
            raise CheckpointError(
                f"{checkpoint.path} is already quantized at {checkpoint.bits_per_weight:.2f} bits per weight; "
                f"start from the original weights to get {recipe.name}."
            )
        recipe = None
    jobs = make_jobs(checkpoint, quantized, recipe, dtype)
    check_tied(checkpoint)
    quantized = quantized or _quantized(jobs)
    exact = all(job.unchanged for job in jobs)
    unchanged = exact and {job.target for job in jobs} == set(checkpoint.tensors)
    return _Work(list(jobs), quantized, DTYPES[float_dtype(jobs)], unchanged, exact)


def _quantized(jobs: Iterable[Job | Decoded]) -> dict[str, Quantization]:
    return {job.target.removesuffix(".weight"): job.quantization for job in jobs if job.quantization}


def _copy(checkpoint: Checkpoint, folder: Path, progress: Progress | None) -> None:
    """Copy the shards and their index unchanged."""
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


def _find_nonfinite(jobs: list[Job | Decoded]) -> tuple[str, ...]:
    """The parameters that contain NaN or infinity."""
    floats = [job for job in jobs if job.dtype in DTYPES]
    return tuple(
        job.target
        for job in floats
        if not all(mx.isfinite(job.to_array(job.read(piece))).all().item() for piece in job.slices())
    )


def _write(
    jobs: list[Job | Decoded],
    folder: Path,
    scan: bool,
    progress: Progress | None,
    rounded: Mapping[str, Path] | None = None,
) -> tuple[str, ...]:
    """Convert every job slice by slice; `rounded` are files that hold what modules have become already.

    Returns:
        With `scan`, the parameters that contain NaN or infinity.
    """
    # A CPU stream is one thread. One stream more than there are cores keeps the cores busy while a slice is written.
    count = min(8, (os.cpu_count() or 1) + 1) if on_cpu() else 3
    streams = [mx.new_stream(mx.default_device()) for _ in range(count)]
    pending: deque[tuple[Job | Decoded, dict[str, int], list[mx.array], mx.array | None, int]] = deque()
    nonfinite: dict[str, None] = {}
    total, done, started = sum(job.nbytes for job in jobs), 0, 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    def write_oldest() -> None:
        """Wait for the oldest pending slice and write it."""
        job, offsets, arrays, finite, nbytes = pending.popleft()
        for (name, offset), array in zip(offsets.items(), arrays):
            writer.write(name, offset, to_bytes(array))
        if finite is not None and not finite.item():
            nonfinite[job.target] = None
        advance(nbytes)

    with Writer(folder, [job.entries for job in jobs]) as writer:
        for job in jobs:
            offsets = dict.fromkeys((entry.name for entry in job.entries), 0)
            if rounded and (file := rounded.get(job.target.removesuffix(".weight"))):
                known: Any = mx.load(str(file))
                for name in offsets:
                    writer.write(name, 0, to_bytes(known[name]))
                advance(job.nbytes)
                continue
            for piece in job.slices():
                data: Any = job.read(piece)
                if job.unchanged and not (scan and job.dtype in DTYPES):
                    writer.write(job.target, offsets[job.target], data)
                    offsets[job.target] += len(data)
                    advance(len(data))
                    continue
                with mx.stream(streams[started % count]):
                    arrays, finite = _compute(job, data, scan)
                mx.async_eval(*arrays, *([] if finite is None else [finite]))
                pending.append((job, dict(offsets), arrays, finite, job.size(data)))
                for name, array in zip(offsets, arrays):
                    offsets[name] += array.nbytes
                started += 1
                if len(pending) == count:
                    write_oldest()
        while pending:
            write_oldest()
    return tuple(nonfinite)


def _compute(job: Job | Decoded, data: Any, scan: bool) -> tuple[list[mx.array], mx.array | None]:
    """A slice's arrays in the order of the job's entries, and with `scan` whether all its values are finite."""
    cast = job.to_array(data).astype(getattr(mx, DTYPES[job.dtype]))
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
        requested = recipe.requested(path) if recipe and job.target.endswith(".weight") else None
        if requested and path not in work.quantized:
            unquantized.append(path)
        elif requested and work.quantized[path] != requested:
            regrouped[path] = str(work.quantized[path])
    quantized = {}
    for part in PARTS:
        kinds = dict.fromkeys(str(q) for path, q in work.quantized.items() if part_of(path) == part)
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
        notes=work.notes,
    )
