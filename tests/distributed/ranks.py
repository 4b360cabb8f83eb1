"""Ranks as threads of one process, which cost no start of a process; and real ones, as `mlx.launch` starts them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.distributed.group import Group

ROOT = Path(__file__).parent.parent.parent
WAIT = 100  # seconds for another rank


class Hub:
    """Where threads leave arrays for each other."""

    def __init__(self, size: int):
        self.size, self.barrier, self.left = size, threading.Barrier(size, timeout=WAIT), [None] * size

    def exchange(self, rank: int, x: mx.array) -> list[mx.array]:
        mx.eval(x)  # what is lazy belongs to its thread
        self.left[rank] = x
        self.barrier.wait()
        found = list(self.left)
        self.barrier.wait()
        return found


class ThreadGroup(Group):
    """A rank that is a thread; sums are made in the order of ranks."""

    def __init__(self, rank: int, hub: Hub):
        self.rank, self.size, self.hub, self.messages = rank, hub.size, hub, []
        self._draw = random.Random(0).random

    def sum(self, x: mx.array) -> mx.array:
        self.messages.append(("sum", x.shape, x.dtype))
        total, *others = self.hub.exchange(self.rank, x)
        for one in others:
            assert (one.shape, one.dtype) == (x.shape, x.dtype), "ranks are at different messages"
            total = total + one
        return total

    def gather(self, x: mx.array, axis: int = 0) -> mx.array:
        self.messages.append(("gather", x.shape, x.dtype))
        found = self.hub.exchange(self.rank, x)
        assert all((one.shape, one.dtype) == (x.shape, x.dtype) for one in found), "ranks are at different messages"
        return mx.concatenate(found, axis=axis)


def on_threads(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `work` returns on each rank; an error of one is raised here."""
    hub, found, errors = Hub(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadGroup(rank, hub))
        except BaseException as error:
            errors.append(error)
            hub.barrier.abort()
        finally:
            mx.synchronize()
            mx.clear_streams()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
    if first:
        raise first[0]
    return found


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens at."""
    first = 33000 + os.getpid() % 20000
    for start in range(first, 65000, count):
        with suppress(OSError):
            for port in range(start, start + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
            return start
    raise AssertionError("no free ports")


def launch(size: int, script: Path, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a script as ranks over loopback, as `mlx.launch` starts them; it writes JSON to `out`. Returns that."""
    first, hosts = free_ports(size), Path(f"{out}-hosts.json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in range(first, first + size)]))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    given = {**os.environ, "PYTHONPATH": paths, "MLX_DGEMMA_MEASURE": "0", "MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, str(script), str(out), *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [
        subprocess.Popen(command, env={**given, "MLX_RANK": str(rank)}, text=True, **streams) for rank in range(size)
    ]
    try:
        told = [one.communicate(timeout=WAIT)[0] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert out.exists(), told
    return json.loads(out.read_text())


def launched(size: int, code: str) -> list[str]:
    """What Python code prints as each of the ranks of `mlx.launch`, sorted."""
    launcher = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    flags = ["-n", str(size), "--backend", "ring", "--starting-port", str(free_ports(size))]
    command = [*launcher, *flags, "--", sys.executable, "-IS", "-c", code]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **streams) as process:
        try:
            process.wait(WAIT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return sorted(process.stdout.read().splitlines())
