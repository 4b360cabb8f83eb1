"""New weights in a checkpoint's place, all or nothing: `fuse()` puts an adapter's changes into them, in bounded memory;
`write_checkpoint()` takes a trained model's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.find import find
from ..checkpoint.folder import Checkpoint
from ..checkpoint.headers import FLOATS
from ..convert.folder import carry, created, vacant
from ..convert.jobs import DTYPES, Job, make_jobs, read, source_quantization, to_array, to_bytes
from ..convert.recipes import Quantization
from ..convert.writer import Entry, Writer
from ..errors import CheckpointError
from ..model.diffusion_gemma import DiffusionGemma
from . import peft
from .deltas import Delta

OPTION = "OUT"  # what names the target, for messages


@dataclass(frozen=True)
class Report:
    """What fusing did."""

    source: Path
    adapter: Path
    target: Path
    modules: tuple[str, ...]  # paths of those whose weights were changed
    packed: tuple[str, ...]  # those of them that were packed again, which rounds
    nbytes: int
    seconds: float


def fuse(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    model: str | os.PathLike | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write a checkpoint whose weights hold an adapter's changes.

    Every tensor keeps its dtype, and what the adapter does not change its bytes. The sum is computed in float32 and
    then rounded: to the weight's dtype, or to the bits that it is packed in. Peak memory is that of the largest weight
    that is not experts', of one expert, and of the adapter.

    Args:
        adapter: a folder in PEFT's layout or a Hub id.
        target: the folder to make; it appears when it is whole.
        model: a folder or a Hub id; None takes $MLX_DGEMMA_MODEL, else the bundled demo.
        dequantize: leave changed weights unpacked, in the dtype of the checkpoint's floats.
        progress: called with the bytes done and the bytes in all.

    Raises:
        OptionError: a target that exists.
        CheckpointError: a checkpoint or an adapter that is broken or another model's, or an adapter that changes
            encoder and decoder differently.
        DgemmaError: a target that cannot be written, or a full disk.
    """
    start = time.perf_counter()
    path = vacant(target, OPTION)
    checkpoint, folder = Checkpoint.open(find(model)), peft.find(adapter)
    changes = peft.read(folder, checkpoint.shapes)
    if not changes.shared:
        raise CheckpointError(
            "This adapter changes encoder and decoder differently, and they share their weights; use it with --adapter."
        )
    plan = _Plan(checkpoint, changes.changes, dequantize)
    entries = [entries for job in plan.jobs if (entries := plan.entries(job))]
    nbytes = sum(entry.nbytes for group in entries for entry in group)
    with created(path, nbytes, OPTION) as made:
        writer, done, total = Writer(made, entries), 0, sum(job.nbytes for job in plan.jobs)
        try:
            for job in plan.jobs:
                plan.write(job, writer)
                done += job.nbytes
                if progress:
                    progress(done, total)
            writer.finish()
        finally:
            writer.close()
        carry(checkpoint, made, DTYPES[plan.floats], plan.packed)
    modules = tuple(changes.changes)
    again = tuple(path for path in modules if path in plan.packed)
    return Report(checkpoint.path, folder, path, modules, again, nbytes, time.perf_counter() - start)


class _Plan:
    """What becomes of every tensor.

    Args:
        checkpoint: the source.
        changes: by module path, the same for encoder and decoder.
        dequantize: leave changed weights unpacked.
    """

    def __init__(self, checkpoint: Checkpoint, changes: dict[str, Delta], dequantize: bool):
        found = source_quantization(checkpoint)
        self.jobs = make_jobs(checkpoint, found, None, None)
        self.packed = {path: q for path, q in found.items() if not (dequantize and path in changes)}
        self._shapes, self._changes, self._found = checkpoint.shapes, changes, found
        self._by_name = {job.target: job for job in self.jobs}
        self.floats = self._by_name["model.decoder.norm.weight"].dtype

    def entries(self, job: Job) -> list[Entry]:
        """The tensors that a job's becomes: itself, or with the weight of a changed module all of that module's."""
        path = job.target.rpartition(".")[0]
        if path not in self._changes or path in self.packed or path not in self._found:
            return job.entries
        return [Entry(job.target, self._dtype(path), self._shapes[job.target])] if job.target in self._shapes else []

    def write(self, job: Job, writer: Writer) -> None:
        """Write what becomes of a job's tensor; that of a changed module's scales is written with its weight."""
        path, _, part = job.target.rpartition(".")
        if path not in self._changes:
            offset = 0
            for piece in job.slices():
                data = read(piece)
                writer.write(job.target, offset, data)
                offset += len(data)
        elif part == "weight":
            self._change(path, self._changes[path], writer)

    def _change(self, path: str, delta: Delta, writer: Writer) -> None:
        """Write a changed module, expert by expert."""
        jobs = [job for part in ("weight", "scales", "biases") if (job := self._by_name.get(f"{path}.{part}"))]
        pairs, packing = [(delta.a, delta.b)], self._found.get(path)
        if delta.a.ndim == 3:
            pairs = list(zip(delta.a, delta.b))
        for i, (a, b) in enumerate(pairs):
            held = [to_array(read(job.part(i, len(pairs))), job.dtype).reshape(job.shape[-2:]) for job in jobs]
            held = [one.astype(mx.float32) if mx.issubdtype(one.dtype, mx.floating) else one for one in held]
            weight = mx.dequantize(*held, **packing.as_dict) if packing else held[0]
            changed = Delta(a, b, delta.scale, delta.magnitude).on(weight).astype(FLOATS[self._dtype(path)])
            new = _packed(changed, self.packed.get(path))
            mx.eval(new)
            for job, array in zip(jobs, new):
                writer.write(job.target, i * array.nbytes, to_bytes(array))

    def _dtype(self, path: str) -> str:
        """Of a module's floats: its weight's, its scales', or where those are no floats the other weights'."""
        own = self._by_name[f"{path}.scales" if path in self._found else f"{path}.weight"].dtype
        return own if own in FLOATS else self.floats


def _packed(weight: mx.array, packing: Quantization | None) -> list[mx.array]:
    return list(mx.quantize(weight, **packing.as_dict)) if packing else [weight]


def write_checkpoint(model: DiffusionGemma, checkpoint: Checkpoint, folder: Path) -> None:
    """Write a model's weights, which are not packed, with the other files of the checkpoint that it was loaded from.

    They get the dtypes that the checkpoint stores; what it packs, that of its floats.

    Args:
        model: all its arrays are plain.
        checkpoint: the source of configuration and tokenizer.
        folder: appears when it is whole; one that is there is replaced.

    Raises:
        DgemmaError: a folder that cannot be written, or a full disk.
    """
    stored = {job.target: job.dtype for job in make_jobs(checkpoint, source_quantization(checkpoint), None, None)}
    floats = stored["model.decoder.norm.weight"]
    arrays = dict(tree_flatten(model.parameters()))
    dtypes = {name: stored[name] if stored[name] in FLOATS else floats for name in arrays}
    entries = [Entry(name, dtypes[name], array.shape) for name, array in arrays.items()]
    old = folder.with_name(f".{folder.name}.old")
    with created(folder, sum(entry.nbytes for entry in entries), "--output") as made:
        writer = Writer(made, [[entry] for entry in entries])
        try:
            for name, array in arrays.items():
                writer.write(name, 0, to_bytes(array.astype(FLOATS[dtypes[name]])))
            writer.finish()
        finally:
            writer.close()
        carry(checkpoint, made, DTYPES[floats], {})
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)
