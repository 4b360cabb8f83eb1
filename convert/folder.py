"""What a new checkpoint's folder holds besides its weights: tokenizer, templates and configuration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlx_dgemma.checkpoint.folder import Checkpoint

from .recipes import Quantization, part_of
from .writer import INDEX, write_json

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")
_REWRITTEN = ("config.json", INDEX)


def copy_metadata(checkpoint: Checkpoint, folder: Path, dtype: str, quantized: dict[str, Quantization]) -> None:
    """Copy tokenizer, chat templates and the other configuration files, and write config.json.

    Args:
        checkpoint: the source.
        folder: the new checkpoint's folder.
        dtype: dtype of the weights that stay floats, such as "bfloat16".
        quantized: {module path: its quantization} of the new checkpoint.
    """
    for pattern in _COPIED:
        for file in sorted(checkpoint.path.glob(pattern)):
            if file.name not in _REWRITTEN and not file.name.startswith("._") and file.is_file():
                copy = folder / file.relative_to(checkpoint.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    config = {k: v for k, v in checkpoint.raw_config.items() if k not in ("quantization", "quantization_config")}
    config["dtype"] = dtype
    for key in ("text_config", "vision_config"):
        if config.get(key) and (key == "text_config" or "dtype" in config[key]):
            config[key] = {**config[key], "dtype": dtype}
    config["text_config"] |= _classic_keys(checkpoint)
    config.pop("torch_dtype", None)
    if quantized:
        # Readers expect the experts' quantization as the default and the other modules as overrides.
        experts = (q for path, q in quantized.items() if part_of(path) == "experts")
        default = next(experts, next(iter(quantized.values())))
        overrides = {path: q.as_dict for path, q in sorted(quantized.items()) if q != default}
        config["quantization"] = config["quantization_config"] = {**default.as_dict, **overrides}
    write_json(folder / "config.json", config)


def _classic_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Keys of text_config that mlx-vlm reads where Transformers writes or assumes something else.

    It does not know `per_layer_config`, and its default where `use_bidirectional_attention` is missing is "vision".
    """
    text, raw = checkpoint.config.text, checkpoint.raw_config["text_config"]
    keys: dict[str, Any] = {
        "global_head_dim": text.global_head_dim,
        "num_global_key_value_heads": text.num_global_key_value_heads,
    }
    if "use_bidirectional_attention" not in raw:
        keys["use_bidirectional_attention"] = text.use_bidirectional_attention
    full = text.full_rope or {}
    if int(full.get("partial_rotary_factor", 1) * text.global_head_dim) % 2:
        # mlx-lm rounds the half pair up and Transformers down; this share leaves neither a choice.
        share = (2 * text.rope("full_attention")[1] + 0.5) / text.global_head_dim
        full = {**full, "partial_rotary_factor": share}
        keys["rope_parameters"] = {"sliding_attention": text.sliding_rope, "full_attention": full}
    return keys
