"""How much memory a checkpoint needs and this machine can give."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .checkpoint import Checkpoint
from .config import ModelConfig
from .errors import MemoryLimitError
from .layers import SCORES, on_cpu
from .prefix import STEP

GB = 1e9
AHEAD = 2**28  # bytes in flight beyond which nothing is started
LIMIT = 3 * AHEAD  # bytes in flight beyond which the device may run dry


@dataclass(frozen=True)
class Need:
    """Bytes of unified memory: weights, the prefix's KV, and a denoising step's arrays."""

    weights: int
    prefix: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.prefix + self.workspace


def prefix_bytes(config: ModelConfig, context: int, itemsize: int, batch_size: int = 1) -> int:
    """KV of `context` positions: all of them in full layers, what the window sees in sliding ones."""
    text, total = config.text, 0
    for kind in text.layer_types:
        heads, dim = text.head(kind)
        held = context if kind == "full_attention" else min(context, text.sliding_window - 1)
        slots = -(-(held + config.canvas_length) // STEP) * STEP
        total += 2 * heads * dim * slots * itemsize * batch_size
    return total


def need(checkpoint: Checkpoint, context: int, dtype: str | None = None, dequantize: bool = False) -> Need:
    """Estimate from the headers what loading and a prompt of `context` tokens take.

    The workspace is the larger of a denoising step's and a prefill chunk's, bounds of peaks measured at the
    release's shape (bench/RESULTS.md): eight float32 arrays of [canvas, vocabulary], which exact mode may take and
    the others do not, and eight of [heads, chunk, context] attention scores, which come in chunks of at
    most `layers.SCORES`; the experts' rows are among them.
    """
    itemsize = 4 if dtype == "float32" else 2
    if dequantize or (not checkpoint.quantization and dtype is not None):
        weights = checkpoint.parameters * itemsize
    else:
        weights = checkpoint.nbytes
    config = checkpoint.config
    step = 8 * 4 * config.canvas_length * config.text.vocab_size
    scores = 8 * min(itemsize * config.text.num_attention_heads * min(1024, context) * context, SCORES)
    workspace = max(step, scores)
    return Need(weights, prefix_bytes(config, context, itemsize), workspace)


def context(checkpoint: Checkpoint) -> int:
    """Tokens of context that loading makes sure of: 4,096, or all that a smaller model has."""
    return min(4096, checkpoint.config.text.max_position_embeddings)


def settle(checkpoint: Checkpoint, dtype: str | None = None, dequantize: bool | None = None) -> tuple[str | None, bool]:
    """(dtype, dequantize) as loading takes them where None leaves the choice.

    On the CPU quantized matrix products are slow and float32 is fastest, so weights are unpacked to it
    where they fit; on a GPU they stay as stored.
    """
    if on_cpu() and dtype is None and (dequantize is not False or not checkpoint.quantization):
        dtype = "float32"
    if dequantize is None:
        packed = on_cpu() and checkpoint.quantization is not None
        dequantize = packed and need(checkpoint, context(checkpoint), dtype, True).total <= available()
    return dtype, dequantize


def spare(checkpoint: Checkpoint, rows: int) -> int:
    """Bytes left beside a loaded checkpoint and so many prompts of `context` tokens; 0 where nothing is."""
    dtype, dequantize = settle(checkpoint)
    needed = need(checkpoint, context(checkpoint), dtype, dequantize)
    return max(available() - needed.total - (rows - 1) * needed.prefix, 0)


def available() -> int:
    """Bytes that MLX's default device can hold: Metal's recommended working set, a GPU's or the machine's memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if not on_cpu() and isinstance(info.get(key), int):
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(checkpoint: Checkpoint, needed: Need) -> None:
    """Refuse what does not fit.

    Raises:
        MemoryLimitError: says how much is missing, which recipe would fit, and what to try.
    """
    have = available()
    if needed.total <= have:
        return
    from .convert.recipes import RECIPES

    rest = needed.total - needed.weights
    sizes = {name: recipe.nbytes(checkpoint.shapes) for name, recipe in RECIPES.items()}
    fitting = [name for name, size in sizes.items() if size + rest <= have]
    if fitting:
        best = max(fitting, key=sizes.__getitem__)
        way = f"the recipe {best} would fit ({sizes[best] / GB:.1f} GB of weights)"
    else:
        small = min(sizes, key=sizes.__getitem__)
        way = f"no recipe fits (the smallest, {small}, has {sizes[small] / GB:.1f} GB of weights)"
    if mx.metal.is_available():
        way += "; `sudo sysctl iogpu.wired_limit_mb=N` raises what macOS gives"
    raise MemoryLimitError(
        f"{checkpoint.path.name} needs {needed.total / GB:.1f} GB (weights {needed.weights / GB:.1f}, prefix "
        f"{needed.prefix / GB:.1f}, workspace {needed.workspace / GB:.1f}) and this machine gives {have / GB:.1f} GB: "
        f"{(needed.total - have) / GB:.1f} GB are missing; {way}; --ignore-memory (ignore_memory=True) tries anyway."
    )


class Queue:
    """Starts evaluations without running far ahead of the device.

    MLX enqueues up to a thousand operations, and what they allocate is held until they have run: at the release's
    shape half the layers of a step, gigabytes. Where `AHEAD` bytes are in flight, a queue waits for the oldest
    stage, though not for the last: the device should not run dry. What many short stages let go of comes back late
    and piles up: beyond `LIMIT` it waits for everything all the same.
    """

    def __init__(self):
        self._base = mx.get_active_memory()
        self._waiting: deque[Any] = deque()

    def add(self, *stages: Any) -> None:
        """Start stages, arrays or trees of them, in the order in which they are computed."""
        for stage in stages:
            while len(self._waiting) > 1 and mx.get_active_memory() > self._base + AHEAD:
                mx.eval(self._waiting.popleft())
            if mx.get_active_memory() > self._base + LIMIT:
                mx.synchronize()
            mx.async_eval(stage)
            self._waiting.append(stage)

    def finish(self) -> None:
        """Wait for all of it."""
        while self._waiting:
            mx.eval(self._waiting.popleft())


@contextmanager
def wired_limit() -> Iterator[None]:
    """Let Metal keep the model resident while generating, and put the limit back after."""
    if not mx.metal.is_available() or on_cpu():
        yield
        return
    old = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(old)
