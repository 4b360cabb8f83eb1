"""`Group`: the processes that `mlx.launch` started to compute one model together.

Every rank runs the same code on the same input and calls the same collective operations in the same order. A group of
one process does nothing and costs nothing. Transport is MLX's own (ring, JACCL, NCCL, MPI).
"""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CircumstanceError

FRAME = 4096  # bytes of the first message of an object, its length included; a longer one takes a second message
_LENGTH = 8  # bytes that hold a length


class Group:
    """Processes that compute together.

    Args:
        handle: MLX's group; None: this process alone.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, handle: mx.distributed.Group | None = None):
        self._handle = handle
        self.rank, self.size = (0, 1) if handle is None else (handle.rank(), handle.size())
        self._drawn = random.Random(self.share(secrets.randbits(128))) if self.size > 1 else None

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, size={self.size})"

    def sum(self, x: mx.array) -> mx.array:
        """The sum of the ranks' arrays, which have one shape and dtype; the same bits on every rank."""
        return x if self.size == 1 else mx.distributed.all_sum(x, group=self._handle)

    def sum_together(self, *arrays: mx.array) -> list[mx.array]:
        """As `sum` for each of several arrays [..., n], which differ in their last axis at most, in one message."""
        if self.size == 1:
            return list(arrays)
        ends = np.cumsum([one.shape[-1] for one in arrays])[:-1].tolist()
        return list(mx.split(self.sum(mx.concatenate(list(arrays), axis=-1)), ends, axis=-1))

    def gather(self, x: mx.array, axis: int = 0) -> mx.array:
        """The ranks' arrays, which have one shape and dtype, behind each other along an axis."""
        if self.size == 1:
            return x
        moved = mx.distributed.all_gather(mx.contiguous(mx.moveaxis(x, axis, 0)), group=self._handle)
        return mx.moveaxis(moved, 0, axis)

    def share(self, value: Any = None) -> Any:
        """Rank 0's value on every rank; the other ranks' values are not looked at.

        A value is what JSON knows: unlike a pickle it runs no code of whoever sent it. Tuples become lists.
        """
        if self.size == 1:
            return value
        return json.loads(self._share_bytes(json.dumps(value).encode() if self.rank == 0 else b""))

    def gather_values(self, value: Any) -> list[Any]:
        """Every rank's value, in order of ranks; values are as `share` takes them."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        lengths = np.asarray(self.gather(mx.array([len(data)], mx.int32))).tolist()
        padded = np.zeros((1, max(lengths)), np.uint8)
        padded[0, : len(data)] = np.frombuffer(data, np.uint8)
        rows = np.asarray(self.gather(mx.array(padded)))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]

    def share_array(self, array: np.ndarray) -> np.ndarray:
        """Rank 0's bytes [n] uint8 on every rank; `array` has the same length on all."""
        if self.size == 1:
            return array
        given = array if self.rank == 0 else np.zeros_like(array)
        return np.asarray(self.sum(mx.array(given)))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            mx.eval(self.sum(mx.zeros((1,))))

    def draw_seed(self) -> int:
        """A random seed below 2**32; ranks that ask equally often get equal ones."""
        return secrets.randbits(32) if self._drawn is None else self._drawn.getrandbits(32)

    def _share_bytes(self, data: bytes) -> bytes:
        first = np.zeros(FRAME, np.uint8)
        first[:_LENGTH] = np.frombuffer(len(data).to_bytes(_LENGTH, "little"), np.uint8)
        start = data[: FRAME - _LENGTH]
        first[_LENGTH : _LENGTH + len(start)] = np.frombuffer(start, np.uint8)
        first = self.share_array(first)
        length = int.from_bytes(first[:_LENGTH].tobytes(), "little")
        found = first[_LENGTH : _LENGTH + length].tobytes()
        if length <= FRAME - _LENGTH:
            return found
        rest = np.zeros(length - len(found), np.uint8)
        if self.rank == 0:
            rest[:] = np.frombuffer(data[len(start) :], np.uint8)
        return found + self.share_array(rest).tobytes()


ALONE = Group()
"""This process without others."""


def init(backend: str | None = None) -> Group:
    """The group that this process was started in, or `ALONE` where no launcher started it.

    Args:
        backend: "ring", "jaccl", "nccl" or "mpi"; None takes the one whose settings stand in the environment, as
            `mlx.launch` writes them.

    Raises:
        CircumstanceError: MLX has no such backend here, or the ranks do not find each other.
    """
    backend = backend or backend_of(os.environ)
    if backend is None:
        return ALONE
    try:
        return Group(mx.distributed.init(strict=True, backend=backend))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CircumstanceError(
            f"The ranks could not be joined by MLX's backend {backend} ({reason}); start them with "
            "`mlx.launch -n N mlx-dgemma ...`, or with --backend for another transport."
        ) from None


def backend_of(environment: Mapping[str, str]) -> str | None:
    """MLX's backend that a launcher's variables ask for; None: there was no launcher, or it started one process."""
    if "MLX_RANK" in environment:
        if "NCCL_HOST_IP" in environment:
            return "nccl" if int(environment.get("MLX_WORLD_SIZE") or 1) > 1 else None
        if "MLX_IBV_DEVICES" in environment:
            return "jaccl"
        file = environment.get("MLX_HOSTFILE")
        hosts = Path(file).read_text().strip() if file and Path(file).exists() else ""
        return "ring" if hosts and len(json.loads(hosts)) > 1 else None
    sizes = [environment.get(name) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    return "mpi" if any(size and int(size) > 1 for size in sizes) else None
