"""Write changed weights into a new checkpoint, all or nothing.

`fuse()` adds an adapter to the weights, in bounded memory. `write_checkpoint()` writes the weights of a trained model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.find import find
from ..checkpoint.folder import Checkpoint
from ..checkpoint.headers import FLOATS
from ..checkpoint.tied import check_tied
from ..convert.folder import copy_metadata
from ..convert.jobs import DTYPES, Job, float_dtype, make_jobs, read_ranges, source_quantization, to_array, to_bytes
from ..convert.recipes import Quantization
from ..convert.writer import Entry, Writer
from ..errors import CheckpointError
from ..files import atomic_folder, require_absent
from ..model.diffusion_gemma import DiffusionGemma
from . import peft
from .deltas import Delta

OPTION = "OUT"  # the argument that sets the target, for error messages


@dataclass(frozen=True)
class FuseReport:
    """The result of `fuse()`.

    Attributes:
        source: folder of the checkpoint.
        adapter: folder of the adapter.
        target: the folder that was made.
        modules: paths of the modules whose weights were changed.
        requantized: those of them that were quantized again, which rounds them.
        nbytes: stored size in bytes.
        seconds: duration.
    """

    source: Path
    adapter: Path
    target: Path
    modules: tuple[str, ...]
    requantized: tuple[str, ...]
    nbytes: int
    seconds: float


def fuse(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    model: str | os.PathLike | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FuseReport:
    """Write a checkpoint with an adapter added to its weights.

    Every tensor keeps its dtype, and tensors that the adapter does not change keep their bytes. Sums are computed in
    float32 and then rounded to the weight's dtype or quantization. Peak memory is one weight (of the experts, one
    expert) and the adapter.

    Args:
        adapter: a folder in PEFT's layout or a Hub id.
        target: the folder to make; it only appears when it is complete.
        model: a folder or a Hub id; None is $MLX_DGEMMA_MODEL, or the bundled demo if that is not set.
        dequantize: store changed weights unquantized, in the dtype of the checkpoint's floats.
        progress: called with the bytes done so far and in total.

    Raises:
        OptionError: the target exists.
        CheckpointError: the checkpoint or the adapter is broken or belongs to another model, or the adapter changes
            encoder and decoder differently.
        DgemmaError: the target cannot be written, or the disk is full.
    """
    start = time.perf_counter()
    path = require_absent(target, OPTION)
    folder = peft.find(adapter)
    checkpoint = Checkpoint.open(find(model))
    adapter_deltas = peft.read(folder, checkpoint.shapes)
    if not adapter_deltas.shared:
        raise CheckpointError(
            "This adapter changes encoder and decoder differently, but they share their weights; use it with --adapter."
        )
    fusion = _Fusion(checkpoint, adapter_deltas.changes, dequantize)
    groups = [entries for job in fusion.jobs if (entries := fusion.entries(job))]
    nbytes = sum(entry.nbytes for entries in groups for entry in entries)
    with atomic_folder(path, nbytes, OPTION) as partial:
        done, total = 0, sum(job.nbytes for job in fusion.jobs)
        with Writer(partial, groups) as writer:
            for job in fusion.jobs:
                fusion.write(job, writer)
                done += job.nbytes
                if progress:
                    progress(done, total)
        copy_metadata(checkpoint, partial, DTYPES[fusion.float_dtype], fusion.quantized)
    modules = tuple(adapter_deltas.changes)
    requantized = tuple(path for path in modules if path in fusion.quantized)
    return FuseReport(checkpoint.path, folder, path, modules, requantized, nbytes, time.perf_counter() - start)


class _Fusion:
    """The tensors of a fused checkpoint.

    Args:
        checkpoint: the source.
        changes: deltas by module path, the same for encoder and decoder.
        dequantize: store changed weights unquantized.

    Attributes:
        jobs: one for each tensor of the source.
        quantized: {module path: its quantization} of the result.
        float_dtype: safetensors dtype of the weights that are not quantized.
    """

    def __init__(self, checkpoint: Checkpoint, changes: dict[str, Delta], dequantize: bool):
        source = source_quantization(checkpoint)
        self.jobs = make_jobs(checkpoint, source, None, None)
        check_tied(checkpoint)
        self.quantized = {path: q for path, q in source.items() if not (dequantize and path in changes)}
        self.float_dtype = float_dtype(self.jobs)
        self._shapes, self._changes, self._source = checkpoint.shapes, changes, source
        self._by_name = {job.target: job for job in self.jobs}

    def entries(self, job: Job) -> list[Entry]:
        """The tensors to write for a job.

        That is the job's own tensor, except for a module that is dequantized: then its weight only.
        """
        path = job.target.rpartition(".")[0]
        if path not in self._changes or path in self.quantized or path not in self._source:
            return job.entries
        return [Entry(job.target, self._dtype(path), self._shapes[job.target])] if job.target in self._shapes else []

    def write(self, job: Job, writer: Writer) -> None:
        """Write a job's tensor. The scales and biases of a changed module are written together with its weight."""
        path, _, part = job.target.rpartition(".")
        if path not in self._changes:
            offset = 0
            for ranges in job.slices():
                data = read_ranges(ranges)
                writer.write(job.target, offset, data)
                offset += len(data)
        elif part == "weight":
            self._write_changed(path, self._changes[path], writer)

    def _write_changed(self, path: str, delta: Delta, writer: Writer) -> None:
        """Write a changed module; experts one by one."""
        jobs = [job for part in ("weight", "scales", "biases") if (job := self._by_name.get(f"{path}.{part}"))]
        quantization = self._source.get(path)
        pairs = list(zip(delta.a, delta.b)) if delta.a.ndim == 3 else [(delta.a, delta.b)]
        for i, (a, b) in enumerate(pairs):
            parts: list[Any] = []
            for job in jobs:
                stored = to_array(read_ranges(job.equal_part(i, len(pairs))), job.dtype).reshape(job.shape[-2:])
                parts.append(stored.astype(mx.float32) if mx.issubdtype(stored.dtype, mx.floating) else stored)
            weight = mx.dequantize(*parts, **quantization.as_dict) if quantization else parts[0]
            changed = Delta(a, b, delta.scale, delta.magnitude).apply_to(weight).astype(FLOATS[self._dtype(path)])
            new = _quantize(changed, self.quantized.get(path))
            mx.eval(new)
            for job, array in zip(jobs, new):
                writer.write(job.target, i * array.nbytes, to_bytes(array))

    def _dtype(self, path: str) -> str:
        """Dtype of a changed module's floats: of its weight or scales, or the default if these are integers."""
        own = self._by_name[f"{path}.scales" if path in self._source else f"{path}.weight"].dtype
        return own if own in FLOATS else self.float_dtype


