"""The block loop: canvases of noise become blocks of text. It knows no text, terminal or HTTP.

Three scopes: a step is one forward over the canvas, a block is one canvas until it settles, a commit
encodes the block into the prefix. Whatever is watched and whoever is beside, the draws are the same: every
random number comes from a key that depends on the job's seed, the block and the step alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..model import device
from ..model.attention import SCORE_BYTES

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..model.kv_cache import Prefix


def prefill(*arguments: Any, **named: Any) -> None:
    """Encode a prompt; takes what `encoding` takes."""
    for _ in encoding(*arguments, **named):
        pass


def encoding(
    model: DiffusionGemma,
    prefix: Prefix,
    tokens: np.ndarray,
    chunk: int | None,
    mask: np.ndarray | None = None,
    features: Sequence[mx.array | None] = (),
) -> Iterator[None]:
    """Encode a prompt chunk by chunk, so that memory is bounded by the chunk; others may go on in between.

    Args:
        tokens: [B, L] int32.
        chunk: tokens at once, None for `fitting_chunk`; a chunk ends before a picture rather than in it, and a longer
            picture is whole.
        mask: [B, L], false where the left padding is.
        features: of each row the soft tokens [tokens, H] of its placeholders, or None.
    """
    held = (
        tokens == model.config.image_token_id if any(f is not None for f in features) else np.zeros_like(tokens, bool)
    )
    for start, end in chunks(held, chunk or fitting_chunk(model, *tokens.shape)):
        seen = [
            f[int(row[:start].sum()) : int(row[:end].sum())]
            for f, row in zip(features, held)
            if f is not None and row[start:end].any()
        ]
        model.encode(
            mx.array(tokens[:, start:end]),
            prefix,
            mask=None if mask is None else mask[:, start:end],
            features=mx.concatenate(seen) if seen else None,
        )
        evaluate(prefix)
        if end < tokens.shape[1]:
            mx.clear_cache()
        yield


def fitting_chunk(model: DiffusionGemma, batch_size: int, length: int) -> int:
    """Prompt tokens to encode at once: 512, or 1,024 of a prompt beyond 4,096.

    Longer passes read the weights less often but hold more: at the release's shape 2,048 tokens take 2 GiB. Fewer,
    256 at least, where a sliding layer's scores would exceed `SCORE_BYTES`.
    """
    config, size = model.config.text, 512 if length <= 4096 else 1024
    near = batch_size * config.num_attention_heads * model.dtype.size  # bytes of scores, of a query over a key
    while size > 256 and near * size * (config.sliding_window - 1 + size) > SCORE_BYTES:
        size //= 2
    return size


def evaluate(prefix: Prefix) -> None:
    """Compute what was encoded, layer after layer."""
    queue = device.Queue()
    queue.add(*prefix.stages, prefix.state)
    queue.finish()


def chunks(held: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Cut [B, L] into (start, end) of about `size` columns, never inside a run of true in any row."""
    length = held.shape[1]
    inside = np.zeros(length + 1, bool)  # a border here would cut a run
    inside[1:length] = (held[:, 1:] & held[:, :-1]).any(axis=0)
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
