"""Estimate the memory that a training run needs."""

from __future__ import annotations

from ..checkpoint.folder import Checkpoint
from ..checkpoint.memory import Need, prefix_bytes
from .config import TrainerConfig
from .objective import MAX_LOGITS_BYTES


def training_need(
    checkpoint: Checkpoint,
    config: TrainerConfig,
    batch_size: int,
    prefix: int,
    trained: int,
    weights: int,
    processes: int = 1,
) -> Need:
    """An upper bound of the peak memory: weights, the KV cache of the prefixes, and everything else.

    It was compared with measurements, see bench/RESULTS.md.

    Args:
        checkpoint: of the model.
        config: of the trainer.
        batch_size: samples per batch.
        prefix: tokens before the canvas in the longest sample.
        trained: number of trainable weights.
        weights: bytes of all weights.
        processes: number of processes that share a batch; each has its own copy of the weights.
    """
    copies = processes if processes > 1 else 0
    text, canvas = checkpoint.config.text, checkpoint.config.canvas_length
    positions = batch_size * (prefix + 2 * canvas)  # encoder: prefix and canvas; decoder: canvas
    # Gradients, both moments and the optimizer's new values; other processes have weights and gradients.
    state = 4 * (4 + 2 * copies) * trained
    layers = text.num_hidden_layers
    inner = 4 * (text.intermediate_size + text.num_attention_heads * max(text.kv_shape("full_attention")[1], 64))
    experts = text.top_k_experts * (3 * text.moe_intermediate_size + 2 * text.hidden_size)
    scores = batch_size * text.num_attention_heads * (prefix + canvas) ** 2
    per_layer = 6 * (positions * (inner + experts + 12 * text.hidden_size) + 2 * scores)
    stored = (2 if config.recompute else 0) * 4 * positions * text.hidden_size * layers
    workspace = state + stored + per_layer * (1 if config.recompute else layers)
    workspace += 6 * min(processes * MAX_LOGITS_BYTES, 4 * positions * text.vocab_size)
    cache = 4 * prefix_bytes(checkpoint.config, prefix + 2 * canvas, 4, batch_size)
    return Need((1 + copies) * weights, cache, workspace)
