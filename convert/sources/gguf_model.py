"""A GGUF file of DiffusionGemma as llama.cpp's converter writes it: names of tensors, config.json, the sampler."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError

from ..jobs import NAMES, read_ranges
from ..recipes import Recipe
from .gguf_file import GGUF, Stored
from .parts import Decoded

ARCHITECTURE = "diffusion-gemma"
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_ROOT = "model.decoder."
NAMED = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "self_cond_pre_norm.weight": "self_conditioning.pre_norm.weight",
    "self_cond_gate.weight": "self_conditioning.gate_proj.weight",
    "self_cond_up.weight": "self_conditioning.up_proj.weight",
    "self_cond_down.weight": "self_conditioning.down_proj.weight",
}
IN_LAYERS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj.weight",
    "ffn_gate_exps.weight": "experts.gate_up_proj.weight",
    "ffn_up_exps.weight": "experts.gate_up_proj.weight",
    "ffn_down_exps.weight": "experts.down_proj.weight",
    "layer_output_scale.weight": "layer_scalar",
}
_ENCODER = "enc_layer_output_scale.weight"
_HALVES = {"ffn_gate_exps.weight": 0, "ffn_up_exps.weight": 1}
_IDLE = ("rope_freqs.weight", "output.weight")  # a table, and the head, which is tied


def target_of(name: str) -> tuple[str, int] | None:
    """(parameter, half) that a tensor fills, or None if it is not used.

    Raises:
        CheckpointError: an unknown name.
    """
    if name in _IDLE:
        return None
    if found := _LAYER.fullmatch(name):
        layer, rest = found.groups()
        if rest == _ENCODER:
            return f"model.encoder.language_model.layers.{layer}.layer_scalar", 0
        if rest == "rope_freqs.weight":
            return None
        if rest in IN_LAYERS:
            return f"{_ROOT}layers.{layer}.{IN_LAYERS[rest]}", _HALVES.get(rest, 0)
    elif name in NAMED:
        return _ROOT + NAMED[name], 0
    raise CheckpointError(f"The GGUF file holds the unknown tensor {name}; this is not a DiffusionGemma release.")


def make_gguf_jobs(
    source: GGUF, checkpoint: Checkpoint, recipe: Recipe | None, dtype: str | None
) -> tuple[list[Decoded], list[str]]:
    """(a job for every parameter, notes).

    Raises:
        CheckpointError: a tensor is missing, unknown or has a wrong shape.
    """
    found: dict[str, dict[int, Stored]] = {}
    for name, one in source.tensors.items():
        if place := target_of(name):
            found.setdefault(place[0], {})[place[1]] = one
    shapes = checkpoint.shapes
    if missing := sorted(set(shapes) - set(found)):
        raise CheckpointError(f"{source.path} lacks what {missing[0]} is made of; download it again.")
    jobs = []
    for target, halves in found.items():
        if target not in shapes:
            raise CheckpointError(f"{source.path} holds {halves[0].name}, which its metadata has no place for.")
        shape, stored = shapes[target], [halves[i] for i in sorted(halves)]
        for one in stored:
            if prod(one.shape) * len(stored) != prod(shape) or (shape and one.width != shape[-1]):
                raise CheckpointError(
                    f"{one.name} has the shape {list(one.shape)}, but the metadata asks for {list(shape)}."
                )
        parts = stored if len(stored) == 1 else [one.part(i, shape[0]) for i in range(shape[0]) for one in stored]
        path = target.removesuffix(".weight")
        quantization = recipe.fitted(path, shape[-1]) if recipe and shape else None
        jobs.append(Decoded(target, shape, tuple(parts), NAMES[dtype] if dtype else "BF16", quantization))
    notes = ["A GGUF file of this model holds no vision tower: the result takes text only, no pictures or video."]
    if "output.weight" in source.tensors:
        notes.append("output.weight is not used: the head is tied to the embedding.")
    return sorted(jobs, key=lambda job: job.place), notes


def config_of(source: GGUF) -> dict[str, Any]:
    """config.json's content.

    Raises:
        CheckpointError: another model, or a key is missing.
    """
    meta, kind = source.metadata, source.metadata.get("general.architecture")
    if kind != ARCHITECTURE:
        hint = " (the autoregressive Gemma 4: llama.cpp and mlx-lm run it)" if str(kind).startswith("gemma4") else ""
        raise CheckpointError(f"{source.path} holds the model {kind!r}{hint}; mlx-dgemma runs {ARCHITECTURE!r} only.")

    def own(key: str) -> Any:
        return _required(source, f"{ARCHITECTURE}.{key}")

    count = own("block_count")
    sliding = _each(own("attention.sliding_window_pattern"), count)
    heads = _each(own("attention.head_count_kv"), count)
    kinds = ["sliding_attention" if one else "full_attention" for one in sliding]
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source.path} lacks token_embd.weight; download it again.")
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": embedding.shape[0],
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": count,
        "layer_types": kinds,
        "num_attention_heads": own("attention.head_count"),
        "num_key_value_heads": next((n for n, one in zip(heads, sliding) if one), heads[0]),
        "num_global_key_value_heads": next((n for n, one in zip(heads, sliding) if not one), heads[0]),
        "head_dim": own("attention.key_length_swa"),
        "global_head_dim": own("attention.key_length"),
        "sliding_window": own("attention.sliding_window"),
        "num_experts": own("expert_count"),
        "top_k_experts": own("expert_used_count"),
        "moe_intermediate_size": own("expert_feed_forward_length"),
        "rms_norm_eps": _short(own("attention.layer_norm_rms_epsilon")),
        "final_logit_softcapping": _short(own("final_logit_softcapping")),
        "max_position_embeddings": own("context_length"),
        "use_bidirectional_attention": "vision",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": _short(own("rope.freq_base_swa"))},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": _short(own("rope.freq_base")),
                "partial_rotary_factor": _turned(source),
            },
        },
    }
    ids = {"boi_token_id": "<|image>", "image_token_id": "<|image|>", "eoi_token_id": "<image|>"}
    tokens = {token: i for i, token in enumerate(meta.get("tokenizer.ggml.tokens", ()))}
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": _required(source, "diffusion.canvas_length"),
        "dtype": "bfloat16",
        "eos_token_id": end_tokens(source),
        "text_config": text,
        **{key: tokens[token] for key, token in ids.items() if token in tokens},
    }


def generation_of(source: GGUF) -> dict[str, Any]:
    """generation_config.json's content: the sampler that the file names."""
    keys = {
        "max_denoising_steps": "eb_max_steps",
        "t_min": "eb_t_min",
        "t_max": "eb_t_max",
        "stability_threshold": "eb_stability_threshold",
        "confidence_threshold": "eb_confidence_threshold",
    }
    meta = source.metadata
    found: dict[str, Any] = {"eos_token_id": end_tokens(source)}
    found |= {key: _short(meta[f"diffusion.{name}"]) for key, name in keys.items() if f"diffusion.{name}" in meta}
    if (bound := meta.get("diffusion.eb_entropy_bound")) is not None:
        found["sampler_config"] = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": _short(bound)}
    return found


