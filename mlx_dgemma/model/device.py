"""The parts of the text stack. Attribute names are the checkpoint's keys."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return mx.default_device() == mx.cpu


def fused(function: Callable, shapeless: bool = True) -> Callable:
    """Compile elementwise chains on a GPU; MLX's CPU compiler needs a C++ compiler that may be missing."""
    compiled = mx.compile(function, shapeless=shapeless)

    @wraps(function)
    def call(*args):
        return (function if on_cpu() else compiled)(*args)

    return call


SOFT_LIMIT = 2**28  # bytes in flight; above it a queue waits for its oldest stage before it starts another
HARD_LIMIT = 3 * SOFT_LIMIT  # bytes in flight; above it a queue waits for everything


def available() -> int:
    """Bytes that MLX's default device can hold: Metal's recommended working set, a GPU's or the machine's memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if not on_cpu() and isinstance(info.get(key), int):
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
            while len(self._waiting) > 1 and mx.get_active_memory() > self._base + SOFT_LIMIT:
                mx.eval(self._waiting.popleft())
            if mx.get_active_memory() > self._base + HARD_LIMIT:
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
