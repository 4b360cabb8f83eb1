"""Ranks without a model, watched at ten times the usual speed: `python watched_ranks.py CODE` is one rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from mlx_dgemma.distributed import meeting, supervisor
from mlx_dgemma.distributed.launched import place_of

# What a rank does: it says which process it is, and goes on until somebody ends it.
WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
print("[ring] Socket 3 was closed by the peer", file=sys.stderr)
print("a word", file=sys.stderr, flush=True)
print("rank", os.environ["MLX_RANK"], os.getpid(), os.getppid(), file=open(os.environ["TOLD"], "a"), flush=True)
time.sleep(60)
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Ranks:
    """Some ranks, and what they said; all are gone when the context is left."""

    def __init__(self, folder, codes, ports=None, missing=(), command=None, size=None, env=None, folders=None):
        self.told, hosts = folder / "told", folder / "hosts.json"
        self.told.write_text("")
        self.ports = ports or free_ports(size or len(codes))
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in self.ports]))
        self.size = len(codes) - len(missing)
        environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "TOLD": str(self.told), **(env or {})}
        self.processes = {
            rank: subprocess.Popen(
                command or [sys.executable, __file__, code],
                env={**environment, "MLX_RANK": str(rank)},
                cwd=folders and folders[rank],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, code in enumerate(codes)
            if rank not in missing
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*self.children().values(), *(one.pid for one in self.processes.values())]:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def children(self, wanted=0):
        """The ranks' processes by rank, once there are so many."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            lines = [line.split() for line in self.told.read_text().splitlines()]
            if len(lines) >= wanted:
                break
            time.sleep(0.02)
        return {int(line[1]): int(line[2]) for line in lines}

    def child_of(self, rank):
        """Processes that the watching process of a rank has started."""
        every = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in every.splitlines()]
        return [pid for pid, parent in pairs if parent == self.processes[rank].pid]

    def ended(self):
        """Exit code and stderr of rank 0, when all have ended; no child is left."""
        try:
            said = {rank: one.communicate(timeout=30) for rank, one in self.processes.items()}
        except subprocess.TimeoutExpired:
            self.__exit__()
            raise
        self.stderr = {rank: err for rank, (_, err) in said.items()}
        deadline = time.monotonic() + 5
        while any(map(alive, self.children().values())) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in self.children().values() if alive(pid)]
        return self.processes[0].returncode, self.stderr[0]


def alive(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not status.startswith("Z")


if __name__ == "__main__":
    supervisor.TICK_SECONDS, supervisor.NEWS_SECONDS, supervisor.END_SECONDS = 0.1, 0.2, 0.3
    meeting.JOIN_SECONDS = 4.0
    if news := os.environ.get("PATIENT"):  # nobody is lost who is only late
        supervisor.TICK_SECONDS, supervisor.NEWS_SECONDS, meeting.JOIN_SECONDS = 5.0, float(news), 20.0
    facts = [meeting.Fact("MLX", os.environ.get(f"MLX_OF_{place_of().rank}"), "install the same version")]
    sys.exit(supervisor.Supervisor(place_of(), [sys.executable, "-IS", "-c", sys.argv[1]], facts).run())
