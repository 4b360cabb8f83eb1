"""Responses that later requests go on from, in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

MAX_RESPONSES = 256
MAX_BYTES = 64 * 2**20  # of texts and pictures; what responses share counts in each


class StoredResponses:
    """The items of the last responses, those of what they went on from included. The least recently used leaves first.

    Args:
        most: number of responses that are kept.
        most_bytes: bytes of all their items.
    """

    def __init__(self, most: int = MAX_RESPONSES, most_bytes: int = MAX_BYTES):
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._kept: OrderedDict[str, tuple[list[Any], int]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, items: Sequence[Any]) -> None:
        """Keep the items of a response. One that is larger than all the room is not kept."""
        size = _size(items)
        if size > self._most_bytes:
            return
        with self._lock:
            self._kept[name] = list(items), size
            self._bytes += size
            while len(self._kept) > self._most or self._bytes > self._most_bytes:
                self._bytes -= self._kept.popitem(last=False)[1][1]

    def items(self, name: str) -> list[Any] | None:
        """The items of a response, or None if it is not kept."""
        with self._lock:
            if name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return self._kept[name][0]

    def item(self, name: str) -> Any | None:
        """A single item by its id, or None if no response that is kept has it."""
        with self._lock:
            kept = [items for items, _ in self._kept.values()]
        return next((one for items in reversed(kept) for one in items if getattr(one, "id", None) == name), None)


def _size(value: Any) -> int:
    """About how many bytes a value holds."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return 64 + sum(_size(key) + _size(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return 64 + sum(map(_size, value))
    return _size(vars(value)) if hasattr(value, "__dict__") else 16
