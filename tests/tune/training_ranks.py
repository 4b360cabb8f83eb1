"""Starts a program as the ranks of a group: MLX's ring on this machine, as `mlx.launch` would set it up."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

TESTS = Path(__file__).parent.parent
SECONDS = 300


def free_ports(count):
    """Ports that nobody listens on; all are looked for before the first is given back, so that they differ."""
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def run_ranks(folder, size, *command):
    """[(exit code, stdout, stderr)] of the ranks; `folder` takes the host file."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    path = os.pathsep.join(map(str, (TESTS, TESTS / "tune", TESTS.parent)))
    own = {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env={**os.environ, **own, "MLX_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        told = [one.communicate(timeout=SECONDS) for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    return [(one.returncode, *texts) for one, texts in zip(ranks, told)]
