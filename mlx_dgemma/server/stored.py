"""Responses that later requests go on from, in memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

MAX_RESPONSES = 256
MAX_BYTES = 64 * 2**20  # of texts and pictures
LONG = 2**10  # a text or a file of so many is held once, since clients send their pictures with every request
Long = str | bytes


class StoredResponses:
    """The items of the last responses, those of what they went on from included. The least recently used leaves first.

    Args:
        most: number of responses that are kept.
        most_bytes: bytes of all their items. A long text counts once, and what else responses share in each of them.
    """

    def __init__(self, most: int = MAX_RESPONSES, most_bytes: int = MAX_BYTES):
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._kept: OrderedDict[str, tuple[list[Any], int, list[Long]]] = OrderedDict()
        self._texts: dict[Long, Long] = {}  # the long ones, by themselves
        self._uses: Counter[Long] = Counter()  # how many responses have each
        self._lock = threading.Lock()

    def add(self, name: str, items: Sequence[Any]) -> None:
        """Keep the items of a response. One that is larger than all the room is not kept."""
        items, long = list(items), dict[Long, Long]()

        def held(text: Long) -> Long:
            return long.setdefault(text, self._texts.get(text, text))

        with self._lock:
            size = _size(items, held)
            if size + sum(map(len, long)) > self._most_bytes:
                return
            self._kept[name] = items, size, list(long.values())
            self._bytes += size + sum(len(text) for text in long if text not in self._texts)
            self._texts.update(long)
            self._uses.update(list(long.values()))
            while len(self._kept) > self._most or self._bytes > self._most_bytes:
                self._drop(next(iter(self._kept)))

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
            kept = [items for items, *_ in self._kept.values()]
        return next((one for items in reversed(kept) for one in items if getattr(one, "id", None) == name), None)

    def _drop(self, name: str) -> None:
        _, size, long = self._kept.pop(name)
        self._bytes -= size
        self._uses.subtract(long)
        for text in long:
            if not self._uses[text]:
                del self._uses[text], self._texts[text]
                self._bytes -= len(text)


def _size(value: Any, held: Callable[[Long], Long]) -> int:
    """About how many bytes a value holds without its long texts, for each of which `held` gives the one to hold."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, (dict, list)):
        return _size(vars(value), held) if hasattr(value, "__dict__") else 16
    size = 64
    for place in value if isinstance(value, dict) else range(len(value)):
        if isinstance(place, str):
            size += len(place)
        one = value[place]
        if isinstance(one, (str, bytes)) and len(one) >= LONG:
            value[place] = held(one)
        else:
            size += _size(one, held)
    return size
