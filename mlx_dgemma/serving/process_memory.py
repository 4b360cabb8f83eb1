"""Memory of a process that serves for days: what a large request took goes back to the system."""

from __future__ import annotations

import ctypes
import gc

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
LARGE_BLOCK = 2**17  # bytes; glibc's own first value
ARENAS = 2  # heaps that threads share; Python runs one of them at a time


def bound_memory() -> None:
    """Call this once everything is loaded.

    glibc raises the size from which a block is a mapping of its own with every large one that is freed; then blocks of
    megabytes lie between small ones, and each thread's heap keeps its largest size. A size that is set stays. Threads
    that prepare requests would make eight heaps a core, each with holes that stay, so they share two. Other systems map
    large blocks by themselves. What is loaded stays: the garbage collector need not look at it each time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_ARENA_MAX, ARENAS)
    gc.collect()
    gc.freeze()
