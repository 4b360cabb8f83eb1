"""The states that the source model's sampler visits: prompts with canvases on their way, to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.lookahead import advance
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.step import inputs
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

STEPS = (0, 1, 2, 3, 5, 8, 12, 17, 23, 30, 38, 47)  # whose inputs are kept, from 0


@dataclass(frozen=True)
class Trajectory:
    """A prompt, and the canvases behind it as the sampler saw them.

    Attributes:
        prefix: token ids of the prompt.
        canvases: [S, C] int32, the inputs of S denoising steps.
        conditioning: [S, C, H] float16, what conditions them; zeros in a canvas's first step.
    """

    prefix: list[int]
    canvases: np.ndarray
    conditioning: np.ndarray


def record(
    model: DiffusionGemma,
    prompts: Sequence[list[int]],
    options: GenerationOptions,
    seed: int = 0,
    batch_size: int = 8,
    steps: Sequence[int] = STEPS,
) -> list[Trajectory]:
    """Denoise one canvas behind each prompt by the default sampler, and keep the inputs of some steps.

    Args:
        model: of the source.
        prompts: token ids.
        options: of the sampler.
        seed: of the noise.
        batch_size: canvases denoised together.
        steps: steps that are kept of each canvas that gets there.
    """
    options = options.override(exact=False, fast=False, canvas="full")
    found = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        keys = mx.stack([mx.random.key((seed << 32) + start + i) for i in range(len(some))])
        prefixes = []
        for tokens in some:
            prefixes.append(model.new_prefix())
            model.encode(mx.array([tokens], mx.int32), prefixes[-1])
            mx.eval(prefixes[-1].state)
        batch = CanvasBatch(model, prefixes, options, keys)
        kept: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in some]
        for step in range(min(max(steps) + 1, options.max_denoising_steps)):
            if step in steps:
                canvas, conditioning = inputs(batch, batch.rows.last, batch.steps, batch.dense)
                if conditioning is None:
                    conditioning = mx.zeros((*canvas.shape, model.config.text.hidden_size))
                seen, on_host = np.asarray(canvas), np.asarray(conditioning.astype(mx.float16))
                for i, over in enumerate(batch.finished):
                    if not over:
                        kept[i].append((seen[i], on_host[i]))
            if advance(batch, ahead=False).overflowed:
                raise model.range_error()
            if all(batch.finished):
                break
        for tokens, visited in zip(some, kept):
            found.append(Trajectory(list(tokens), *(np.stack(part) for part in zip(*visited))))
    return found
