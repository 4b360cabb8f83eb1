"""Adapters in Hugging Face PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

Transformers has the text layers twice, as `model.encoder.language_model.layers` and `model.decoder.layers`: separate
modules that share their weights. PEFT wraps each of them, so each mode has its own deltas. A file that only names the
decoder's modules only changes denoising. NeMo AutoModel trains one stack named `model.layers`, a name that
Transformers does not use; its deltas are used in both modes.

The delta of an experts parameter is a pair of 2-D tensors. The rows of lora_A [E * r, in] are ordered by expert, then
by rank; the columns of lora_B [out, r * E] by rank, then by expert. PEFT before 0.19.1 swapped in and out; such files
have shapes that do not fit and are refused, as in later versions of PEFT.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ..checkpoint.find import fetch
from ..checkpoint.headers import FLOATS, TensorInfo, read_header
from ..errors import CheckpointError
from ..files import atomic_file, check_name, told_errors
from .deltas import Adapter, Delta
from .peft_config import EXPERT_PARTS, PeftConfig

Tensor = TypeVar("Tensor", mx.array, TensorInfo)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# (prefix of PEFT's name, prefix of our path, modes). For writing, the first row with the path and the mode counts.
_PREFIXES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("model.encoder.language_model.layers.", "model.decoder.layers.", ("encode",)),
    ("model.encoder.vision_tower.", "model.encoder.vision_tower.", ("encode",)),
    ("model.encoder.embed_vision.", "model.encoder.embed_vision.", ("encode",)),
    ("model.decoder.layers.", "model.decoder.layers.", ("denoise",)),
    ("model.decoder.self_conditioning.", "model.decoder.self_conditioning.", ("denoise",)),
    ("model.layers.", "model.decoder.layers.", ("encode", "denoise")),
    ("model.self_conditioning.", "model.decoder.self_conditioning.", ("denoise",)),
)
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?:(?P<part>lora_[AB])(?:\.default)?\.weight|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)
_EXPERTS = re.compile(r"(?P<module>.+\.experts)(?P<nested>(?:\.base_layer)*)")


def find(name: str | os.PathLike) -> Path:
    """The folder of an adapter: a path, or the download of a Hub id. Downloads on this machine are used first.

    Raises:
        CheckpointError: the folder or the Hub id does not exist, or the Hub cannot be reached.
    """
    files = (CONFIG, WEIGHTS)
    advice = "give an adapter's folder or its Hub id"
    return fetch(str(name), files, lambda folder: all((folder / file).exists() for file in files), advice)


def check(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """See by the header of an adapter's file whether it fits; takes what `read` takes and raises the same."""
    for _ in _placed(folder, _read_config(folder), _read_header(folder / WEIGHTS), shapes):
        pass


def read(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter in PEFT's layout.

    Args:
        folder: contains adapter_config.json and adapter_model.safetensors.
        shapes: {parameter: shape} of the unquantized model, see `Checkpoint.shapes`.

    Returns:
        The adapter; its arrays are float32 and evaluated.

    Raises:
        CheckpointError: a file is missing or broken, the adapter is not a LoRA, rsLoRA or DoRA, a tensor is unused or
            incomplete, or the adapter belongs to another model.
    """
    config = _read_config(folder)
    adapter = Adapter({}, {})
    for path, modes, name, parts in _placed(folder, config, _read_tensors(folder / WEIGHTS), shapes):
        delta = _delta(name, parts, shapes[f"{path}.weight"], config)
        for mode in modes:
            getattr(adapter, mode)[path] = delta
    deltas = [*adapter.encode.values(), *adapter.denoise.values()]
    mx.eval([[delta.a, delta.b, delta.magnitude] for delta in deltas])
    return adapter


def write(adapter: Adapter, folder: Path, base: str) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained` with Transformers' model computes the same.

    Each file is written beside its target, and both are renamed when both are complete.

    Args:
        adapter: its arrays are written as float32.
        folder: created if it does not exist; an adapter in it is replaced.
        base: name or path of the base model, for the configuration file.

    Raises:
        CheckpointError: the adapter does not fit PEFT's layout: it has magnitudes of experts, or of some modules only,
            a path in a mode that does not use it, or no delta at all.
        DgemmaError: a file cannot be written.
    """
    by_mode = (("encode", adapter.encode), ("denoise", adapter.denoise))
    named = {_to_name(path, mode): delta for mode, deltas in by_mode for path, delta in deltas.items()}
    if not named:
        raise CheckpointError("The adapter changes nothing, so there is nothing to write.")
    experts = {name for name, delta in named.items() if delta.a.ndim == 3}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "use_dora": _is_dora(named),
        "target_modules": sorted(named.keys() - experts),
        "target_parameters": sorted(experts) or None,
        **_ranks_and_alphas(named),
    }
    check_name(folder)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    arrays = {key: mx.contiguous(array.astype(mx.float32)) for key, array in _tensors(named).items()}
    with told_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / CONFIG) as config_file, atomic_file(folder / WEIGHTS) as weights_file:
        config_file.write_text(text, encoding="utf-8")
        mx.save_safetensors(str(weights_file), arrays, {"format": "pt"})


