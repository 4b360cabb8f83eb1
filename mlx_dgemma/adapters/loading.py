"""Build a checkpoint's model with an adapter in it, where the memory suffices."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from ..checkpoint import memory
from ..checkpoint.build import build, empty_model, slices_of
from ..checkpoint.folder import Checkpoint
from ..convert.recipes import RECIPES
from ..distributed.agreement import check_equal, together
from ..distributed.group import ALONE, Group
from ..distributed.transfer import written
from ..errors import CircumstanceError, OptionError
from ..model.cache.quantized import check as check_kv_bits
from ..model.device import on_cpu
from ..model.diffusion_gemma import DiffusionGemma
from . import deltas, peft


def load_model(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    adapter: str | PathLike | None = None,
    dequantize: bool | None = None,
    ignore_memory: bool = False,
    compute_dtype: str | None = None,
    kv_bits: int | None = None,
    low_memory: bool = False,
    group: Group = ALONE,
) -> tuple[DiffusionGemma, Path | None, list[str]]:
    """The model, the adapter's folder, and what was chosen, one sentence each; takes what `mlx_dgemma.load` takes.

    Raises:
        CheckpointError: something broken; an adapter of another model.
        MemoryLimitError: the machine has too little memory.
        OptionError: an unknown dtype; a DoRA where products are computed in float16; a prefix that cannot be quantized.
    """
    notes = list(checkpoint.notes)
    check_kv_bits(checkpoint.config.text, kv_bits)
    chosen = together(group, lambda: memory.resolve_dtype(checkpoint, dtype, dequantize, group.size))
    dtype, dequantize = group.share(chosen)
    if on_cpu():
        how = f"{'dequantized to' if dequantize else 'computed in'} {dtype}"
        how += ", the fastest there" if dtype == "float32" else ""
        if checkpoint.quantization and not dequantize:
            how = "kept packed, which is slow there"
        notes.append(f"CPU device: weights of {checkpoint.bits_per_weight:.1f} bits are {how}.")
    folder, changes = together(group, lambda: _read(checkpoint, adapter, group))
    if folder is not None and group.size > 1:
        files = together(group, lambda: [written(folder / name)[:8] for name in (peft.CONFIG, peft.WEIGHTS)])
        check_equal(group, {"adapter": "-".join(files)})
    if compute_dtype and changes and any(one.magnitude is not None for one in changes.changes.values()):
        raise OptionError(
            f"{folder} is a DoRA, whose products follow the dtype of activations; "
            "leave out --compute-dtype (compute_dtype), or fuse it into the checkpoint first."
        )

    def check_memory() -> None:
        needed = memory.need(checkpoint, memory.context(checkpoint), dtype, dequantize, kv_bits, group.size)
        needed = replace(needed, weights=needed.weights + (changes.nbytes if changes else 0))
        memory.check(checkpoint, needed, lambda: {n: one.nbytes(checkpoint.shapes) for n, one in RECIPES.items()})

    if not ignore_memory:
        together(group, check_memory)
    model = build(checkpoint, dtype, dequantize, compute_dtype, group, kv_bits)
    model.low_memory = low_memory
    if kv_bits is not None:
        notes.append(f"Keys and values of full layers are kept in {kv_bits} bits.")
    if compute_dtype is not None:
        activations = str(model.dtype).removeprefix("mlx.core.")
        notes.append(f"Matrix products are computed in {compute_dtype}, the rest in {activations}.")
    if changes is not None:
        together(group, lambda: deltas.apply(model, changes))
        modes = "both modes alike" if changes.shared else "encoder and decoder differently"
        notes.append(f"The adapter {folder} changes {len(changes.changes)} modules, {modes}.")
    return model, folder, notes


def _read(
    checkpoint: Checkpoint, adapter: str | PathLike | None, group: Group
) -> tuple[Path | None, deltas.Adapter | None]:
    """An adapter's folder and what of it this rank applies."""
    if adapter is None:
        return None, None
    folder = peft.find(adapter)
    changes = peft.read(folder, checkpoint.shapes)
    if group.size == 1:
        return folder, changes
    if any(one.magnitude is not None for one in changes.changes.values()):
        raise CircumstanceError(
            f"{folder} is a DoRA, whose magnitudes need whole rows of weights, and no rank has these; fuse it into the "
            "checkpoint first: mlx-dgemma fuse."
        )
    mine = slices_of(empty_model(checkpoint), group.rank, group.size)
    return folder, deltas.dealt(changes, lambda path: mine.cut(f"{path}.weight"))
