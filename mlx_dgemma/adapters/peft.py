"""Adapters in Hugging Face PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

Transformers has the text layers twice, in `model.encoder.language_model.layers` and in `model.decoder.layers`: modules
of their own around the same weights. PEFT wraps them one by one, so either mode has its own deltas, and a file with the
decoder's names alone changes denoising alone. NeMo AutoModel trains a single stack, which it names `model.layers`, as
no module of Transformers' is named: those deltas are for both modes.

A delta of experts is a 2-D pair in the file: the rows of lora_A [E * r, in] run through an expert's ranks first, the
columns of lora_B [out, r * E] through a rank's experts. PEFT before 0.19.1 had in and out the other way round; its
shapes do not fit, here as in PEFT since then.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.find import fetch
from ..checkpoint.headers import FLOATS, read_header
from ..errors import CheckpointError
from ..model.config import read_json
from .deltas import Adapter, Delta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# (PEFT's name, our path, the modes that it changes); the first that fits writes a path.
_PLACES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
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
_EXPERT_PARTS = ("gate_up_proj", "down_proj")  # as Transformers declares them: PEFT wraps the first innermost

_USED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern use_dora init_lora_weights target_modules "
    "target_parameters exclude_modules layers_to_transform layers_pattern".split()
)
# Names, notes on training, and settings of what other keys switch on.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode loftq_config "
    "lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config task_type".split()
)
# These leave the model's own weights as they are; pissa, olora, corda, loftq and lora_ga do not.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def find(name: str | os.PathLike) -> Path:
    """The folder of an adapter: a path, else a Hub id, looked for on this machine first.

    Raises:
        CheckpointError: no such folder, no such Hub id, or no network to ask.
    """
    files = (CONFIG, WEIGHTS)
    give = "give an adapter's folder or its Hub id"
    return fetch(str(name), files, lambda folder: all((folder / one).exists() for one in files), give)


def read(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Adapter:
    """Read an adapter that PEFT, or a writer of PEFT's layout, saved.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        shapes: {parameter: shape} of the unquantized model, `Checkpoint.shapes`.

    Returns:
        The adapter, its arrays float32 and evaluated.

    Raises:
        CheckpointError: a file is missing or broken, the adapter is no LoRA or does more than LoRA, rsLoRA and
            DoRA, a tensor has no use or no counterpart, or the adapter is for another model.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; point at a folder that holds a PEFT adapter.")
    config = _Config.read(folder / CONFIG)
    adapter = Adapter({}, {})
    for name, parts in _modules(folder / WEIGHTS, config).items():
        path, modes = _place(name)
        shape = shapes.get(f"{path}.weight", ())
        if path is None or len(shape) not in (2, 3):
            raise CheckpointError(
                f"The adapter is for another model: this one has no {name} to change; "
                "load it with the model that it was trained on."
            )
        delta = _delta(name, parts, shape, config)
        for mode in modes:
            if path in getattr(adapter, mode):
                raise CheckpointError(f"{folder / WEIGHTS} changes {path} twice, as {name} too; remove one of them.")
            getattr(adapter, mode)[path] = delta
    mx.eval([[one.a, one.b, one.magnitude] for deltas in (adapter.encode, adapter.denoise) for one in deltas.values()])
    return adapter


