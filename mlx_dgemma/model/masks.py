"""The unified-memory KV cache of the prefix: everything encoded so far.

Full layers keep every position, sliding layers a ring of the `window - 1` positions that the next
token can still see. Attention does not care about the order of its keys (their positions were
rotated in), so the ring is never put back into order. A canvas writes its keys and values into the
slots behind the prefix, where the next canvas overwrites them: the prefix itself is neither copied
nor changed by a denoising step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Mask:
    """Which keys each query may see, made for a range of keys when it is asked for: never [L, all keys] at once."""

    keys: np.ndarray  # [N], the position that each key holds
    queries: np.ndarray | None = None  # [L], their positions; None where all see every key but padding
    window: int | None = None  # positions that a query sees, itself included
    padding: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))  # [B or 1], left padding of each row
    spans: np.ndarray | None = None  # [B, L] ids of image spans over the last L keys, 0 for text

    @cached_property
    def all_keys(self) -> Any:
        """The mask of all keys as fused attention takes it: "causal", None or bool [B or 1, 1, L or 1, N]."""
        plain = self.spans is None and not self.padding.any() and not self._passes_window(self.keys)
        if plain and self.queries is not None and len(self.queries) > 1:
            return "causal"
        return self.of_keys(0, len(self.keys))

    def of_keys(self, start: int, end: int) -> mx.array | None:
        """bool [B or 1, 1, L or 1, end - start], or None where nothing of these keys is hidden."""
        keys = self.keys[start:end]
        padded = keys.min() < self.padding.max()
        future = self.queries is not None and keys.max() > self.queries[0]
        if not (padded or future or self._passes_window(keys)):
            return None
        key = mx.array(keys)[None, None, None]
        pad = mx.array(self.padding)[:, None, None, None]
        if self.queries is None:
            return key >= pad
        query = mx.array(self.queries)[None, None, :, None]
        mask = key <= query
        if self.window is not None:
            mask = mask & (key > query - self.window)
        if self.spans is not None:
            held = len(self.keys) - len(self.queries)
            span = mx.array(self.spans)[:, None, :, None]
            other = mx.array(np.pad(self.spans, ((0, 0), (held, 0)))[:, start:end])[:, None, None]
            mask = mask | ((span == other) & (span > 0))
        if padded:
            # A padded query attends to itself alone: a row without any key would become NaN.
            mask = mask & ((key >= pad) | (key == query))
        return mask

    def _passes_window(self, keys: np.ndarray) -> bool:
        """Whether the last query is too far from one of these."""
        return self.queries is not None and self.window is not None and keys.min() <= self.queries[-1] - self.window
