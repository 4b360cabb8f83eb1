"""The same command as several ranks of this machine, started as `mlx.launch` starts them, and what became of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LIMIT = 15.0  # seconds within which all must have ended


class Ranks:
    """The same command as so many ranks; use it as a context, which leaves no process."""

    def __init__(self, count: int, command: list[str], folders: Sequence[Path] = (), ports: Sequence[int] = ()):
        self._file = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115
        self.ports = list(ports) or free_ports(count)
        json.dump([[f"127.0.0.1:{port}"] for port in self.ports], self._file)
        self._file.flush()
        self.logs = [tempfile.NamedTemporaryFile("w+", suffix=".log") for _ in range(count)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                command,
                env={**os.environ, "MLX_HOSTFILE": self._file.name, "MLX_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=self.logs[rank],
                cwd=folders[rank] if folders else None,
                text=True,
            )
            for rank in range(count)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def log(self, rank: int = 0) -> str:
        """What a rank wrote to stderr."""
        return Path(self.logs[rank].name).read_text(errors="replace")

    def pids(self) -> list[int]:
        """All processes: those that watch, and the ranks."""
        watching = [one.pid for one in self.processes]
        return [*watching, *(child for one in watching for child in children(one))]

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes; None: still there after so long."""
        deadline = time.monotonic() + seconds
        for one in self.processes:
            with suppress(subprocess.TimeoutExpired):
                one.wait(max(deadline - time.monotonic(), 0.1))
        return [one.returncode for one in self.processes]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def children(pid: int) -> list[int]:
    every = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in every.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def alive(pid: int) -> bool:
    stat = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(stat.strip()) and not stat.startswith("Z")