def write(adapter: Adapter, folder: Path, base: str) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained` on Transformers' model computes the same.

    Each file is written beside its place and then put there at once.

    Args:
        adapter: its arrays are written as float32.
        folder: made where it is missing; an adapter in it is replaced.
        base: name or path of the model, for people and tools to find it.

    Raises:
        CheckpointError: what PEFT's layout cannot hold: magnitudes of experts or of some modules only, a path
            that a mode does not have, or no delta at all.
    """
    both = (("encode", adapter.encode), ("denoise", adapter.denoise))
    named = {_name(path, mode): delta for mode, deltas in both for path, delta in deltas.items()}
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
        **_numbers(named),
    }
    tensors: dict[str, mx.array] = {}
    for name, delta in named.items():
        a, b, key = delta.a, delta.b, f"base_model.model.{name}"
        if name in experts:
            module, _, part = name.rpartition(".")
            inner, outer = _EXPERT_PARTS
            nested = part == inner and f"{module}.{outer}" in named
            key = f"base_model.model.{module}" + ".base_layer" * nested
            a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        if delta.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = delta.magnitude
    folder.mkdir(parents=True, exist_ok=True)
    draft = {name: (folder / name).with_suffix(f".part{Path(name).suffix}") for name in (CONFIG, WEIGHTS)}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    draft[CONFIG].write_text(text, encoding="utf-8")
    arrays = {key: mx.contiguous(array.astype(mx.float32)) for key, array in tensors.items()}
    mx.save_safetensors(str(draft[WEIGHTS]), arrays, {"format": "pt"})
    for name, file in draft.items():
        os.replace(file, folder / name)


@dataclass(frozen=True)
class _Config:
    """What adapter_config.json says of names, ranks and factors."""

    rank: int
    alpha: float
    ranks: list[tuple[re.Pattern, int]]
    alphas: list[tuple[re.Pattern, float]]
    rslora: bool
    dora: bool
    modules: str | list[str]  # a pattern of whole names, or names and their ends
    exclude: str | list[str]
    parameters: list[str]
    layers: set[int]  # of modules, not of parameters; empty: all of them
    lists: list[re.Pattern]  # find a layer's number in a name

    @classmethod
    def read(cls, file: Path) -> _Config:
        """Read and check.

        Raises:
            CheckpointError: no LoRA, a value of the wrong kind, or a key that changes what is computed.
        """
        raw = read_json(file)
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(f"{file} has the peft_type {raw.get('peft_type')!r}; only LORA can be read.")
        for key, value in raw.items():
            # A key that is not known may change what is computed, unless it is off.
            if key not in _USED | _HARMLESS and value and (key, value) != ("bias", "none"):
                raise _refused(file, key, value)
        if (start := raw.get("init_lora_weights")) not in _STARTS:
            raise _refused(file, "init_lora_weights", start)
        layers = raw.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers or []
        if not isinstance(layers, list) or any(type(one) is not int for one in layers):
            raise _wrong(file, "layers_to_transform", layers, "a list of numbers")
        parameters, lists = _names(file, raw, "target_parameters"), _names(file, raw, "layers_pattern")
        if isinstance(parameters, str):
            raise _wrong(file, "target_parameters", parameters, "a list of names")
        lists = [lists] if isinstance(lists, str) else lists or ["[^.]*"]
        return cls(
            _rank(file, "r", raw.get("r", 8)),
            _factor(file, "lora_alpha", raw.get("lora_alpha", 8)),
            _patterns(file, raw, "rank_pattern", _rank),
            _patterns(file, raw, "alpha_pattern", _factor),
            _flag(file, raw, "use_rslora"),
            _flag(file, raw, "use_dora"),
            _names(file, raw, "target_modules"),
            _names(file, raw, "exclude_modules"),
            parameters,
            set(layers),
            [_compile(file, "layers_pattern", one, r"(?:^|.*?\.){}\.(?P<index>\d+)\.") for one in lists],
        )

    def targets(self, name: str) -> bool:
        """Whether PEFT changes the module of that name."""
        whole = isinstance(self.modules, str) and self.modules.lower() == "all-linear"
        if not (whole or _matches(self.modules, name)) or (self.exclude and _matches(self.exclude, name)):
            return False
        found = next((match for one in self.lists if (match := one.match(name))), None)
        return not self.layers or (found is not None and int(found["index"]) in self.layers)

    def wraps(self, module: str) -> list[str]:
        """The parameters of experts that PEFT changes, the innermost of its wrappers first."""
        names = [f"{module}.{part}" for part in _EXPERT_PARTS]
        return [name for name in names if _matches(self.parameters, name)]

    def rank_of(self, name: str) -> int:
        """The rank of a module's or a parameter's delta."""
        return next((rank for pattern, rank in self.ranks if pattern.match(name)), self.rank)

    def scale_of(self, name: str) -> float:
        """The factor of a module's or a parameter's delta."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _refused(file: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{file} sets {key} to {json.dumps(value)}, which cannot be honoured; train or export the adapter without it."
    )


def _wrong(file: Path, key: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(f"{file} sets {key} to {json.dumps(value)}; it should be {wanted}.")


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(file, key, value, "a whole number of at least 1")
    return value


def _factor(file: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong(file, key, value, "a number")
    return value


def _flag(file: Path, raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if value not in (True, False):
        raise _wrong(file, key, value, "true or false")
    return value


def _names(file: Path, raw: dict[str, Any], key: str) -> Any:
    """A pattern as a string, or a list of names."""
    value = raw.get(key) or []
    if isinstance(value, str):
        _compile(file, key, value)
    elif not isinstance(value, list) or any(not isinstance(one, str) for one in value):
        raise _wrong(file, key, value, "a list of names or a pattern")
    return value


def _patterns(file: Path, raw: dict[str, Any], key: str, kind: Any) -> list[tuple[re.Pattern, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(file, key, value, "an object of names and numbers")
    return [
        (_compile(file, key, one, r"(?:.*\.)?(?:{})$"), kind(file, f"{key}'s {one}", number))
        for one, number in value.items()
    ]


def _compile(file: Path, key: str, pattern: str, within: str = "{}") -> re.Pattern:
    try:
        return re.compile(within.replace("{}", pattern))
    except re.error as error:
        raise _wrong(file, key, pattern, f"a regular expression ({error})") from None


def _matches(wanted: str | list[str], name: str) -> bool:
    """Whether a pattern is the whole name, or one of some names its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _load(file: Path) -> dict[str, mx.array]:
    """The file's tensors as float32, sorted by name.

    Raises:
        CheckpointError: the file is broken or empty, or a tensor is of another kind.
    """
    header = read_header(file)
    if not header:
        raise CheckpointError(f"{file} holds no tensor; save the adapter again.")
    for key, info in header.items():
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{file} holds {key} as {info.dtype}; it should be one of {', '.join(FLOATS)}.")
    try:
        arrays = mx.load(str(file))
    except RuntimeError as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again.") from None
    assert isinstance(arrays, dict)
    return {key: arrays[key].astype(mx.float32) for key in sorted(arrays)}


def _modules(file: Path, config: _Config) -> dict[str, dict[str, tuple[str, mx.array]]]:
    """{PEFT's name of a module or of experts' parameter: {part: (key, array)}}.

    Raises:
        CheckpointError: a broken file, a tensor that is no part of a LoRA, or one that the configuration leaves out.
    """
    found: dict[str, dict[str, tuple[str, mx.array]]] = {}
    for key, array in _load(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{file} holds {key}, which is no part of a LoRA; save the adapter without it.")
        name = match["module"]
        if experts := _EXPERTS.fullmatch(name):
            wrapped, depth = config.wraps(experts["module"]), experts["nested"].count(".base_layer")
            targeted = depth < len(wrapped)
            name = wrapped[-1 - depth] if targeted else name
        else:
            targeted = config.targets(name)
        if not targeted:
            raise CheckpointError(
                f"{file} holds {key}, which {CONFIG} does not target, so PEFT leaves it out; remove it or target it."
            )
        parts, part = found.setdefault(name, {}), match["part"] or match["magnitude"]
        if part in parts:
            raise CheckpointError(f"{file} holds {key} and {parts[part][0]}, which are the same; remove one of them.")
        parts[part] = key, array
    return found


def _place(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Our path of what PEFT calls `name`, and the modes that it changes."""
    for theirs, ours, modes in _PLACES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs), modes
    return None, ()


def _name(path: str, mode: str) -> str:
    """What PEFT calls our path in a mode."""
    for theirs, ours, modes in _PLACES:
        if path.startswith(ours) and mode in modes:
            return theirs + path.removeprefix(ours)
    raise CheckpointError(f"PEFT's layout has no place for a change of {path} in the mode {mode}.")


def _delta(name: str, parts: dict[str, tuple[str, mx.array]], shape: tuple[int, ...], config: _Config) -> Delta:
    """The delta of a weight [out, in] or [E, out, in].

    Raises:
        CheckpointError: a part that is missing or too much, or a shape that does not fit.
    """
    *many, outputs, inputs = shape
    experts, rank = many[0] if many else 1, config.rank_of(name)
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (experts * rank, inputs), "lora_B": (outputs, experts * rank)}
    if config.dora:
        wanted["lora_magnitude_vector"] = (outputs,)
    if config.dora and many:
        raise CheckpointError(f"The adapter changes {name} under use_dora, which is not defined for experts.")
    if lacking := [part for part in wanted if part not in parts]:
        raise CheckpointError(f"The adapter changes {name}, but lacks its {lacking[0]}; save it again.")
    for part, (key, array) in parts.items():
        if part not in wanted:
            raise CheckpointError(f"The adapter holds {key}, but {CONFIG} does not set use_dora; correct either.")
        if array.shape == wanted[part]:
            continue
        told = f"its {key} has the shape {list(array.shape)}, but should have {list(wanted[part])}"
        free = {"lora_A": 0, "lora_B": 1}.get(part)  # the axis that the rank sets
        if free is not None and array.ndim == 2 and array.shape[1 - free] == wanted[part][1 - free]:
            raise CheckpointError(f"The adapter has another rank than {CONFIG} says: {told}; correct either.")
        raise CheckpointError(
            f"The adapter is for another model: {told}; load it with the model that it was trained on."
        )
    a, b = parts["lora_A"][1], parts["lora_B"][1]
    if many:
        a, b = a.reshape(experts, rank, inputs), b.reshape(outputs, rank, experts).transpose(2, 0, 1)
    magnitude = parts["lora_magnitude_vector"][1] if config.dora else None
    return Delta(a, b, config.scale_of(name), magnitude)


def _is_dora(named: dict[str, Delta]) -> bool:
    """Whether the deltas have magnitudes.

    Raises:
        CheckpointError: some have none, or experts have one.
    """
    plain = [name for name, delta in named.items() if delta.magnitude is None]
    for name, delta in named.items():
        if delta.magnitude is not None and (plain or delta.a.ndim == 3):
            why = f"{plain[0]} has none" if plain else "is of experts"
            raise CheckpointError(
                f"{name} has a magnitude and {why}; PEFT has DoRA for all linear maps of an adapter, never for experts."
            )
    return not plain


def _numbers(named: dict[str, Delta]) -> dict[str, Any]:
    """The configuration's keys that give every name its rank and factor; what most have is the default."""
    ranks = {name: delta.a.shape[-2] for name, delta in named.items()}
    alphas = {name: _alpha(delta.scale, ranks[name]) for name, delta in named.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {re.escape(name): one for name, one in alphas.items() if one != alpha},
    }


def _alpha(scale: float, rank: int) -> float:
    """The factor that, divided by the rank, is nearest to the scale: whole where it can be."""
    alpha = scale * rank
    near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda one: abs(one / rank - scale))
