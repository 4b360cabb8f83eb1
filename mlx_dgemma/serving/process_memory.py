"""Memory of a process that serves for days: what a large request took goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
import time

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
LARGE_BLOCK = 2**17  # bytes; glibc's own first value
HEAPS = 2  # that threads share; one each would be as large as its thread's largest request
TRIM_SECONDS = 5.0  # a trim takes up to some ten milliseconds, in which other threads run


def bound_memory() -> None:
    """Call this once everything is loaded.

    glibc raises the size from which a block is a mapping of its own with every large one that is freed; then blocks of
    megabytes lie between small ones, and each thread's heap keeps its largest size. A size that is set stays, and
    threads share a few heaps. Other systems map large blocks by themselves. What is loaded stays: the garbage collector
    need not look at it each time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_ARENA_MAX, HEAPS)
    gc.collect()
    gc.freeze()


class Trimmer:
    """Gives free memory between used blocks back to the system, now and then.

    glibc keeps what threads freed for their next blocks, except at the end of a heap. Each thread may have a heap, and
    those that prepare requests would leave theirs as large as they ever were. Other systems do that by themselves.

    Args:
        seconds: that pass at least between two times.
    """

    def __init__(self, seconds: float = TRIM_SECONDS):
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = libc.malloc_trim if libc and hasattr(libc, "gnu_get_libc_version") else None
        self._seconds, self._last = seconds, time.monotonic()

    def trim(self) -> bool:
        """Give memory back if it is time, on any thread; returns whether it was."""
        now = time.monotonic()
        if self._trim is None or now - self._last < self._seconds:
            return False
        self._last = now
        self._trim(0)
        return True
