"""Checkpoints in other programs' quantized formats: `mlx-dgemma convert` reads them, loading asks for that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import CheckpointError

# Parts of a quantized weight in these formats, after the module's path.
CODES = ("weight_packed", "weight")
SCALES = ("weight_scale", "weight_scale_inv")
FACTORS = ("weight_scale_2", "weight_global_scale")
ZEROS = ("weight_zero_point",)
DESCRIBED = ("weight_shape", "weight_g_idx")
# Scales of activations and of the KV cache, which are not quantized here.
ACTIVATIONS = (
    "input_scale input_global_scale input_zero_point output_scale k_scale v_scale q_scale k_zero_point v_zero_point "
    "k_cache_scale v_cache_scale prob_output_scale"
).split()
METHODS = {"modelopt": "ModelOpt", "compressed-tensors": "compressed-tensors", "fp8": "fine-grained FP8"}


def format_of(raw_config: dict[str, Any], tensors: Iterable[str]) -> str | None:
    """The format's name, or None for floats and for MLX's own quantization.

    Args:
        raw_config: config.json's content.
        tensors: names of the checkpoint's tensors.

    Raises:
        CheckpointError: a format that is not read.
    """
    method = _method(raw_config)
    if method is not None and method not in METHODS:
        raise CheckpointError(
            f"config.json has quant_method = {method!r}, which is not read here; start from the original weights, or "
            f"from {', '.join(METHODS.values())} or GGUF."
        )
    marks = (*SCALES, *FACTORS, "weight_packed")
    if any(name.rpartition(".")[2] in marks for name in tensors):
        return METHODS[method] if method else "ModelOpt"  # which may keep its settings in hf_quant_config.json
    return None


def own_quantization(raw_config: dict[str, Any]) -> dict[str, Any] | None:
    """config.json's quantization if it is MLX's."""
    if quantization := raw_config.get("quantization"):
        return quantization
    return None if _method(raw_config) else raw_config.get("quantization_config")


def _method(raw_config: dict[str, Any]) -> str | None:
    declared = raw_config.get("quantization_config") or raw_config.get("compression_config") or {}
    if not isinstance(declared, dict) or raw_config.get("quantization"):
        return None
    method = declared.get("quant_method")
    return "modelopt" if str(method).startswith("modelopt") else method
