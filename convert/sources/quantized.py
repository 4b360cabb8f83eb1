"""Safetensors checkpoints in other programs' formats: which tensors hold which parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

from mlx_dgemma.checkpoint import foreign, weights
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import FLOATS, TensorInfo
from mlx_dgemma.checkpoint.tied import check_tied
from mlx_dgemma.errors import CheckpointError

from ..jobs import NAMES, Job
from ..recipes import Recipe
from .coded import Coded, coded
from .parts import Decoded

_PARTS = {*foreign.CODES, *foreign.SCALES, *foreign.FACTORS, *foreign.ZEROS, *foreign.DESCRIBED}
_EXPERT = re.compile(r"(model\.decoder\.layers\.\d+\.experts)\.(\d+)\.(gate|up|down|gate_up)_proj")
_BARE = re.compile(r"(.+\.experts\.(?:gate_up|down)_proj)(?:_(?:weight_)?(scale|scale_inv))?")
_HALF = {"gate": 0, "up": 1}
Modules = dict[str, dict[str, TensorInfo]]  # {module: {part: tensor}}


def make_decoded_jobs(
    checkpoint: Checkpoint, recipe: Recipe | None, dtype: str | None
) -> tuple[list[Job | Decoded], list[str]]:
    """(a job for every parameter, notes) of a checkpoint in another program's format.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has a wrong shape or dtype.
    """
    modules, idle = _modules(checkpoint)
    notes = []
    if idle:
        notes.append(f"Scales of activations and of the KV cache are not used: {len(idle)} tensors such as {idle[0]}.")
    if len(modules.get("lm_head", {})) > 1:
        del modules["lm_head"]
        notes.append("The head is stored again at fewer bits; the embedding is used for both.")
    kept = {name: info for name, info in checkpoint.tensors.items() if not _of_head(name, modules)}
    check_tied(replace(checkpoint, tensors=kept))
    jobs: list[Job | Decoded] = []
    floats = _float_dtype(checkpoint)
    for target, sources in _assigned(checkpoint, modules).items():
        shape = checkpoint.shapes[target]
        path = target.removesuffix(".weight")
        quantization = recipe.fitted(path, shape[-1]) if recipe and shape else None
        if len(sources) == 1 and set(sources[0][1]) == {"weight"}:
            [(name, tensors)] = sources
            info = tensors["weight"]
            _check_float(name, info, shape)
            out = NAMES[dtype] if dtype else info.dtype
            jobs.append(Job(target, shape, (name,), (info,), out, quantization))
            continue
        parts = tuple(_parts(sources, shape, _block(checkpoint.raw_config)))
        jobs.append(Decoded(target, shape, parts, NAMES[dtype] if dtype else floats, quantization))
    return sorted(jobs, key=lambda job: job.place), notes


def _modules(checkpoint: Checkpoint) -> tuple[Modules, list[str]]:
    """The tensors by module, and those that are not used."""
    found: Modules = {}
    idle = []
    for stored, info in checkpoint.tensors.items():
        name = stored.replace(".moe.experts.", ".experts.")
        path, _, last = name.rpartition(".")
        if last in foreign.ACTIVATIONS:
            idle.append(stored)
        elif last in _PARTS:
            found.setdefault(path, {})[last] = info
        elif bare := _BARE.fullmatch(name):
            found.setdefault(bare[1], {})[f"weight_{bare[2]}" if bare[2] else "weight"] = info
        else:
            found[name] = {"weight": info}
    return found, idle


def _of_head(name: str, modules: Modules) -> bool:
    return name.startswith("lm_head.") and "lm_head" not in modules


def _assigned(checkpoint: Checkpoint, modules: Modules) -> dict[str, list[tuple[str, dict[str, TensorInfo]]]]:
    """{parameter: [(module, its tensors)]}, the experts' in their order."""
    found: dict[str, dict[tuple[int, int], tuple[str, dict[str, TensorInfo]]]] = {}
    for module, tensors in modules.items():
        if expert := _EXPERT.fullmatch(module):
            kind = expert[3]
            target = f"{expert[1]}.{'down' if kind == 'down' else 'gate_up'}_proj.weight"
            place = int(expert[2]), _HALF.get(kind, 0)
        else:
            name = module if module in checkpoint.tensors or _BARE.fullmatch(module) else f"{module}.weight"
            if (match := weights.match(name, checkpoint.config)) is None:
                continue
            target, half = match
            place = 0, half or 0
        if target not in checkpoint.shapes:
            raise CheckpointError(f"The checkpoint holds {module}, which config.json has no place for.")
        if found.setdefault(target, {}).setdefault(place, (module, tensors)) != (module, tensors):
            raise CheckpointError(f"The checkpoint fills {target} with {module} and {found[target][place][0]}.")
    if missing := sorted(set(checkpoint.shapes) - set(found)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"The checkpoint lacks {missing[0]}{more}; download it again.")
    return {target: [one for _, one in sorted(places.items())] for target, places in found.items()}


def _parts(
    sources: list[tuple[str, dict[str, TensorInfo]]], shape: tuple[int, ...], block: tuple[int, int] | None
) -> Iterator[Coded]:
    """The matrices of a parameter; experts that are stored one by one have equal shares of its rows."""
    rows = prod(shape[:-1])
    if len(sources) not in (1, shape[0], 2 * shape[0]) or rows % len(sources):
        raise CheckpointError(
            f"{sources[0][0]} and its like are {len(sources)} matrices, but config.json asks for {shape[0]} experts; "
            "download it again."
        )
    for name, tensors in sources:
        yield coded(name, tensors, rows // len(sources), shape[-1], block)


def _check_float(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(f"{name} has the shape {list(info.shape)}, but config.json asks for {list(shape)}.")
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{name} has the dtype {info.dtype} and no scales; download it again.")


def _float_dtype(checkpoint: Checkpoint) -> str:
    """Safetensors dtype of the weights that are floats: that of the final norm."""
    info = checkpoint.tensors.get("model.decoder.norm.weight")
    return info.dtype if info is not None and info.dtype in FLOATS else "BF16"


def _block(raw: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from config.json."""
    declared = raw.get("quantization_config") or {}
    groups = (declared.get("config_groups") or {}).values()
    found = [declared.get("weight_block_size"), *((one.get("weights") or {}).get("block_structure") for one in groups)]
    sizes = next((one for one in found if isinstance(one, list) and len(one) == 2), None)
    return (int(sizes[0]), int(sizes[1])) if sizes else None