def _tensors(named: dict[str, Delta]) -> dict[str, mx.array]:
    """The tensors of adapter_model.safetensors."""
    tensors: dict[str, mx.array] = {}
    for name, delta in named.items():
        a, b, key = delta.a, delta.b, f"base_model.model.{name}"
        if a.ndim == 3:
            module, _, part = name.rpartition(".")
            inner, outer = EXPERT_PARTS
            nested = part == inner and f"{module}.{outer}" in named
            key = f"base_model.model.{module}" + ".base_layer" * nested
            a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        if delta.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = delta.magnitude
    return tensors


def _read_config(folder: Path) -> PeftConfig:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; give a folder that contains a PEFT adapter.")
    return PeftConfig.read(folder / CONFIG)


def _placed(
    folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[str, ...], str, dict[str, tuple[str, Tensor]]]]:
    """What an adapter changes, each once it is found right: our path, modes, PEFT's name, and tensors by their part.

    Raises:
        CheckpointError: as `read`, where names or shapes are wrong.
    """
    seen: set[tuple[str, str]] = set()
    for name, parts in _modules(folder / WEIGHTS, config, tensors).items():
        path, modes = _to_path(name)
        shape = shapes.get(f"{path}.weight", ())
        if path is None or len(shape) not in (2, 3):
            raise CheckpointError(
                f"The adapter belongs to another model: this model has no {name} to change; "
                "load it with the model that it was trained on."
            )
        _check_parts(name, parts, shape, config)
        changed = {(mode, path) for mode in modes}
        if changed & seen:
            raise CheckpointError(
                f"{folder / WEIGHTS} changes {path} twice, the second time as {name}; remove one of them."
            )
        seen |= changed
        yield path, modes, name, parts


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The file's tensors as its header tells of them, sorted by name.

    Raises:
        CheckpointError: the file is broken or empty, or a tensor is not of a float dtype.
    """
    header = read_header(file)
    if not header:
        raise CheckpointError(f"{file} contains no tensors; save the adapter again.")
    for key, info in header.items():
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{file} contains {key} as {info.dtype}; it should be one of {', '.join(FLOATS)}.")
    return dict(sorted(header.items()))


def _read_tensors(file: Path) -> dict[str, mx.array]:
    """The file's tensors as float32, sorted by name; raises as `_read_header`."""
    header = _read_header(file)
    try:
        arrays = mx.load(str(file))
    except RuntimeError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again.") from None
    assert isinstance(arrays, dict)
    return {key: arrays[key].astype(mx.float32) for key in header}


