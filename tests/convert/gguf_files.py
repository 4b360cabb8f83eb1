"""GGUF files as llama.cpp's converter writes them for this model, and ggml's codes made of arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

IN_LAYERS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj.weight": "ffn_gate_up_exps.weight",
    "experts.down_proj.weight": "ffn_down_exps.weight",
    "layer_scalar": "layer_output_scale.weight",
}
OUTSIDE = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    "self_conditioning.up_proj.weight": "self_cond_up.weight",
    "self_conditioning.down_proj.weight": "self_cond_down.weight",
}


def gguf_name(name: str) -> str:
    if name.startswith("model.encoder.language_model.layers."):
        return f"blk.{name.split('.')[4]}.enc_layer_output_scale.weight"
    rest = name.removeprefix("model.decoder.")
    if rest.startswith("layers."):
        _, layer, rest = rest.split(".", 2)
        return f"blk.{layer}.{IN_LAYERS[rest]}"
    return OUTSIDE[rest]


def _super_blocks(weight: np.ndarray, levels: int):
    """(d, dmin, scales, mins, codes, values) of groups of 32 in blocks of 256: d * scale * code - dmin * min."""
    groups = weight.reshape(-1, 8, 32)
    low = np.minimum(groups.min(axis=2), 0)
    step = np.maximum((groups.max(axis=2) - low) / (levels - 1), 1e-8)
    d, dmin = (np.maximum(one.max(axis=1, keepdims=True) / 63, 1e-6).astype(np.float16) for one in (step, -low))
    scales, mins = (
        np.round(one / of.astype(np.float32)).clip(floor, 63).astype(np.uint8)
        for one, of, floor in ((step, d, 1), (-low, dmin, 0))
    )
    scale, shift = d.astype(np.float32) * scales, dmin.astype(np.float32) * mins
    codes = np.round((groups + shift[..., None]) / scale[..., None]).clip(0, levels - 1).astype(np.uint8)
    return d, dmin, scales, mins, codes, (codes * scale[..., None] - shift[..., None]).reshape(weight.shape)


def _six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight scales and eight mins of six bits in twelve bytes."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], axis=1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """The low halves of codes [blocks, 8, 32]: of each two groups, one in the low and one in the high half."""
    low = codes & 15
    return (low[:, ::2] | low[:, 1::2] << 4).reshape(len(codes), -1)


def q4_k(weight: np.ndarray):
    d, dmin, scales, mins, codes, values = _super_blocks(weight, 16)
    data = [d.view(np.uint8), dmin.view(np.uint8), _six_bits(scales, mins), _nibbles(codes)]
    return np.concatenate(data, axis=1), values


def q5_k(weight: np.ndarray):
    d, dmin, scales, mins, codes, values = _super_blocks(weight, 32)
    high = ((codes >> 4) << np.arange(8, dtype=np.uint8)[None, :, None]).sum(axis=1, dtype=np.uint8)
    data = [d.view(np.uint8), dmin.view(np.uint8), _six_bits(scales, mins), high, _nibbles(codes)]
    return np.concatenate(data, axis=1), values


def q6_k(weight: np.ndarray):
    groups = weight.reshape(-1, 16, 16)
    step = np.abs(groups).max(axis=2) / 31
    d = np.maximum(step.max(axis=1, keepdims=True) / 127, 1e-6).astype(np.float16)
    scales = np.round(step / d.astype(np.float32)).clip(1, 127).astype(np.int8)
    scale = (d.astype(np.float32) * scales)[..., None]
    codes = np.round(groups / scale).clip(-32, 31)
    values = (codes * scale).reshape(weight.shape)
    halves = (codes + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4).reshape(len(d), -1)
    high = ((halves >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=2, dtype=np.uint8).reshape(len(d), -1)
    return np.concatenate([low, high, scales.view(np.uint8), d.view(np.uint8)], axis=1), values


def encoded(weight: np.ndarray, kind: str):
    """(raw bytes by rows, type number, values); K-quants fall back to Q8_0 where 256 does not divide a row."""
    from gguf.constants import GGMLQuantizationType as Types
    from gguf.quants import dequantize, quantize

    own = {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
    if kind in own and weight.shape[-1] % 256 == 0:
        data, values = own[kind](np.ascontiguousarray(weight, np.float32))
        return np.ascontiguousarray(data).reshape(*weight.shape[:-1], -1), Types[kind], values
    kind = "Q8_0" if kind in own else kind
    data = quantize(weight.astype(np.float32), Types[kind])
    return data, Types[kind], dequantize(data, Types[kind]) if kind != "F32" else weight


def add_sizes(writer, text: dict) -> None:
    sliding = [kind_ == "sliding_attention" for kind_ in text["layer_types"]]
    writer.add_block_count(len(sliding))
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    full, swa = text["num_global_key_value_heads"], text["num_key_value_heads"]
    writer.add_head_count_kv([swa if one else full for one in sliding])
    writer.add_rope_freq_base(1e6)
    writer.add_float32("diffusion-gemma.rope.freq_base_swa", 1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(text["global_head_dim"])
    writer.add_value_length(text["global_head_dim"])
    writer.add_uint32("diffusion-gemma.attention.key_length_swa", text["head_dim"])
    writer.add_uint32("diffusion-gemma.attention.value_length_swa", text["head_dim"])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["top_k_experts"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(text["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_causal_attention(False)


def add_tokenizer(writer, tokenizer: Path) -> None:
    whole = json.loads((tokenizer / "tokenizer.json").read_text())
    special = {one["id"] for one in whole["added_tokens"]}
    tokens = sorted(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    tokens += [one["content"] for one in whole["added_tokens"] if one["id"] >= len(tokens)]
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_chat_template((tokenizer / "chat_template.jinja").read_text())


def write_gguf(
    file: Path, weights: dict[str, np.ndarray], config: dict, kind: str, tokenizer: Path | None, apart: bool = False
) -> dict[str, np.ndarray]:
    """Write the file; returns {parameter: what it stands for}.

    Args:
        file: to be written.
        weights: {parameter: values}.
        config: config.json's content.
        kind: ggml's name for the type of matrices.
        tokenizer: a folder whose vocabulary is written, or None.
        apart: write the experts' gate and up as two tensors.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "diffusion-gemma")
    text = config["text_config"]
    add_sizes(writer, text)
    writer.add_uint32("diffusion.canvas_length", config["canvas_length"])
    writer.add_uint32("diffusion.eb_max_steps", 24)
    writer.add_float32("diffusion.eb_entropy_bound", 0.2)
    if tokenizer:
        add_tokenizer(writer, tokenizer)
    pairs = text["global_head_dim"] // 2
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * (pairs // 4) + [1e30] * (pairs - pairs // 4), np.float32))
    meaning = {}
    for name, weight in weights.items():
        if ".vision_tower." in name or ".embed_vision." in name:
            continue
        own = kind if weight.ndim > 1 and "router" not in name else "F32"
        pieces = np.split(weight, 2, axis=1) if apart and "gate_up" in name else [weight]
        found = []
        for i, piece in enumerate(pieces):
            data, number, values = encoded(np.ascontiguousarray(piece), own)
            label = gguf_name(name) if len(pieces) == 1 else gguf_name(name).replace("gate_up", ("gate", "up")[i])
            writer.add_tensor(label, data, raw_dtype=number)
            found.append(values.reshape(piece.shape))
        meaning[name] = np.concatenate(found, axis=1) if len(found) > 1 else found[0]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning
