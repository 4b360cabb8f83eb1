"""Does the result compute what the source computes? Both run in float32 on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.prompt.messages import messages_of
from mlx_dgemma.prompt.template import render

from .jobs import make_jobs, source_quantization

PROMPT = "Tell me a short story about a fox."
CANVAS = 32  # tokens at most


@dataclass(frozen=True)
class Verification:
    """How far the result's logits lie from the source's."""

    positions: int  # compared, over both steps
    max_difference: float  # largest absolute difference of two logits
    mean_kl: float  # KL(source || result) in nats, mean over positions
    argmax_agreement: float  # share of positions with the same best token
    equal: bool  # bit for bit


def verify_conversion(source: Checkpoint, result: Checkpoint, exact: bool) -> Verification:
    """Compare the logits of two denoising steps, the second self-conditioned, on a fixed prompt and canvas.

    Weights are unpacked to float32 as they are needed and dropped after use, so that a few layers'
    worth of them are in memory at a time. The vision tower takes no part.

    Args:
        source: the checkpoint converted.
        result: what became of it.
        exact: whether every weight kept its bits, so that nothing may differ.

    Raises:
        CheckpointError: something differs although nothing may, or the tokenizer cannot be used.
    """
    try:
        prompt = render(load_tokenizer(result.path), messages_of(PROMPT))
    except Exception as error:  # readers of tokenizers raise what they like
        raise CheckpointError(f"The tokenizer in {source.path} cannot be used ({error}); download it again.") from None
    before = _logits(source, prompt)
    after = _logits(result, prompt)
    p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (before, after))
    equal = bool(mx.array_equal(before, after, equal_nan=True))
    difference = float(mx.abs(before - after).max())
    if exact and not equal:
        raise CheckpointError(
            f"The result's logits differ from the source's by up to {difference:.3g}, although its weights should be "
            "the same; convert again, and if it stays so, check disk and memory."
        )
    return Verification(
        positions=before.shape[0],
        max_difference=difference,
        mean_kl=float(mx.sum(mx.exp(p) * (p - q), axis=-1).mean()),
        argmax_agreement=float((before.argmax(axis=-1) == after.argmax(axis=-1)).mean()),
        equal=equal,
    )


def _logits(checkpoint: Checkpoint, prompt: list[int]) -> mx.array:
    """Logits of two steps, [2 * canvas, vocabulary] float32.

    Each pass takes a model of its own whose weights are not evaluated yet: the graph frees them layer by layer.
    """
    config = checkpoint.config
    size = (1, min(CANVAS, config.canvas_length))
    canvas = mx.array(np.random.default_rng(0).integers(0, config.text.vocab_size, size), mx.int32)
    prefix = _lazy(checkpoint).new_prefix()
    _lazy(checkpoint).encode(mx.array([prompt], mx.int32), prefix)
    mx.eval(prefix.state)
    first = _step(_lazy(checkpoint), canvas, prefix, None)
    conditioning = _lazy(checkpoint).condition(first)
    mx.eval(conditioning)
    second = _step(_lazy(checkpoint), canvas, prefix, conditioning)
    return mx.concatenate([first[0], second[0]])


def _step(model: DiffusionGemma, canvas: mx.array, prefix: Prefix, conditioning: mx.array | None) -> mx.array:
    logits = model.logits(model.denoise(canvas, prefix, conditioning))
    model.clear()  # nothing but the graph may hold a weight
    mx.eval(logits)
    return logits


def _lazy(checkpoint: Checkpoint) -> DiffusionGemma:
    """The model with float32 weights that are read when they are needed."""
    packed = source_quantization(checkpoint)
    files: dict[Path, Any] = {file: mx.load(str(file)) for file in {info.file for info in checkpoint.tensors.values()}}
    arrays: dict[str, mx.array] = {}
    for job in make_jobs(checkpoint, packed, None, None):
        parts = [files[info.file][name] for name, info in zip(job.names, job.sources)]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        arrays[job.target] = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    for path, quantization in packed.items():
        scales, biases = arrays.pop(f"{path}.scales"), arrays.pop(f"{path}.biases", None)
        weight = mx.dequantize(arrays[f"{path}.weight"], scales, biases, **quantization.as_dict)
        arrays[f"{path}.weight"] = weight.astype(mx.float32)
    model = DiffusionGemma(checkpoint.config)
    model.load_weights(list(arrays.items()), strict=True)
    return model
