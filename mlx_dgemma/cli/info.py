"""The output of `mlx-dgemma info`, from a checkpoint's JSON files and safetensors headers. No weight is read."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint import memory
from ..checkpoint.calibration import read_calibration
from ..checkpoint.find import find
from ..checkpoint.folder import Checkpoint
from ..convert.recipes import RECIPES
from ..errors import CheckpointError, OptionError, count, human
from ..model import device

CONTEXTS = (4096, 16384, 65536, 131072, 262144)  # tokens, for the memory table


def open_local(name: str | None) -> Checkpoint:
    """Open a checkpoint without downloading anything.

    Raises:
        CheckpointError: as `find` and `Checkpoint.open`, or a Hub id that is not downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    text = name or os.environ.get("MLX_DGEMMA_MODEL") or ""
    hub_id = text.count("/") == 1 and not text.startswith((".", "~", "/")) and not Path(text).exists()
    if hub_id and all(text.split("/")) and not isinstance(try_to_load_from_cache(text, "config.json"), str):
        raise CheckpointError(f"{text} is not on this machine; run `hf download {text}` first, or give a folder.")
    return Checkpoint.open(find(name))


def describe(checkpoint: Checkpoint, context: int | None = None, ranks: int = 1) -> dict[str, Any]:
    """Describe a checkpoint as JSON values, with sizes in bytes and contexts in tokens.

    Args:
        checkpoint: the checkpoint.
        context: tokens of prompt and answer together; None takes 4096, or the model's maximum if that is less.
        ranks: machines, or GPUs, that compute the model together.

    Raises:
        OptionError: the context is longer than the model's maximum.
        CheckpointError: the model cannot be dealt to so many ranks.
    """
    text = checkpoint.config.text
    longest = text.max_position_embeddings
    context = memory.context(checkpoint) if context is None else context
    if not 1 <= context <= longest:
        raise OptionError(f"context is {context}; it should be from 1 to {longest}, this model's longest.")
    loaded = memory.resolve_dtype(checkpoint)
    need = memory.need(checkpoint, context, *loaded)
    available = device.available()
    sampler = asdict(checkpoint.generation)
    sampler["max_tokens"] = sampler.pop("max_new_tokens")  # the option's name
    table = sorted({context, longest, *(one for one in CONTEXTS if one < longest)})
    return {
        "model": str(checkpoint.path),
        "architecture": _architecture(checkpoint),
        "parameters": _parameters(checkpoint),
        "bytes_on_disk": checkpoint.nbytes,
        "bits_per_weight": round(checkpoint.bits_per_weight, 3),
        "quantization": _quantization(checkpoint),
        "sampler": sampler,
        "notes": [*checkpoint.notes, *_conversion(checkpoint), *_calibration(checkpoint)],
        "machine": {
            "device": str(mx.device_info().get("device_name", "unknown")),
            "available": available,
            "lacks_bfloat16": device.lacks_bfloat16(),
            "macos": platform.mac_ver()[0] or None,
        },
        "memory": {
            "context": context,
            **asdict(need),
            "total": need.total,
            "fits": need.total <= available,
            "loaded_as": loaded[0] or "stored",
            "by_context": {str(one): memory.need(checkpoint, one, *loaded).total for one in table},
        },
        "ranks": _ranks(checkpoint, context, ranks, loaded) if ranks > 1 else None,
        "recipes": None if checkpoint.quantization else _recipes(checkpoint, need.total - need.weights),
    }