def _modules(file: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """The tensors of a file by module or experts parameter.

    Returns:
        {PEFT's name: {"lora_A", "lora_B" or "lora_magnitude_vector": (key in the file, tensor)}}.

    Raises:
        CheckpointError: a tensor is not part of a LoRA or is not targeted by the configuration.
    """
    modules: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, array in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{file} contains {key}, which is not part of a LoRA; save the adapter without it.")
        name = match["module"]
        if experts := _EXPERTS.fullmatch(name):
            wrapped, depth = config.expert_targets(experts["module"]), experts["nested"].count(".base_layer")
            targeted = depth < len(wrapped)
            name = wrapped[-1 - depth] if targeted else name
        else:
            targeted = config.targets(name)
        if not targeted:
            raise CheckpointError(
                f"{file} contains {key}, which {CONFIG} does not target, so PEFT ignores it; remove it or target it."
            )
        parts, part = modules.setdefault(name, {}), match["part"] or match["magnitude"]
        if part in parts:
            raise CheckpointError(
                f"{file} contains {key} and {parts[part][0]}, which mean the same; remove one of them."
            )
        parts[part] = key, array
    return modules


def _to_path(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Our path of the module that PEFT calls `name` (None: there is none), and the modes in which it is changed."""
    for theirs, ours, modes in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs), modes
    return None, ()


def _to_name(path: str, mode: str) -> str:
    """PEFT's name of our module path in a mode.

    Raises:
        CheckpointError: there is none.
    """
    for theirs, ours, modes in _PREFIXES:
        if path.startswith(ours) and mode in modes:
            return theirs + path.removeprefix(ours)
    raise CheckpointError(f"PEFT's layout cannot store a change of {path} in the mode {mode}.")


def _check_parts(name: str, parts: dict[str, tuple[str, Tensor]], shape: tuple[int, ...], config: PeftConfig) -> None:
    """Hold the tensors of one delta against its weight of `shape` [out, in] or [E, out, in].

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has a wrong shape.
    """
    *expert_axis, outputs, inputs = shape
    experts, rank = expert_axis[0] if expert_axis else 1, config.rank_of(name)
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (experts * rank, inputs), "lora_B": (outputs, experts * rank)}
    if config.dora:
        wanted["lora_magnitude_vector"] = (outputs,)
    if config.dora and expert_axis:
        raise CheckpointError(f"The adapter changes {name} with use_dora, which is not supported for experts.")
    if missing := [part for part in wanted if part not in parts]:
        raise CheckpointError(f"The adapter changes {name}, but its {missing[0]} is missing; save it again.")
    for part, (key, array) in parts.items():
        if part not in wanted:
            raise CheckpointError(
                f"The adapter contains {key}, but {CONFIG} does not set use_dora; correct one of them."
            )
        if array.shape == wanted[part]:
            continue
        difference = f"its {key} has the shape {list(array.shape)}, but should have {list(wanted[part])}"
        rank_axis = {"lora_A": 0, "lora_B": 1}.get(part)
        if (
            rank_axis is not None
            and len(array.shape) == 2
            and array.shape[1 - rank_axis] == wanted[part][1 - rank_axis]
        ):
            raise CheckpointError(
                f"The adapter has another rank than {CONFIG} says: {difference}; correct one of them."
            )
        raise CheckpointError(
            f"The adapter belongs to another model: {difference}; load it with the model that it was trained on."
        )


def _delta(name: str, parts: dict[str, tuple[str, mx.array]], shape: tuple[int, ...], config: PeftConfig) -> Delta:
    """The delta of a weight of `shape` [out, in] or [E, out, in], whose tensors fit."""
    *expert_axis, outputs, inputs = shape
    experts, rank = expert_axis[0] if expert_axis else 1, config.rank_of(name)
    a, b = parts["lora_A"][1], parts["lora_B"][1]
    if expert_axis:
        a, b = a.reshape(experts, rank, inputs), b.reshape(outputs, rank, experts).transpose(2, 0, 1)
    magnitude = parts["lora_magnitude_vector"][1] if config.dora else None
    return Delta(a, b, config.scale_of(name), magnitude)


def _is_dora(named: dict[str, Delta]) -> bool:
    """True if the deltas have magnitudes.

    Raises:
        CheckpointError: only some have magnitudes, or experts have one.
    """
    plain = [name for name, delta in named.items() if delta.magnitude is None]
    for name, delta in named.items():
        if delta.magnitude is not None and (plain or delta.a.ndim == 3):
            reason = f"{plain[0]} has none" if plain else "belongs to experts"
            raise CheckpointError(
                f"{name} has a magnitude and {reason}; PEFT applies DoRA to all linear layers of an adapter and never "
                "to experts."
            )
    return not plain


def _ranks_and_alphas(named: dict[str, Delta]) -> dict[str, Any]:
    """The configuration keys for rank and alpha: the most frequent value is the default, the others are exceptions."""
    ranks = {name: delta.a.shape[-2] for name, delta in named.items()}
    alphas = {name: _alpha(delta.scale, ranks[name]) for name, delta in named.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {re.escape(name): other for name, other in alphas.items() if other != alpha},
    }


def _alpha(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is closest to the scale; a whole number if possible."""
    alpha = scale * rank
    candidates = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(candidates, key=lambda value: abs(value / rank - scale))