def _quantize(weight: mx.array, quantization: Quantization | None) -> list[mx.array]:
    return list(mx.quantize(weight, **quantization.as_dict)) if quantization else [weight]


def write_checkpoint(model: DiffusionGemma, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights of a model, with the other files of the checkpoint that it was loaded from.

    Each weight gets the dtype in which the checkpoint stores it. Weights that are quantized in the checkpoint get the
    dtype of its floats.

    Args:
        model: none of its weights is quantized.
        checkpoint: the source of configuration and tokenizer.
        folder: the folder to make; it only appears when it is complete, and replaces an existing one in one step.

    Raises:
        DgemmaError: the folder cannot be written, or the disk is full.
    """
    jobs = make_jobs(checkpoint, source_quantization(checkpoint), None, None)
    stored, default = {job.target: job.dtype for job in jobs}, float_dtype(jobs)
    arrays = dict(tree_flatten(model.parameters()))
    dtypes = {name: stored[name] if stored[name] in FLOATS else default for name in arrays}
    entries = [Entry(name, dtypes[name], array.shape) for name, array in arrays.items()]
    with atomic_folder(folder, sum(entry.nbytes for entry in entries), "--output", replace=True) as partial:
        with Writer(partial, [[entry] for entry in entries]) as writer:
            for name, array in arrays.items():
                writer.write(name, 0, to_bytes(array.astype(FLOATS[dtypes[name]])))
        copy_metadata(checkpoint, partial, DTYPES[default], {})