def end_tokens(source: GGUF) -> list[int]:
    """The end of a text, the end of a turn, and the hand-off to a tool, as far as the vocabulary has them."""
    meta = source.metadata
    tokens = {token: i for i, token in enumerate(meta.get("tokenizer.ggml.tokens", ()))}
    ids = [meta.get("tokenizer.ggml.eos_token_id"), tokens.get("<eos>"), meta.get("tokenizer.ggml.eot_token_id")]
    ids += [tokens.get("<turn|>"), tokens.get("<|tool_response>")]
    return list(dict.fromkeys(one for one in ids if one is not None)) or [1]


def _required(source: GGUF, key: str) -> Any:
    if key not in source.metadata:
        raise CheckpointError(f"{source.path} lacks {key}, which no tensor tells; convert it again with llama.cpp.")
    return source.metadata[key]


def _each(value: Any, count: int) -> list[Any]:
    """One value for every layer."""
    return list(value) if isinstance(value, list) else [value] * count


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that stands for it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _turned(source: GGUF) -> float:
    """The share of a full layer's pairs that RoPE turns; the others have a frequency that is divided by 1e30."""
    table = source.tensors.get("rope_freqs.weight")
    if table is None:
        raise CheckpointError(f"{source.path} lacks rope_freqs.weight; convert it again with llama.cpp.")
    divisors = table.decode(read_ranges(table.ranges(0, table.rows)), 0, table.rows)
    turned = int((divisors < 1e20).sum())
    if not np.all(divisors.reshape(-1)[:turned] == 1):
        raise CheckpointError(f"{source.path} has frequency factors in rope_freqs.weight that are not computed.")
    return turned / divisors.size
