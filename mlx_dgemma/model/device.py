"""The device that MLX computes on: its kind, its memory, compiled functions, and a queue of evaluations."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return mx.default_device() == mx.cpu


def on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return not on_cpu() and mx.metal.is_available()


def lacks_bfloat16() -> bool:
    """Whether MLX computes on an Apple GPU without bfloat16, which is then computed in software: M1's and M2's."""
    if not on_metal():
        return False
    found = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return found is not None and int(found[1]) < 15


def fused(function: Callable, shapeless: bool = True) -> Callable:
    """Compile a chain of elementwise operations, on a GPU only: on the CPU, MLX needs a C++ compiler to do so."""
    compiled = mx.compile(function, shapeless=shapeless)

    @wraps(function)
    def call(*args):
        return (function if on_cpu() else compiled)(*args)

    return call


def row_unit() -> int:
    """Rows of a pass come in multiples of this: a GPU's products have tiles of 64, and fewer rows cost as much."""
    return 8 if on_cpu() else 64


SOFT_LIMIT = 2**28  # bytes in flight; above it a queue waits for its oldest stage before it starts another
GROUPS_LIMIT = 9 * 2**26  # the same where attention goes by groups of queries, whose stages are larger
LOW_MEMORY = 8  # times less may be in flight where memory is to be saved
HARD = 2  # times the limit; above it a queue waits for everything


def available() -> int:
    """Bytes that MLX's default device can hold: Metal's recommended working set, a GPU's memory or the machine's."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if not on_cpu() and isinstance(info.get(key), int):
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Queue:
    """Starts evaluations in stages and limits the memory of those that have not finished.

    MLX enqueues up to a thousand operations and allocates their results before they run. At the release's size that
    is half the layers of a step, several gigabytes. Above `SOFT_LIMIT` bytes the queue waits for its oldest stage, but
    never for the newest one, so that the device always has work. Freed buffers return late when stages are short;
    at `HARD` times as many bytes the queue therefore waits for everything.

    Args:
        limit: bytes, None for `SOFT_LIMIT`.
        base: bytes that are held when nothing is in flight; None: those that are held now.
    """

    def __init__(self, limit: int | None = None, base: int | None = None):
        self.limit = SOFT_LIMIT if limit is None else limit
        self.base = mx.get_active_memory() if base is None else base
        self._waiting: deque[Any] = deque()

    def add(self, *stages: Any) -> None:
        """Start stages (arrays or trees of arrays), in the order in which they are computed."""
        for stage in stages:
            while len(self._waiting) > 1 and mx.get_active_memory() > self.base + self.limit:
                mx.eval(self._waiting.popleft())
            if mx.get_active_memory() > self.base + HARD * self.limit:
                mx.synchronize()
            mx.async_eval(stage)
            self._waiting.append(stage)

    def finish(self) -> None:
        """Wait until all stages are computed."""
        while self._waiting:
            mx.eval(self._waiting.popleft())


SMALL_MAC = 36 * 2**30  # bytes of memory; a Mac with no more keeps only `CACHE_LIMIT` bytes of freed buffers
CACHE_LIMIT = 2 * 2**30
LOW_CACHE_LIMIT = 2**28  # the same where memory is to be saved, on any device


class _Limits:
    """Limits of memory, which are the process's: set for the first holder and put back after the last."""

    def __init__(self) -> None:
        self._lock, self._holders = threading.Lock(), 0
        self._earlier: list[tuple[Callable[[int], int], int]] = []

    def hold(self, low_memory: bool) -> None:
        with self._lock:
            if not self._holders:
                self._earlier, cache = [], LOW_CACHE_LIMIT if low_memory else None
                if on_metal():
                    info = mx.device_info()
                    wired = int(info["max_recommended_working_set_size"])
                    self._earlier = [(mx.set_wired_limit, mx.set_wired_limit(wired))]
                    if cache is None and int(info["memory_size"]) <= SMALL_MAC:
                        cache = CACHE_LIMIT
                if cache is not None:
                    self._earlier.append((mx.set_cache_limit, mx.set_cache_limit(cache)))
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                mx.synchronize()
                for put_back, earlier in self._earlier:
                    put_back(earlier)


_limits = _Limits()


@contextmanager
def wired_limit(low_memory: bool = False) -> Iterator[None]:
    """Let Metal keep the model in memory while a context is open, and on a small Mac fewer freed buffers.

    The limits belong to the process, so they are restored when the last context of any thread is left.

    Args:
        low_memory: keep few freed buffers, on any device.
    """
    if not (on_metal() or low_memory):
        yield
        return
    _limits.hold(low_memory)
    try:
        yield
    finally:
        _limits.release()
