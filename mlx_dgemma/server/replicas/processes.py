"""Replicas of a server: child processes of this one, and servers on other machines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import mlx.core as mx

from ... import __version__
from ...errors import CircumstanceError
from ...serving.rendezvous import FOLDER, socket_path
from .spread import Replica

COMMAND = (sys.executable, "-m", "mlx_dgemma", "serve", "--socket-only", "--lifeline")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def children(
    count: int, arguments: Sequence[str], identity: str, stop_seconds: float, lost: Callable[[str], None]
) -> Iterator[list[Replica]]:
    """Start servers that hold the same model, each on a Unix socket of its own. They end with the block, or with us.

    Args:
        count: how many.
        arguments: of `mlx-dgemma serve`.
        identity: of the model, see `rendezvous.identity`.
        stop_seconds: that they get to end.
        lost: called with a line when one has died, on another thread.
    """
    with TemporaryDirectory(prefix="mlx-dgemma-") as folder:
        processes: list[subprocess.Popen[bytes]] = []
        replicas: list[Replica] = []
        try:
            for number in range(1, count + 1):
                own = Path(folder) / str(number)
                env = {**os.environ, FOLDER: str(own), **_gpu(number, os.environ)}
                # Ctrl-C is this process's: it lets running answers end.
                process = subprocess.Popen(
                    [*COMMAND, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env=env,
                    start_new_session=True,
                )
                processes.append(process)
                path = own / Path(socket_path(identity)).name
                replicas.append(Replica(f"Replica {number} (process {process.pid})", "http://localhost", str(path)))
                threading.Thread(target=_watch, args=(process, replicas[-1], lost), daemon=True).start()
            yield replicas
        finally:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(stop_seconds)
                process.kill()
                process.wait()


def _gpu(number: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that gives a child a GPU of its own where there are several; this process takes the first."""
    if VISIBLE in environment:
        devices = [one for one in environment[VISIBLE].split(",") if one]
        return {VISIBLE: devices[number]} if number < len(devices) else {}
    count = mx.device_count(mx.gpu) if mx.cuda.is_available() else 0
    return {VISIBLE: str(number)} if number < count else {}


def _watch(process: subprocess.Popen[bytes], replica: Replica, lost: Callable[[str], None]) -> None:
    code = process.wait()
    if replica.alive:
        replica.alive = False
        assert process.stdin is not None
        if not process.stdin.closed:
            how = f"was killed by signal {-code}" if code < 0 else f"has ended with exit code {code}"
            lost(f"{replica.name} {how}; the others go on.")


def end_with_stdin() -> None:
    """End this process when its stdin is closed: whoever started it has ended."""

    def wait() -> None:
        with suppress(OSError, ValueError):
            while sys.stdin.buffer.read(2**10):
                pass
        os.kill(os.getpid(), 15)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def servers(urls: Sequence[str], api_key: str | None) -> list[Replica]:
    """Servers on other machines; each takes the key that clients send to this one."""
    bases = [url.rstrip("/").removesuffix("/v1") for url in urls]
    return [Replica(base, base, api_key=api_key) for base in bases]


def _health(replica: Replica) -> dict[str, Any]:
    """What a replica tells of itself, as soon as it listens; it answers once it has loaded the model."""
    while True:
        try:
            return replica.health()
        except httpx.ConnectError:
            if replica.socket_path is None or not replica.alive:
                raise
        time.sleep(0.1)


def check(replicas: Sequence[Replica], digest: str) -> None:
    """Wait until the replicas have loaded the model, and compare them with this process.

    Raises:
        CircumstanceError: one does not answer, or serves something else.
    """
    for one in replicas:
        try:
            told = _health(one)
        except (httpx.HTTPError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise CircumstanceError(f"{one.name} does not answer ({why}); see what it says, or leave it out.") from None
        if told.get("version") != __version__:
            theirs = told.get("version")
            raise CircumstanceError(f"{one.name} is mlx-dgemma {theirs} and this is {__version__}; use one version.")
        if told.get("digest") != digest:
            raise CircumstanceError(
                f"{one.name} serves another model, adapter or dtype than this process; start it with the same."
            )
        one.digest = digest
