"""What the source predicts in recorded states, on disk: its most probable tokens and what is left for the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

from ..search.replay import Hidden, logits
from ..search.trajectories import Trajectory

KEPT = 2048  # tokens of a position, the most probable ones
FLOOR = -20.0  # log-probability below which nothing is told apart


def write_targets(
    folder: Path, model: DiffusionGemma, found: Sequence[Hidden], trajectories: Sequence[Trajectory]
) -> None:
    """Write a file for each trajectory.

    Args:
        folder: where to.
        model: the source, for its final norm and head.
        found: outputs of its last layer.
        trajectories: theirs.
    """
    kept = min(KEPT, model.config.text.vocab_size)
    for i, (hidden, one) in enumerate(zip(found, trajectories)):
        tokens, values = [], []
        for part in logits(model, hidden, one):
            log_p = part - mx.logsumexp(part, axis=-1, keepdims=True)
            best = mx.argpartition(log_p, kth=-kept, axis=-1)[:, -kept:]
            tokens.append(best.astype(mx.int32))
            values.append(mx.maximum(mx.take_along_axis(log_p, best, axis=-1), FLOOR).astype(mx.float16))
            mx.eval(tokens[-1], values[-1])
        arrays = {"tokens": mx.concatenate(tokens), "log_p": mx.concatenate(values)}
        mx.save_safetensors(str(folder / f"{i}.safetensors"), arrays)


def read_targets(folder: Path, index: int) -> tuple[mx.array, mx.array]:
    """[n, kept] int32 tokens and their [n, kept] float32 log-probabilities, for all positions of a trajectory."""
    arrays = mx.load(str(folder / f"{index}.safetensors"))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays["tokens"], arrays["log_p"].astype(mx.float32)


def divergence(tokens: mx.array, log_p: mx.array, found: mx.array) -> mx.array:
    """KL(source || candidate) in nats, [n]; tokens that are not kept count as one.

    Args:
        tokens, log_p: from `read_targets`.
        found: [n, V], the candidate's logits.
    """
    log_q = mx.take_along_axis(found, tokens, axis=-1) - mx.logsumexp(found, axis=-1, keepdims=True)
    p = mx.exp(log_p)
    told = (p * (log_p - log_q)).sum(axis=-1)
    if tokens.shape[-1] == found.shape[-1]:
        return told
    rest, own = (mx.maximum(1 - one.sum(axis=-1), 1e-6) for one in (p, mx.exp(log_q)))
    return told + rest * (mx.log(rest) - mx.log(own))
