"""Does the result compute what the source computes? Both run in float32 on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint import Checkpoint
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model import DiffusionGemma

from .jobs import make_jobs, source_quantization

PROMPT, CANVAS = 32, 64  # tokens


@dataclass(frozen=True)
class Verification:
    """How far the result's logits lie from the source's."""

    positions: int  # compared, over both steps
    max_difference: float  # largest absolute difference of two logits
    mean_kl: float  # KL(source || result) in nats, mean over positions
    argmax_agreement: float  # share of positions with the same best token
    equal: bool  # bit for bit


def verify_conversion(source: Checkpoint, result: Checkpoint, exact: bool) -> Verification:
    """Compare the logits of two denoising steps, the second self-conditioned, on fixed tokens.

    Weights are unpacked to float32 as they are needed and dropped after use, so that a few layers'
    worth of them are in memory at a time. The vision tower takes no part.

    Args:
        source: the checkpoint converted.
        result: what became of it.
        exact: whether every weight kept its bits, so that nothing may differ.

    Raises:
        CheckpointError: something differs although nothing may.
    """
    before = _logits(source)
    after = _logits(result)
    p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (before, after))
    equal = mx.array_equal(before, after, equal_nan=True).item()
    difference = mx.abs(before - after).max().item()
    if exact and not equal:
        raise CheckpointError(
            f"The result's logits differ from the source's by up to {difference:.3g}, although its weights should be "
            "the same; convert again, and if it stays so, check disk and memory."
        )
    return Verification(
        positions=before.shape[0],
        max_difference=difference,
        mean_kl=mx.sum(mx.exp(p) * (p - q), axis=-1).mean().item(),
        argmax_agreement=(before.argmax(axis=-1) == after.argmax(axis=-1)).mean().item(),
        equal=equal,
    )


def _logits(checkpoint: Checkpoint) -> mx.array:
    """Logits of two steps, [2 * canvas, vocabulary] float32.

    Each pass takes a model of its own whose weights are not evaluated yet: the graph frees them layer by layer.
    """
    config = checkpoint.config
    random = np.random.default_rng(0)
    draw = (random.integers(0, config.text.vocab_size, (1, n)) for n in (PROMPT, min(CANVAS, config.canvas_length)))
    prompt, canvas = (mx.array(tokens, mx.int32) for tokens in draw)
    prefix = _lazy(checkpoint).new_prefix()
    _lazy(checkpoint).encode(prompt, prefix)
    mx.eval(prefix.state)
    first = _step(_lazy(checkpoint), canvas, prefix, None)
    conditioning = _lazy(checkpoint).condition(first)
    mx.eval(conditioning)
    second = _step(_lazy(checkpoint), canvas, prefix, conditioning)
    return mx.concatenate([first[0], second[0]])


def _step(model: DiffusionGemma, canvas, prefix, conditioning) -> mx.array:
    logits = model.logits(model.denoise(canvas, prefix, conditioning))
    model.clear()  # nothing but the graph may hold a weight
    mx.eval(logits)
    return logits


def _lazy(checkpoint: Checkpoint) -> DiffusionGemma:
    """The model with float32 weights that are read when they are needed."""
    packed = source_quantization(checkpoint)
    files = {file: mx.load(str(file)) for file in {info.file for info in checkpoint.tensors.values()}}
    arrays = {}
    for job in make_jobs(checkpoint, packed, None, None):
        parts = [files[info.file][name] for name, info in zip(job.names, job.sources)]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        arrays[job.target] = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    for path, quantization in packed.items():
        packing = (arrays[f"{path}.weight"], arrays.pop(f"{path}.scales"), arrays.pop(f"{path}.biases", None))
        arrays[f"{path}.weight"] = mx.dequantize(*packing, **quantization.as_dict).astype(mx.float32)
    model = DiffusionGemma(checkpoint.config)
    model.load_weights(list(arrays.items()), strict=True)
    return model
