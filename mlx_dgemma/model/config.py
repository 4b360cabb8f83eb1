"""The JSON files of a checkpoint as frozen dataclasses.

Reading is strict: an unknown key may stand for another computation, so it is an error that names the key. Keys that
change nothing here are listed. An unknown key that is bookkeeping by its name, or off by its value, is told in a note;
one that is null counts as missing. Sizes that a tensor's shape pins may be missing, since a wrong default is then
found; what no shape pins is required, or has the default of Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .config_keys import FIXED, INERT, SAMPLING, changes_nothing, unused

# Keys of text_config that no tensor's shape pins and for which readers of checkpoints have different defaults.
_REQUIRED = ("sliding_window", "top_k_experts")
# JSON types of a field, by the type of its default.
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
}


def _refuses_bad_values(file: str) -> Callable:
    """A decorator that turns errors about values of unexpected types into a CheckpointError that names the file."""

    def wrap(function: Callable) -> Callable:
        @wraps(function)
        def call(*args):
            try:
                return function(*args)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{file} cannot be understood ({error}); download it again.") from None

        return call

    return wrap


def _read(cls: type, raw: Any, where: str, notes: list[str], **derived: Any):
    """A dataclass from a JSON object. Missing fields have defaults; keys that are not used are added to `notes`."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is not a JSON object but {type(raw).__name__}; download the checkpoint again.")
    known = {f.name: f for f in fields(cls)}
    values = dict(derived)
    idle: list[str] = []
    sampling: list[str] = []
    for key, value in raw.items():
        if key in derived or (value is None and not _must_be_number(known.get(key))):
            continue
        if key in FIXED and key not in known:
            if value != FIXED[key]:
                raise CheckpointError(
                    f"{where} has {key} = {value!r}, but this model is only computed with {FIXED[key]!r}."
                )
        elif key in known:
            noun, kinds = _KINDS.get(type(known[key].default), ("", ()))
            if noun and type(value) not in kinds:
                raise CheckpointError(f"{where} has {key} = {value!r}, which should be {noun}.")
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in SAMPLING:
            sampling.append(key)
        elif key not in INERT and changes_nothing(key, value):
            idle.append(key)
        elif key not in INERT:
            raise CheckpointError(
                f"{where} has the unknown key {key!r} = {value!r}, which may change the computation; "
                "remove it if you know that it does not."
            )
    notes += unused(where, idle)
    notes += unused(where, sampling, "are settings of other samplers and are not used; give options instead")
    return cls(**values)


def _must_be_number(field: Any) -> bool:
    """Whether a field's null is an error, as it is in Transformers; token ids may be null."""
    return field is not None and type(field.default) in _KINDS and not field.name.endswith("_token_id")


def _rope(raw: Any, where: str, default: dict, *other_types: str) -> dict:
    """rope_parameters, checked: the type is the default's or one of `other_types`, and all factors are computed."""
    rope = {key: value for key, value in (default if raw is None else raw).items() if value is not None}
    kind, share, factor = rope.get("rope_type"), rope.get("partial_rotary_factor", 1), rope.get("factor", 1)
    if unknown := sorted(set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}):
        raise CheckpointError(f"{where} has the unknown key {unknown[0]!r} = {rope[unknown[0]]!r} in rope_parameters.")
    if kind not in (default["rope_type"], *other_types):
        raise CheckpointError(f"{where} has rope_type = {kind!r}, but only {default['rope_type']!r} is computed there.")
    if factor != 1 or (share != 1 and "partial_rotary_factor" not in default):
        raise CheckpointError(f"{where} has rope_parameters = {rope}, whose factors are not computed.")
    if not 0 <= share <= 1:
        raise CheckpointError(f"{where} has partial_rotary_factor = {share!r}, which should be from 0 to 1.")
    if "rope_theta" not in rope:
        raise CheckpointError(f"{where} has rope_parameters = {rope} without rope_theta; add it.")
    rope["rope_theta"] = float(rope["rope_theta"])
    return rope


