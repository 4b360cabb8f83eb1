"""Compare the logits of a converted checkpoint with those of its source, both in float32 on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.errors import CheckpointError, OptionError, human
from mlx_dgemma.model import device
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix
from mlx_dgemma.prompt.messages import messages_of
from mlx_dgemma.prompt.template import render

from .jobs import Job, make_jobs, source_quantization
from .sources.parts import Decoded

PROMPT = "Tell me a short story about a fox."
CANVAS = 32  # largest number of canvas tokens


@dataclass(frozen=True)
class Verification:
    """How far the result's logits differ from the source's.

    Attributes:
        positions: number of positions compared, over both denoising steps.
        max_difference: largest absolute difference of two logits.
        mean_kl: KL(source || result) in nats, averaged over positions.
        argmax_agreement: share of positions with the same most likely token.
        equal: True if all logits are equal bit for bit.
    """

    positions: int
    max_difference: float
    mean_kl: float
    argmax_agreement: float
    equal: bool


def verify_conversion(
    source: Checkpoint, result: Checkpoint, exact: bool, decoded: Sequence[Job | Decoded] | None = None
) -> Verification:
    """Compare the logits of two denoising steps, the second self-conditioned, on a fixed prompt and canvas.

    Weights are loaded and dequantized to float32 when they are needed and freed after use, so only a few layers are in
    memory at a time. The vision tower is not compared.

    Args:
        source: the checkpoint that was converted.
        result: the converted checkpoint.
        exact: True if every weight kept its bits; then the logits must be equal.
        decoded: the jobs of a source in a format that is decoded; all of it is in memory then.

    Raises:
        CheckpointError: the logits differ although `exact` is set, or the tokenizer cannot be used.
    """
    try:
        prompt = render(load_tokenizer(result), messages_of(PROMPT))
    except Exception as error:  # tokenizer libraries raise exceptions of many types
        raise CheckpointError(f"The tokenizer in {source.path} cannot be used ({error}); download it again.") from None
    before = _logits(source, prompt) if decoded is None else _logits(source, prompt, _decoded_model(source, decoded))
    after = _logits(result, prompt)
    p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (before, after))
    equal = bool(mx.array_equal(before, after, equal_nan=True))
    difference = float(mx.abs(before - after).max())
    if exact and not equal:
        raise CheckpointError(
            f"The result's logits differ from the source's by up to {difference:.3g}, although its weights should be "
            "the same; convert again, and check the disk and the memory if it happens again."
        )
    return Verification(
        positions=before.shape[0],
        max_difference=difference,
        mean_kl=float(mx.sum(mx.exp(p) * (p - q), axis=-1).mean()),
        argmax_agreement=float((before.argmax(axis=-1) == after.argmax(axis=-1)).mean()),
        equal=equal,
    )


def check_decoded_fits(source: Checkpoint) -> None:
    """Refuse to verify a source that is decoded as a whole and does not fit into memory."""
    needed = 2 * source.parameters
    if needed > device.available():
        raise OptionError(
            f"--verify takes {human(needed)} for a source in this format, and this machine gives "
            f"{human(device.available())}; leave it out."
        )


def _logits(checkpoint: Checkpoint, prompt: list[int], model: Callable[[], DiffusionGemma] | None = None) -> mx.array:
    """Logits of two denoising steps, [2 * canvas, vocabulary] float32.

    Each pass uses a new model whose weights are not evaluated yet, so that MLX's graph frees them layer by layer.
    """
    config = checkpoint.config
    size = (1, min(CANVAS, config.canvas_length))
    canvas = mx.array(np.random.default_rng(0).integers(0, config.text.vocab_size, size), mx.int32)
    make = model or partial(_lazy_model, checkpoint)
    prefix = make().new_prefix()
    make().encode(mx.array([prompt], mx.int32), prefix)
    mx.eval(prefix.state)
    first = _step(make(), canvas, prefix, None)
    conditioning = make().condition(first)
    mx.eval(conditioning)
    second = _step(make(), canvas, prefix, conditioning)
    return mx.concatenate([first[0], second[0]])


def _step(model: DiffusionGemma, canvas: mx.array, prefix: Prefix, conditioning: mx.array | None) -> mx.array:
    logits = model.logits(model.denoise(canvas, prefix, conditioning))
    model.clear()  # only the graph may keep weights alive
    mx.eval(logits)
    return logits


def _lazy_model(checkpoint: Checkpoint) -> DiffusionGemma:
    """The model with float32 weights that are read from disk when they are evaluated."""
    quantized = source_quantization(checkpoint)
    files: dict[Path, Any] = {file: mx.load(str(file)) for file in {info.file for info in checkpoint.tensors.values()}}
    arrays: dict[str, mx.array] = {}
    for job in make_jobs(checkpoint, quantized, None, None):
        parts = [files[info.file][name] for name, info in zip(job.names, job.sources)]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        arrays[job.target] = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    for path, quantization in quantized.items():
        scales, biases = arrays.pop(f"{path}.scales"), arrays.pop(f"{path}.biases", None)
        weight = mx.dequantize(arrays[f"{path}.weight"], scales, biases, **quantization.as_dict)
        arrays[f"{path}.weight"] = weight.astype(mx.float32)
    model = DiffusionGemma(checkpoint.config)
    model.load_weights(list(arrays.items()), strict=True)
    return model


def _decoded_model(checkpoint: Checkpoint, jobs: Sequence[Job | Decoded]) -> Callable[[], DiffusionGemma]:
    """Makes models with the float32 values of decoded weights, which are held in the result's float dtype."""
    held = [(job.target, job.whole()) for job in jobs]

    def make() -> DiffusionGemma:
        model = DiffusionGemma(checkpoint.config)
        model.load_weights([(name, array.astype(mx.float32)) for name, array in held], strict=True)
        return model

    return make
