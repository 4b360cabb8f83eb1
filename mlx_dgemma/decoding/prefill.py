"""Encoding a prompt chunk by chunk, so that memory is bounded by the chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..model import device
from ..model.attention import SCORE_BYTES
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kv_cache import Prefix

LOW_MEMORY_CHUNK = 256  # tokens


def prefill(*arguments: Any, **named: Any) -> None:
    """Encode a prompt at one go; takes what `encode_in_chunks` takes."""
    for _ in encode_in_chunks(*arguments, **named):
        pass


def encode_in_chunks(
    model: DiffusionGemma,
    prefix: Prefix,
    tokens: np.ndarray,
    chunk: int | None,
    mask: np.ndarray | None = None,
    features: Sequence[mx.array | None] = (),
) -> Iterator[None]:
    """Encode a prompt and yield after every chunk, so that others may go on in between.

    Args:
        model: the model.
        prefix: of B rows; extended in place.
        tokens: [B, L] int32.
        chunk: tokens at once, None for `fitting_chunk`; a chunk ends before a picture rather than in it, and a longer
            picture is encoded whole.
        mask: [B, L], false where the left padding is.
        features: of each row the soft tokens [tokens, H] of its placeholders, or None.
    """
    images = np.zeros_like(tokens, bool)
    if any(one is not None for one in features):
        images = tokens == model.config.image_token_id
    for start, end in chunks(images, chunk or fitting_chunk(model, *tokens.shape)):
        in_chunk = [
            one[int(row[:start].sum()) : int(row[:end].sum())]
            for one, row in zip(features, images)
            if one is not None and row[start:end].any()
        ]
        model.encode(
            mx.array(tokens[:, start:end]),
            prefix,
            mask=None if mask is None else mask[:, start:end],
            features=mx.concatenate(in_chunk) if in_chunk else None,
        )
        evaluate(prefix)
        if end < tokens.shape[1]:
            mx.clear_cache()
        yield


def fitting_chunk(model: DiffusionGemma, batch_size: int, length: int) -> int:
    """Prompt tokens to encode at once: 512, or 1,024 of a prompt beyond 4,096 and on Metal, which has kernels for it.

    Longer passes read the weights less often but hold more: at the release's shape 2,048 tokens take 2 GiB. Fewer,
    256 at least, where a sliding layer's scores would exceed `SCORE_BYTES`; `LOW_MEMORY_CHUNK` with `low_memory`.
    """
    config, size = model.config.text, 512 if length <= 4096 and not device.on_metal() else 1024
    size = LOW_MEMORY_CHUNK if model.low_memory else size
    per_score = batch_size * config.num_attention_heads * model.dtype.size  # bytes, of a query over a key
    while size > 256 and per_score * size * (config.sliding_window - 1 + size) > SCORE_BYTES:
        size //= 2
    return size


def evaluate(prefix: Prefix) -> None:
    """Compute what was encoded, layer after layer."""
    queue = device.Queue(prefix.in_flight)
    queue.add(*prefix.stages, prefix.state)
    queue.finish()


def chunks(images: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Cut [B, L] into (start, end) of about `size` columns, never inside a run of true in any row."""
    length = images.shape[1]
    inside = np.zeros(length + 1, bool)  # a border here would cut a run
    inside[1:length] = (images[:, 1:] & images[:, :-1]).any(axis=0)
    start = 0
    while start < length:
        end = min(start + size, length)
        while inside[end] and end > start:
            end -= 1
        if end == start:
            end = min(start + size, length)
            while inside[end]:
                end += 1
        yield start, end
        start = end
