"""Keys of a checkpoint's JSON files that are no fields: which change nothing, and which have one value here."""

from __future__ import annotations

import re
from typing import Any

# Keys that do not change the computation: bookkeeping, training and serving hints.
INERT = frozenset(
    """_name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    default_output_length dtype eos_token_id generation_config global_head_dim id2label
    initializer_range is_encoder_decoder label2id max_position_embeddings output_attentions
    output_hidden_states pad_token_id problem_type quantization quantization_config return_dict
    skip_vision torch_dtype transformers_version use_cache video_token_id vision_soft_tokens_per_image
    vision_soft_tokens_per_video_frame audio_token_id boa_token_id eoa_token_id eoa_token_index
    audio_soft_tokens_per_image audio_ms_per_token ignore_index""".split()
)
# Keys of the Gemma 4 family with the only value that is computed here.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
    "use_double_wide_mlp": False,
}
# Keys of trainers, exporters and older releases of Transformers, which name tools, versions, training and output.
_BOOKKEEPING = re.compile(
    r"_.*|.*version|(unsloth|nemo|trl|peft|axolotl|megatron|optiq|quant|modelopt|sparsity|kv_cache)_?.*|.*_token_(id|index)"
    r"|.*(dropout|loss|jitter|initializer|init_std|parallel|checkpointing).*|author|license.*|description|comment|notes?"
    r"|(model_)?(name|id)|pretraining_tp|tags|date|.*_(date|time|path|url|by|at|dtype|implementation|class)|base_model.*|revision|finetuning_task"
    r"|task_specific_params|prefix|is_decoder|torchscript|tf_legacy_loss|use_bfloat16|pruned_heads|use_return_dict"
    r"|moe_(backend|kernel).*|experts_implementation|seq_length|max_seq_len(gth)?|model_max_length"
)
# Keys of generation that other models' samplers use, token by token.
SAMPLING = frozenset(
    """assistant_confidence_threshold bad_words_ids begin_suppress_tokens compile_config constraints
    decoder_start_token_id diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids
    forced_bos_token_id forced_decoder_ids forced_eos_token_id guidance_scale length_penalty low_memory max_length
    max_matching_ngram_size max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits output_scores
    penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    repetition_penalty sequence_bias stop_strings suppress_tokens target_lookbehind temperature
    token_healing top_h top_k top_p typical_p watermarking_config""".split()
)


def changes_nothing(key: str, value: Any) -> bool:
    """Whether an unknown key is bookkeeping by its name, or is off by its value: false, zero or empty."""
    return not value or _BOOKKEEPING.fullmatch(key) is not None


def unused(where: str, keys: list[str], why: str = "change nothing here") -> list[str]:
    """A note, if there are any, that a file's keys are not used."""
    return [f"{where}: {', '.join(map(repr, sorted(keys)))} {why}."] if keys else []
