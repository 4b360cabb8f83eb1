"""What an automaton would need too many states for is checked while a text is written.

Bytes with which a text goes on may carry a mark: the commas of an array whose items must differ or are limited in
number, and the characters of a long string. A `Scanner` reads a text and says where it goes too far. From there it can
be ended without such a byte.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

UNIQUE, ITEMS = 1, 2  # flags of a mark; a limit, of items or else of characters, is written above them
_SHIFT = 2


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
        flags |= mark & (UNIQUE | ITEMS)
    return min(limits, default=0) << _SHIFT | flags


class _Level:
    """An array or object that is open."""

    def __init__(self, begin: int, is_object: bool):
        self.mark, self.comma, self.begin, self.is_object = 0, begin, begin, is_object
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

    def feed(self, text: bytes) -> int | None:
        """Read on; returns where the text goes too far, counted from this text's beginning, or None.

        Behind a place where it goes too far nothing more is to be read.
        """
        begin = len(self._text)
        for byte in text:
            mark = int(self._marks[self._state, byte])
            self._state = int(self._table[self._state, byte])
            self._text.append(byte)
            if (found := self._read(byte, mark)) is not None:
                return max(found - begin, 0)
        return None

    def _read(self, byte: int, mark: int) -> int | None:
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
                    return at
            return None
        if byte == 0x22:
            self._in_string, self._characters = True, 0
        elif byte in b"[{":
            self._levels.append(_Level(at, byte == 0x7B))
        elif byte in b",]}" and self._levels:
            return self._leave_item(byte, mark, at)
        return None

    def _leave_item(self, byte: int, mark: int, at: int) -> int | None:
        level = self._levels[-1]
        level.count += 1
        key = _canonical(self._text[level.begin + 1 : at].decode(errors="replace"), level.is_object)
        repeats = key in level.seen
        level.seen.add(key)
        if byte != 0x2C:
            self._levels.pop()
        place, level.begin = level.comma, at
        if repeats and level.mark & UNIQUE:
            return place
        if byte == 0x2C:
            level.comma, level.mark = at, level.mark | mark & UNIQUE
            if mark & UNIQUE and len(level.seen) < level.count:
                return at
            if mark & ITEMS and level.count >= mark >> _SHIFT:
                return at
        return None


def _canonical(item: str, of_object: bool) -> str:
    """A JSON value, or the key of a member, spelt in one way."""
    value: Any
    try:
        value = json.loads("{" + item + "}" if of_object else item)
    except ValueError:
        return item
    if of_object:
        return json.dumps(list(value))
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """1.0 and 1 are the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