def _architecture(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    text, vision = config.text, config.vision
    full = text.layer_types.count("full_attention")
    return {
        "layers": len(text.layer_types),
        "sliding_layers": len(text.layer_types) - full,
        "full_layers": full,
        "sliding_window": text.sliding_window,
        "hidden_size": text.hidden_size,
        "attention_heads": text.num_attention_heads,
        "sliding_kv_heads": list(text.kv_shape("sliding_attention")),
        "full_kv_heads": list(text.kv_shape("full_attention")),
        "experts": text.num_experts,
        "experts_per_token": text.top_k_experts,
        "vocabulary": text.vocab_size,
        "canvas": config.canvas_length,
        "context": text.max_position_embeddings,
        "vision": vision and {"layers": vision.num_hidden_layers, "hidden_size": vision.hidden_size},
    }


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Number of parameters: all, those of the vision tower, and those that a token of text uses."""
    text, sizes = checkpoint.config.text, {name: prod(shape) for name, shape in checkpoint.shapes.items()}
    vision = sum(size for name, size in sizes.items() if ".vision_tower." in name or ".embed_vision." in name)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (text.num_experts - text.top_k_experts) // text.num_experts
    total = sum(sizes.values())
    return {"total": total, "vision": vision, "active_per_token": total - vision - idle}


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The common quantization, and the number of modules with another one."""
    if not checkpoint.quantization:
        return None
    common = {key: value for key, value in checkpoint.quantization.items() if not isinstance(value, (dict, bool))}
    return {**common, "overrides": sum(isinstance(one, dict) for one in checkpoint.quantization.values())}


def _ranks(checkpoint: Checkpoint, context: int, ranks: int, loaded: tuple[str | None, bool]) -> dict[str, Any]:
    """What each of several ranks needs; the parts that every rank holds are in its weights."""
    held = memory.rank_weights(checkpoint, ranks, *loaded)
    needed = memory.need(checkpoint, context, *loaded, ranks=ranks)
    return {
        "count": ranks,
        "weights": [one.total for one in held],
        "replicated": {name: size for name, size in held[0].replicated.items() if size},
        "prefix": needed.prefix,
        "total": needed.total,
        "fits": needed.total <= device.available(),
    }


def _conversion(checkpoint: Checkpoint) -> list[str]:
    """That a checkpoint must be converted before it can be loaded, if it must."""
    return [f"the format of {checkpoint.foreign} is only read by `mlx-dgemma convert`"] if checkpoint.foreign else []


def _calibration(checkpoint: Checkpoint) -> list[str]:
    """The stop rules that were fitted beside the checkpoint, if they were."""
    fitted = read_calibration(checkpoint.path)
    return [f"stop rules are calibrated: {fitted}"] if fitted else []


def _recipes(checkpoint: Checkpoint, other_bytes: int) -> dict[str, dict[str, Any]]:
    """Size of the weights for each recipe, and the memory needed with `other_bytes` for prefix and workspace."""
    sizes = {name: recipe.nbytes(checkpoint.shapes) for name, recipe in RECIPES.items()}
    available = device.available()
    return {
        name: {"weights": size, "total": size + other_bytes, "fits": size + other_bytes <= available}
        for name, size in sizes.items()
    }


def lines(about: dict[str, Any]) -> list[str]:
    """The result of `describe` as lines of text."""
    arch, params, needed = about["architecture"], about["parameters"], about["memory"]
    sampler, machine, vision = about["sampler"], about["machine"], arch["vision"]
    kv = [f"{heads} x {dim}" for heads, dim in (arch["sliding_kv_heads"], arch["full_kv_heads"])]
    kind = "" if needed["loaded_as"] == "stored" else f" in {needed['loaded_as']}"
    quantization = about["quantization"]
    stored = "none"
    if quantization:
        stored = ", ".join(f"{key} {value}" for key, value in quantization.items() if key != "overrides")
        stored += f"; {count(quantization['overrides'], 'module')} with its own" if quantization["overrides"] else ""
    pairs = [
        ("model", about["model"]),
        (
            "layers",
            f"{arch['layers']}: {arch['sliding_layers']} sliding (window {arch['sliding_window']}), "
            f"{arch['full_layers']} full",
        ),
        ("hidden size", f"{arch['hidden_size']}, vocabulary {arch['vocabulary']}"),
        ("attention", f"{arch['attention_heads']} heads; keys and values {kv[0]} sliding, {kv[1]} full"),
        ("experts", f"{arch['experts']}, {arch['experts_per_token']} a token"),
        ("vision", f"{vision['layers']} layers, hidden size {vision['hidden_size']}" if vision else "none"),
        ("canvas", count(arch["canvas"], "token")),
        ("context", count(arch["context"], "token")),
        ("parameters", f"{_many(params['total'])}, {_many(params['active_per_token'])} active a token of text"),
        ("on disk", f"{human(about['bytes_on_disk'])}, {about['bits_per_weight']:.2f} bits a weight"),
        ("quantization", stored),
        ("sampler", _settings(sampler, "max_denoising_steps", "entropy_bound", "t_min", "t_max")),
        ("", _settings(sampler, "stability_threshold", "confidence_threshold", "max_tokens")),
        ("machine", f"{machine['device']}, {human(machine['available'])} to use"),
        (
            "memory",
            f"{human(needed['total'])} at {needed['context']} tokens of context "
            f"(weights {human(needed['weights'])}{kind}, prefix {human(needed['prefix'])}, "
            f"workspace {human(needed['workspace'])})",
        ),
        ("", _verdict(needed["total"], machine["available"])),
        *(("advice", line) for line in _advice(machine)),
        *(("note", line) for line in about["notes"]),
    ]
    output = [f"{name:14}{value}" for name, value in pairs]
    output += ["", f"{'context':>14}{'memory':>12}"]
    for context, total in needed["by_context"].items():
        output.append(f"{context:>14}{human(total):>12}  {_fits(total, machine['available'])}")
    if about["ranks"]:
        output += ["", *_rank_lines(about["ranks"], machine["available"])]
    if about["recipes"]:
        output += ["", f"{'recipe':>14}{'weights':>12}{'memory':>12}  (mlx-dgemma convert --recipe NAME)"]
        for name, one in about["recipes"].items():
            fits = _fits(one["total"], machine["available"])
            output.append(f"{name:>14}{human(one['weights']):>12}{human(one['total']):>12}  {fits}")
    return [line.rstrip() for line in output]


def _rank_lines(ranks: dict[str, Any], available: int) -> list[str]:
    """Memory of each of several ranks."""
    name, weights = count(ranks["count"], "rank"), ", ".join(human(size) for size in ranks["weights"])
    everywhere = ", ".join(f"{name} {human(size)}" for name, size in ranks["replicated"].items())
    return [
        f"{name:14}{human(ranks['total'])} a rank at most, prefix {human(ranks['prefix'])} of it; "
        f"a machine like this {'suffices' if ranks['total'] <= available else 'does not suffice'}",
        f"{'':14}weights {weights}",
        f"{'':14}on every rank: {everywhere}",
    ]


def _advice(machine: dict[str, Any]) -> list[str]:
    """What to do on this machine."""
    found = []
    if machine["lacks_bfloat16"]:
        allowed = "if `mlx-dgemma check --ranges MODEL` allows it"
        found.append(f"this chip has no bfloat16; --compute-dtype float16 should be faster, {allowed}")
    if re.match(r"26\.[01](\.|$)", machine["macos"] or ""):
        found.append(f"this is macOS {machine['macos']}, but MLX's wheel for macOS 26 is built for 26.2: update macOS")
    return found


def _settings(sampler: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{name.replace('_', '-')} {sampler[name]}" for name in names)


def _fits(total: int, available: int) -> str:
    return "fits" if total <= available else "does not fit"


def _verdict(total: int, available: int) -> str:
    if total <= available:
        return f"fits, {human(available - total)} to spare"
    return f"does not fit: {human(total - available)} are missing"


def _many(number: int) -> str:
    """A number with a unit: 25.2 B, 6.7 M, or without one if it is small."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
