"""A streaming safetensors writer: headers first, then bytes in any order, so no tensor has to be in memory as a whole.

The format (huggingface/safetensors, README): 8 bytes of header length, a JSON header with dtypes, shapes and
offsets, then the tensors without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
ITEM = {"F32": 4, "U32": 4, "BF16": 2, "F16": 2, "U8": 1}  # bytes per element


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM[self.dtype]


class Writer:
    """Writes the shards of a checkpoint and their index.

    As a context manager it writes the index at the end, unless an error occurred.

    Args:
        folder: an empty folder.
        groups: the tensors to come; those of a group (a weight, its scales and biases) go into the same shard.
        shard_bytes: largest size of a shard's data; only a single larger group may exceed it.
    """

    def __init__(self, folder: Path, groups: Iterable[list[Entry]], shard_bytes: int | None = None):
        self._folder = folder
        self._limit = SHARD_BYTES if shard_bytes is None else shard_bytes
        self._place: dict[str, tuple[Path, int]] = {}  # tensor: shard, offset in the file
        self._file: Path | None = None
        self._handle: Any = None
        shards: list[list[Entry]] = []
        size = 0
        for group in groups:
            group_size = sum(entry.nbytes for entry in group)
            if not shards or size + group_size > self._limit:
                shards.append([])
                size = 0
            shards[-1] += group
            size += group_size
        names = [_shard_name(i, len(shards)) for i in range(len(shards))]
        for name, entries in zip(names, shards):
            self._write_header(folder / name, entries)
        self._index = {entry.name: name for name, entries in zip(names, shards) for entry in entries}
        self._total = sum(entry.nbytes for entries in shards for entry in entries)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def _write_header(self, file: Path, entries: list[Entry]) -> None:
        """Write a shard's header. Tensors with wide elements come first, so that every tensor is aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        at = 0
        for entry in sorted(entries, key=lambda entry: -ITEM[entry.dtype]):
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.nbytes],
            }
            at += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            self._place[entry.name] = (file, 8 + len(text) + header[entry.name]["data_offsets"][0])

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write `data` (any contiguous buffer) into the tensor, `offset` bytes after its start."""
        file, start = self._place[name]
        if file != self._file:
            self.close()
            self._file, self._handle = file, os.open(file, os.O_WRONLY)
        view = memoryview(data).cast("B")
        at = start + offset
        while len(view):
            written = os.pwrite(self._handle, view, at)
            view, at = view[written:], at + written

    def finish(self) -> None:
        """Write the index and close the last shard."""
        self.close()
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._index.items()))}
        write_json(self._folder / INDEX, index)

    def close(self) -> None:
        """Close the open shard, if there is one."""
        if self._handle is not None:
            os.close(self._handle)
        self._file = self._handle = None


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_json(file: Path, content: dict) -> None:
    """Write an object as indented JSON with sorted keys."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
