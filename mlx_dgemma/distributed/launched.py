"""Whether `mlx.launch` started this process as one rank of several: its number, their number, and where rank 0 is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import CircumstanceError

Address = tuple[str, int]
CHILD = "MLX_DGEMMA_WATCHED"  # environment variable of a rank that is watched: the descriptor of its link


class Place(NamedTuple):
    """A rank among others.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        meeting: host and port of rank 0, which MLX's transport takes later on.
        own: where MLX's ring listens on this rank; empty with other transports.
    """

    rank: int
    size: int
    meeting: Address
    own: tuple[Address, ...] = ()


def place_of(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher's variables give this process; None: it is alone.

    Raises:
        CircumstanceError: the variables are not those of `mlx.launch`, or of MPI, which names no address of rank 0.
    """
    if "MLX_RANK" not in environment:
        sizes = [environment.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
        if any(size.isdecimal() and int(size) > 1 for size in sizes):
            raise CircumstanceError(
                "MPI has started several processes, which mlx-dgemma does not join; use `mlx.launch` with the backend "
                "ring, jaccl or nccl."
            )
        return None
    try:
        rank, (size, meeting, own) = int(environment["MLX_RANK"]), _group_of(environment, int(environment["MLX_RANK"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise CircumstanceError(
            f"MLX_RANK is {environment['MLX_RANK']!r}, but no other variable says where the other ranks are; start "
            "them with `mlx.launch -n N mlx-dgemma ...`."
        ) from None
    return Place(rank, size, meeting, own) if size > 1 else None


def _group_of(environment: Mapping[str, str], rank: int) -> tuple[int, Address, tuple[Address, ...]]:
    if "NCCL_HOST_IP" in environment:
        return int(environment["MLX_WORLD_SIZE"]), (environment["NCCL_HOST_IP"], int(environment["NCCL_PORT"])), ()
    if "MLX_JACCL_COORDINATOR" in environment:
        devices = json.loads(Path(environment["MLX_IBV_DEVICES"]).read_text())
        return len(devices), _address(environment["MLX_JACCL_COORDINATOR"]), ()
    hosts = json.loads(Path(environment["MLX_HOSTFILE"]).read_text() or "[]")
    if len(hosts) < 2:  # mlx.launch -n 1 names none
        return 1, ("", 0), ()
    return len(hosts), _address(hosts[0][0]), tuple(map(_address, hosts[rank]))


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)
