"""What an automaton would need too many states for is checked while a text is written.

Bytes with which a text goes on may carry a mark: the commas of an array whose items must differ or are limited in
number, and the characters of a long string. A `Scanner` reads a text and says where it goes too far. There it can be
ended without such a byte, or, where an array needs the item, written differently.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from typing import Any, NamedTuple

import numpy as np

# Flags of a mark; a limit, of items or else of characters, is written above them.
UNIQUE, ITEMS = 1, 2  # items must differ; the limit is of items
REQUIRED = 4  # the text cannot end without this byte
_SHIFT = 3
MOST_WAYS = 256  # in which an item may go on, of which one that differs is looked for; beyond, there will be one


class Excess(NamedTuple):
    """Where a text goes too far.

    Attributes:
        at: the byte with which it does.
        change: whether it must become another text at or before this byte, since it cannot end before it.
    """

    at: int
    change: bool = False


def length_mark(limit: int) -> int:
    """The mark of a string's characters, of which there may be so many, at least one."""
    return limit << _SHIFT


def items_mark(limit: int) -> int:
    """The mark of the commas of an array or object that may have so many items, at least one."""
    return limit << _SHIFT | ITEMS


def joined(marks: list[int]) -> int:
    """The mark of a byte that several edges share: none if one of them has none, else what suits them all."""
    if not all(marks):
        return 0
    limits = [mark >> _SHIFT for mark in marks if mark >> _SHIFT]
    flags = 0
    for mark in marks:
        flags |= mark & (UNIQUE | ITEMS | REQUIRED)
    return min(limits, default=0) << _SHIFT | flags


class _Level:
    """An array or object that is open."""

    def __init__(self, begin: int, is_object: bool):
        self.begin, self.is_object = begin, is_object
        self.flags, self.comma, self.comma_flags = 0, begin, REQUIRED  # of all commas, and of the last one
        self.seen: set[str] = set()
        self.count = 0


class Scanner:
    """Reads a JSON text byte by byte.

    Args:
        table: [states + 1, 256] of the automaton.
        marks: [states + 1, 256] of its bytes.
    """

    def __init__(self, table: np.ndarray, marks: np.ndarray):
        self._table, self._marks = table, marks
        self._text = bytearray()
        self._state = 0
        self._levels: list[_Level] = []
        self._in_string = self._escaped = False
        self._characters = 0

    def __deepcopy__(self, memo: dict) -> Scanner:
        twin = copy.copy(self)
        twin._text, twin._levels = bytearray(self._text), copy.deepcopy(self._levels, memo)
        return twin

    def feed(self, text: bytes) -> Excess | None:
        """Read on; returns where the text goes too far, counted from this text's beginning, or None.

        Behind a place where it goes too far nothing more is to be read.
        """
        begin = len(self._text)
        for byte in text:
            mark = int(self._marks[self._state, byte])
            self._state = int(self._table[self._state, byte])
            self._text.append(byte)
            if (found := self._read(byte, mark)) is not None:
                return found._replace(at=max(found.at - begin, 0))
        return None

    def repeats(self) -> bool:
        """Whether an item, or the name of a member, is certain to be one that was there before.

        Text that comes token by token is never taken back, so it must not come to where it can only repeat itself.
        """
        if not self._levels or not self._levels[-1].flags & UNIQUE:
            return False
        level, dead = self._levels[-1], len(self._table) - 1
        begun = bytes(self._text[level.begin + 1 :]).lstrip()
        if not any(one.startswith(begun.decode(errors="replace").rstrip()) for one in level.seen):
            return False
        ways = deque([(self._state, begun)])
        for _ in range(MOST_WAYS):
            if not ways:
                return True
            state, item = ways.popleft()
            for byte in np.flatnonzero(self._table[state] != dead).tolist():
                if byte in b" \n\r\t,:]}" and (value := _value(item)) is not None:
                    if _canonical(value, level.is_object)[0] not in level.seen:
                        return False
                else:
                    ways.append((int(self._table[state, byte]), item + bytes([byte])))
        return False

    def _read(self, byte: int, mark: int) -> Excess | None:
        at = len(self._text) - 1
        if self._in_string:
            if self._escaped:
                self._escaped = False
                return None
            if byte == 0x22:
                self._in_string = False
                return None
            self._escaped = byte == 0x5C
            if byte & 0xC0 != 0x80:  # a character begins
                self._characters += 1
                if mark and self._characters > mark >> _SHIFT:
                    return Excess(at)
            return None
        if byte == 0x22:
            self._in_string, self._characters = True, 0
        elif byte in b"[{":
            self._levels.append(_Level(at, byte == 0x7B))
        elif byte in b",]}" and self._levels:
            return self._leave_item(byte, mark, at)
        return None

    def _leave_item(self, byte: int, mark: int, at: int) -> Excess | None:
        level, start = self._levels[-1], self._levels[-1].begin + 1
        level.count += 1
        key, length = _canonical(self._text[start:at].decode(errors="replace"), level.is_object)
        repeats = key in level.seen
        level.seen.add(key)
        if repeats and level.flags & UNIQUE:
            return Excess(start + length - 1, True) if level.comma_flags & REQUIRED else Excess(level.comma)
        level.begin = at
        if byte != 0x2C:
            self._levels.pop()
            return None
        level.comma, level.comma_flags, level.flags = at, mark, level.flags | mark
        return Excess(at) if mark & ITEMS and level.count >= mark >> _SHIFT else None


def _value(item: bytes) -> str | None:
    """An item as text; None: it is no whole JSON value."""
    try:
        json.loads(item)
    except ValueError:
        return None
    return item.decode()


def _canonical(item: str, of_object: bool) -> tuple[str, int]:
    """A JSON value, or the key of a member, spelt in one way; and how many bytes of the item it takes."""
    blank = len(item) - len(item.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(item, blank)
    except ValueError:
        return item, len(item.encode())
    spelt = json.dumps(value if of_object else _plain(value), sort_keys=True)
    return spelt, len(item[:end].encode())


def _plain(value: Any) -> Any:
    """1.0 and 1 are the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