@dataclass(frozen=True)
class TextConfig:
    """The text stack, which encoder and decoder share (sizes in elements, window in positions)."""

    vocab_size: int = 262144
    hidden_size: int = 2816
    intermediate_size: int = 2112
    num_hidden_layers: int = 30
    num_attention_heads: int = 16
    # sliding layers
    num_key_value_heads: int = 8
    head_dim: int = 256
    sliding_window: int = 1024
    # full layers
    num_global_key_value_heads: int = 2
    global_head_dim: int = 512
    layer_types: tuple[str, ...] = ()
    num_experts: int = 128
    top_k_experts: int = 8
    moe_intermediate_size: int = 704
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    max_position_embeddings: int = 262144
    use_bidirectional_attention: str | None = None
    sliding_rope: dict | None = None
    full_rope: dict | None = None
    model_type: str = "diffusion_gemma_text"

    def kv_shape(self, layer_type: str) -> tuple[int, int]:
        """(KV heads, head dimension) of a layer of this type."""
        if layer_type == "full_attention":
            return self.num_global_key_value_heads, self.global_head_dim
        return self.num_key_value_heads, self.head_dim

    def rope(self, layer_type: str) -> tuple[float, int]:
        """(base, pairs that turn) of the RoPE of a layer of this type; a head has D / 2 pairs."""
        rope = (self.full_rope if layer_type == "full_attention" else self.sliding_rope) or {}
        pairs = int(rope.get("partial_rotary_factor", 1) * self.kv_shape(layer_type)[1] / 2)  # rounded down
        return rope.get("rope_theta", 1e4), pairs

    def rope_frequencies(self, layer_type: str) -> np.ndarray:
        """Radians a position by which RoPE turns each pair of a head of this layer type, [D / 2] float32."""
        (base, pairs), dim = self.rope(layer_type), self.kv_shape(layer_type)[1]
        frequencies = base ** (-2 * np.arange(dim // 2) / dim)
        frequencies[pairs:] = 0
        return frequencies.astype(np.float32)


def _text_config(raw: dict, notes: list[str]) -> TextConfig:
    where = "config.json (text_config)"
    for key in _REQUIRED:
        if raw.get(key) is None:
            raise CheckpointError(f"{where} lacks {key}, which no tensor tells; add it or download it again.")
    count = raw.get("num_hidden_layers", TextConfig.num_hidden_layers)
    pattern = ("full_attention" if i % 6 == 5 or i == count - 1 else "sliding_attention" for i in range(count))
    types = tuple(raw.get("layer_types") or pattern)
    if len(types) != count or not set(types) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(
            f"{where} has layer_types for {len(types)} layers ({', '.join(sorted(set(types)))}) "
            f"and num_hidden_layers = {count}; they should agree and name sliding_attention or full_attention."
        )
    types = (*types[:-1], "full_attention")  # whatever is written: Transformers computes the last layer so
    rope = {} if raw.get("rope_parameters") is None else raw["rope_parameters"]
    if unknown := sorted(set(rope) - {"sliding_attention", "full_attention"}):
        raise CheckpointError(f"{where} has the unknown key {unknown[0]!r} in rope_parameters.")
    if raw.get("rope_parameters") is not None and (missing := sorted(set(types) - set(rope))):
        raise CheckpointError(f"{where} has rope_parameters without {missing[0]}, which it has layers of; add it.")
    derived: dict[str, Any] = {
        "layer_types": types,
        "rope_parameters": None,
        "per_layer_config": None,
        "sliding_rope": _rope(rope.get("sliding_attention"), where, {"rope_type": "default", "rope_theta": 1e4}),
        "full_rope": _rope(
            rope.get("full_attention"),
            where,
            {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        ),
    }
    derived.update(_full_layer_sizes(raw, types, where))
    names = {f.name for f in fields(TextConfig)}
    rest = {k: v for k, v in raw.items() if k not in derived}
    config = _read(TextConfig, rest, where, notes, **{k: v for k, v in derived.items() if k in names})
    if config.use_bidirectional_attention not in (None, "vision"):
        raise CheckpointError(
            f"{where} has use_bidirectional_attention = {config.use_bidirectional_attention!r}, "
            "but only 'vision' or null is computed."
        )
    _check_sizes(config, where)
    return config


def _check_sizes(config: TextConfig, where: str) -> None:
    """Refuse numbers that nothing can be computed with."""
    if config.sliding_window < 1:
        raise CheckpointError(f"{where} has sliding_window = {config.sliding_window}, which should be at least 1.")
    if not 1 <= config.top_k_experts <= config.num_experts:
        raise CheckpointError(
            f"{where} has top_k_experts = {config.top_k_experts}, which should be from 1 to num_experts = "
            f"{config.num_experts}."
        )
    for key, dim in (("head_dim", config.head_dim), ("global_head_dim", config.global_head_dim)):
        if dim < 2 or dim % 2:
            raise CheckpointError(f"{where} has {key} = {dim}, which RoPE cannot turn in pairs; it should be even.")


def _full_layer_sizes(raw: dict, types: tuple[str, ...], where: str) -> dict[str, int]:
    """The head sizes of full layers, from the two `global` keys or from `per_layer_config`.

    `per_layer_config` holds what differs from the sliding layers' keys; beside it the `global` keys mean nothing.
    """
    sizes = {
        "global_head_dim": raw.get("global_head_dim") or TextConfig.global_head_dim,
        "num_global_key_value_heads": raw.get("num_global_key_value_heads")
        or raw.get("num_key_value_heads")
        or TextConfig.num_key_value_heads,
    }
    if (per_layer := raw.get("per_layer_config")) is None:
        return sizes
    base = {
        "head_dim": raw.get("head_dim", TextConfig.head_dim),
        "num_key_value_heads": raw.get("num_key_value_heads", TextConfig.num_key_value_heads),
    }
    own = {int(i): one for i, one in per_layer.items()}
    if unknown := sorted({key for one in own.values() for key in one} - set(base)):
        raise CheckpointError(f"{where} has the unknown key {unknown[0]!r} in per_layer_config.")
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    found = [{**base, **own.get(i, {})} for i in full]
    sliding = [{**base, **one} for i, one in own.items() if i not in full]
    if any(one != found[0] for one in found) or any(one != base for one in sliding):
        raise CheckpointError(f"{where} has a per_layer_config that does not give all full layers {full} one size.")
    one = found[0] if found else base
    return {"global_head_dim": one["head_dim"], "num_global_key_value_heads": one["num_key_value_heads"]}


@dataclass(frozen=True)
class VisionConfig:
    """The Gemma 4 vision tower (sizes in elements, patch and pooling in pixels and patches)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10240
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    standardize: bool = False
    use_clipped_linears: bool = False
    model_type: str = "gemma4_vision"


def _vision_config(raw: dict, notes: list[str]) -> VisionConfig:
    where = "config.json (vision_config)"
    rope = _rope(raw.get("rope_parameters"), where, {"rope_type": "axial", "rope_theta": 100.0}, "default")
    rest = {k: v for k, v in raw.items() if k not in ("rope_parameters", "layer_types", "use_bidirectional_attention")}
    config = _read(VisionConfig, rest, where, notes, rope_theta=rope["rope_theta"])
    if config.head_dim < 4 or config.head_dim % 4:
        raise CheckpointError(
            f"{where} has head_dim = {config.head_dim}, which RoPE cannot turn in pairs along two axes; "
            "it should be a multiple of 4."
        )
    return config


@dataclass(frozen=True)
class ModelConfig:
    """config.json; `canvas_length` in tokens."""

    text: TextConfig
    vision: VisionConfig | None = None
    canvas_length: int = 256
    image_token_id: int = 258880
    boi_token_id: int = 255999
    eoi_token_id: int = 258882
    eos_token_ids: tuple[int, ...] = (1,)
    model_type: str = "diffusion_gemma"

    @classmethod
    @_refuses_bad_values("config.json")
    def from_dict(cls, raw: dict, notes: list[str] | None = None) -> ModelConfig:
        """Read config.json's content.

        Args:
            raw: the content.
            notes: takes a sentence about each file's keys that are not used.

        Raises:
            CheckpointError: another `model_type`, an unknown key, or sizes that contradict each other.
        """
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if kind != "diffusion_gemma":
            hint = " (the autoregressive Gemma 4: mlx-lm runs it)" if str(kind).startswith("gemma4") else ""
            raise CheckpointError(
                f"This checkpoint's model_type is {kind!r}{hint}; mlx-dgemma runs 'diffusion_gemma' only."
            )
        if raw.get("audio_config") not in (None, {}):
            raise CheckpointError("config.json has an audio_config, but audio is not a modality of DiffusionGemma.")
        notes = [] if notes is None else notes
        text = _text_config(raw.get("text_config") or {}, notes)
        vision = _vision_config(raw["vision_config"], notes) if raw.get("vision_config") else None
        eos = raw.get("eos_token_id", (raw.get("text_config") or {}).get("eos_token_id"))
        drop = ("text_config", "vision_config", "audio_config")
        rest = {k: v for k, v in raw.items() if k not in drop}
        return _read(cls, rest, "config.json", notes, text=text, vision=vision, eos_token_ids=_ids(eos) or (1,))


@dataclass(frozen=True)
class GenerationConfig:
    """generation_config.json: the checkpoint's sampler. Its end tokens take precedence over config.json's."""

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1  # nats
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1  # earlier steps that must have the same argmax
    confidence_threshold: float = 0.005  # nats, mean over the canvas
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    @_refuses_bad_values("generation_config.json")
    def from_dict(cls, raw: dict, eos_token_ids: tuple[int, ...], notes: list[str] | None = None) -> GenerationConfig:
        """Read generation_config.json's content; without end tokens of its own it takes `eos_token_ids`.

        Raises:
            CheckpointError: an unknown key, or a sampler other than the entropy-bound one.
        """
        raw = dict(raw)
        sampler = dict(raw.pop("sampler_config", None) or {})
        name = sampler.pop("_cls_name", "EntropyBoundSamplerConfig")
        if name != "EntropyBoundSamplerConfig" or set(sampler) - {"entropy_bound"}:
            raise CheckpointError(
                f"generation_config.json asks for the sampler {name} with {sorted(sampler)}, "
                "but only EntropyBoundSamplerConfig with entropy_bound is known."
            )
        raw.update(sampler)
        # Transformers' bookkeeping of caching and compiling; it changes no result.
        for key in (
            "_commit_hash",
            "_from_model_config",
            "cache_config",
            "cache_implementation",
            "disable_compile",
            "return_dict_in_generate",
        ):
            raw.pop(key, None)
        ends = _ids(raw.pop("eos_token_id", None)) or eos_token_ids
        return _read(cls, raw, "generation_config.json", [] if notes is None else notes, eos_token_ids=ends)


@dataclass(frozen=True)
class ProcessorConfig:
    """From `checkpoint.processor`: soft tokens of a picture and of a video frame, and frames of a video, at most."""

    image_tokens: int = 280
    video_tokens: int = 70
    video_frames: int = 32


def _ids(value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(one) is int for one in ids):
        raise CheckpointError(f"eos_token_id is {value!r}; it should be token ids.")
    return ids


def read_json(path: Path) -> dict:
    """The object in a JSON file, in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        CheckpointError: the file is missing, is a git-lfs pointer, is not JSON, or does not hold an object.
    """
    try:
        data = path.read_bytes()
        refuse_pointer(path, data)
        content = json.loads(data)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; point at a folder that holds a whole checkpoint.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again.")
    return content


def refuse_pointer(file: Path, start: bytes) -> None:
    """Refuse a git-lfs pointer, which `git clone` leaves in a file's place where git-lfs is not installed.

    Args:
        file: for the message.
        start: its first bytes, 32 at least.

    Raises:
        CheckpointError: it is a pointer.
    """
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file} is a git-lfs pointer, not the file itself; run `git lfs install` and `git lfs pull` in its folder."
        )
