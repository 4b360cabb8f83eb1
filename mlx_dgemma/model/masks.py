"""What is computed of a pass and seen in it: `Mask`, and `Narrow` for canvases whose ends are left out.

Masks are made for the range of keys that is asked for, so that no [L, all keys] array is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class Narrow(NamedTuple):
    """Which positions of B canvases are computed: the first ones of each. The others are as an earlier pass left them.

    What is computed is one row: the positions of the first canvas, then those of the second; T in all.
    """

    widths: tuple[int, ...]  # positions of each canvas that are computed
    length: int  # C, all positions of a canvas

    def take(self, whole: mx.array) -> mx.array:
        """[B, C, ...] -> [1, T, ...], what is computed."""
        if len(self.widths) == 1:
            return whole[:, : self.widths[0]]
        return whole.flatten(0, 1)[self._computed][None]

    def put(self, part: mx.array, whole: mx.array) -> mx.array:
        """[B, C, ...], where [1, T, ...] takes the places of what is computed."""
        if len(self.widths) == 1:
            return mx.concatenate([part, whole[:, self.widths[0] :]], axis=1)
        flat = whole.flatten(0, 1)
        flat[self._computed] = part[0]
        return flat.reshape(whole.shape)

    def split(self, heads: mx.array) -> list[mx.array]:
        """[1, heads, T, D] by canvas."""
        ends = np.cumsum(self.widths).tolist()
        return [heads[:, :, end - width : end] for end, width in zip(ends, self.widths)]

    @property
    def _computed(self) -> mx.array:
        return mx.array(np.concatenate([row * self.length + np.arange(n) for row, n in enumerate(self.widths)]))


@dataclass(frozen=True)
class Mask:
    """Which keys each query may attend to: L queries, N keys, B rows."""

    keys: np.ndarray  # [N], the position that each key holds; ascending without a window
    queries: np.ndarray | None = None  # [L], the position of each query; None: all attend to every key but padding
    window: int | None = None  # positions that a query attends to, itself included
    padding: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))  # [B or 1], left padding of each row
    spans: np.ndarray | None = None  # [B, L] ids of image spans over the last L keys, 0 for text

    @cached_property
    def all_keys(self) -> Any:
        """The mask of all keys, as fused attention takes it: "causal", None or bool [B or 1, 1, L or 1, N]."""
        plain = self.spans is None and not self.padding.any() and not self._passes_window(self.keys)
        if plain and self.queries is not None and len(self.queries) > 1:
            return "causal"
        return self.of_keys(0, len(self.keys))

    @property
    def leading(self) -> tuple[int, int] | None:
        """(count, step) where query i sees the first count + step * i keys and no others; None for other masks."""
        visible = self.all_keys
        if visible is None:
            return len(self.keys), 0
        if isinstance(visible, str) and self.queries is not None:
            return len(self.keys) - len(self.queries) + 1, 1
        return None

    def of_keys(self, start: int, end: int, rows: slice = slice(None)) -> mx.array | None:
        """The mask of keys[start:end] and of the queries of `rows`; None where no key is hidden.

        Returns:
            bool [B or 1, 1, queries or 1, end - start].
        """
        keys = self.keys[start:end]
        queries = None if self.queries is None else self.queries[rows]
        padded = keys.min() < self.padding.max()
        future = queries is not None and keys.max() > queries[0]
        if not (padded or future or self._passes_window(keys)):
            return None
        key = mx.array(keys)[None, None, None]
        pad = mx.array(self.padding)[:, None, None, None]
        if queries is None:
            return key >= pad
        query = mx.array(queries)[None, None, :, None]
        mask = key <= query
        if self.window is not None:
            mask = mask & (key > query - self.window)
        if self.spans is not None and self.queries is not None:
            earlier = len(self.keys) - len(self.queries)
            span = mx.array(self.spans[:, rows])[:, None, :, None]
            other = mx.array(np.pad(self.spans, ((0, 0), (earlier, 0)))[:, start:end])[:, None, None]
            mask = mask | ((span == other) & (span > 0))
        if padded:
            # A padded query attends to itself: without any key its output would be NaN.
            mask = mask & ((key >= pad) | (key == query))
        return mask

    def visible_keys(self, rows: slice) -> tuple[int, int]:
        """(first, last): keys[:first] are visible to all queries of `rows`, keys[last:] to none of them."""
        count = len(self.keys)
        if self.padding.any() or self.spans is not None or self.window is not None:
            return 0, count
        if self.queries is None:
            return count, count
        ends = np.searchsorted(self.keys, [self.queries[rows][0], self.queries[rows][-1]], side="right")
        return int(ends[0]), int(ends[1])

    def _passes_window(self, keys: np.ndarray) -> bool:
        """Whether one of these keys is outside the window of the last query."""
        return self.queries is not None and self.window is not None and keys.min() <= self.queries[-1] - self.window
