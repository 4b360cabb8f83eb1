"""Denoising trajectories of a model: the states that its own sampler visits, recorded once and replayed.

A state is what one step sees: a canvas, what conditions it, its temperature, and the tokens of the prefix. The prefix
is kept as tokens, so that whatever is measured encodes it by itself.

L is a prefix's length, S the states of a trajectory, C the canvas length, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dgemma.decoding import sampler
from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.lookahead import advance
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.step import inputs
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.files import atomic_file
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix

FORMAT = "1"
MOST = 4  # times as many states of one canvas as of a mean one: they are measured at once, which takes memory
TOGETHER = 16  # canvases denoised together: a layer that is read from the disk serves all of them


@dataclass(frozen=True)
class Trajectory:
    """Some states of one canvas.

    Attributes:
        prefix: [L] int32, the tokens before the canvas.
        canvases: [S, C] int32, what each step sees.
        conditioning: [S, C, H] float16, zeros where there was none.
        steps: [S] int, 0 for a canvas's first step, which has no conditioning.
        temperatures: [S] float32, of each step's logits.
        text: [C] bool, the positions that belong to the answer in the end.
    """

    prefix: np.ndarray
    canvases: np.ndarray
    conditioning: np.ndarray
    steps: np.ndarray
    temperatures: np.ndarray
    text: np.ndarray


def record(
    model: DiffusionGemma,
    options: GenerationOptions,
    prompts: Sequence[Sequence[int]],
    states: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Denoise the first canvas of each prompt's answer and keep some of the states.

    Args:
        model: the source; `Shelf.trunk` gives one whose layers are read when they are needed.
        options: of its sampler.
        prompts: token ids, with the generation prompt.
        states: of each canvas as a mean. Of one that settles sooner there are fewer, and of the others more, spread
            evenly from its first step to its last.
        seed: of the noise.
        progress: called with the prompts done and in total.

    Returns:
        A trajectory for each prompt.
    """
    found: list[Trajectory] = []
    options = options.override(exact=False, fast=False, canvas="full")
    for start in range(0, len(prompts), TOGETHER):
        some = prompts[start : start + TOGETHER]
        keys = mx.stack([mx.random.key((seed << 32) + start + i) for i in range(len(some))])
        found += _together(model, options, some, keys, states)
        if progress:
            progress(len(found), len(prompts))
    return found


def _together(
    model: DiffusionGemma, options: GenerationOptions, prompts: Sequence[Sequence[int]], keys: mx.array, states: int
) -> list[Trajectory]:
    prefix, rooms = _encoded(model, prompts, options), [options.max_tokens] * len(prompts)
    batch = CanvasBatch(model, prefix, options, keys, rooms)
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in prompts]
    while not all(batch.finished) and max(batch.steps) < options.max_denoising_steps:
        canvas, conditioning = inputs(batch, batch.rows.last, batch.steps, batch.dense)
        if conditioning is None:
            conditioning = mx.zeros((*canvas.shape, model.config.text.hidden_size))
        on_host, conditions = np.asarray(canvas), np.asarray(conditioning.astype(mx.float16))
        for i, over in enumerate(batch.finished):
            if not over:
                seen[i].append((on_host[i], conditions[i]))
        step = advance(batch, ahead=False)
        if step.overflowed:
            raise model.range_error()
    ends, stops = mx.array(np.asarray(step.argmax)), mx.array(options.end_tokens, mx.int32)
    text = np.asarray(sampler.text(ends, stops, mx.array(rooms, mx.int32)))
    counts = shared([min(len(one), MOST * states) for one in seen], states * len(prompts))
    return [_thinned(prompt, one, own, options, n) for prompt, one, own, n in zip(prompts, seen, text, counts)]


def shared(lengths: Sequence[int], total: int) -> list[int]:
    """How many states of each trajectory are kept: of `total` an even share, and more where others have fewer.

    Args:
        lengths: the states that each has.
        total: states, at least one for each.
    """
    counts = [0] * len(lengths)
    for place, i in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        counts[i] = min(lengths[i], (total - sum(counts)) // (len(lengths) - place))
    return counts


def _encoded(model: DiffusionGemma, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> Prefix:
    """The prompts as rows of one prefix, padded on the left."""
    longest = max(map(len, prompts))
    tokens, mask = np.zeros((len(prompts), longest), np.int32), np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, True
    prefix = model.new_prefix(len(prompts), longest + model.config.canvas_length)
    prefill(model, prefix, tokens, options.prefill_chunk, mask)
    return prefix


def _thinned(
    prompt: Sequence[int],
    seen: list[tuple[np.ndarray, np.ndarray]],
    text: np.ndarray,
    options: GenerationOptions,
    states: int,
) -> Trajectory:
    """A trajectory of so many of these states, the first and the last among them."""
    total = options.max_denoising_steps
    steps = np.round(np.linspace(0, len(seen) - 1, states)).astype(int)
    warm = [sampler.temperature(total - step, total, options.t_min, options.t_max) for step in steps.tolist()]
    return Trajectory(
        prefix=np.array(prompt, np.int32),
        canvases=np.stack([seen[step][0] for step in steps]).astype(np.int32),
        conditioning=np.stack([seen[step][1] for step in steps]),
        steps=steps,
        temperatures=np.array(warm, np.float32),
        text=text,
    )


def save(file: Path, trajectories: Sequence[Trajectory]) -> None:
    """Write trajectories into one safetensors file.

    Raises:
        DgemmaError: the file cannot be written.
    """
    arrays = {
        f"{i}.{name}": mx.array(value.astype(np.int32) if value.dtype == np.int64 else value)
        for i, one in enumerate(trajectories)
        for name, value in vars(one).items()
    }
    with atomic_file(file) as draft:
        mx.save_safetensors(str(draft), arrays, {"trajectories": FORMAT, "count": str(len(trajectories))})


def load(file: Path) -> list[Trajectory]:
    """Read what `save` wrote.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
        arrays, told = loaded
        if told.get("trajectories") != FORMAT:
            raise ValueError
        names = list(Trajectory.__dataclass_fields__)
        return [
            Trajectory(**{name: np.array(arrays[f"{i}.{name}"]) for name in names}) for i in range(int(told["count"]))
        ]
    except (RuntimeError, ValueError, KeyError):
        raise CheckpointError(f"{file} holds no trajectories; remove it, so that they are recorded again.") from None
