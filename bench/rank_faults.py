"""What becomes of two ranks when one is killed, stopped or broken; `ranks.py faults` runs it."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rank_processes import LIMIT, Ranks, alive, children, free_ports

import mlx_dgemma

ENDLESS = [
    "generate",
    "Count from 3 to 300.",
    "--max-tokens",
    "4000",
    "--patience",
    "0",
    "--max-denoising-steps",
    "999",
]
ENDLESS += ["--confidence-threshold", "0", "--certainty-threshold", "0", "--seed", "1"]


def fault_of(name: str, strike: Any, wait: float, model: str = "", stamp: Path | None = None, **where: Any) -> dict:
    """Start two ranks, strike after a while, and see how they end."""
    command = [sys.executable, "-m", "mlx_dgemma", *ENDLESS, *(["--model", model] if model else [])]
    with Ranks(2, command, **where) as ranks:
        time.sleep(wait)
        pids = ranks.pids()
        started = time.monotonic()
        if strike is not None:
            strike(ranks)
        codes = ranks.wait(60)
        seconds = time.monotonic() - started
        if stamp is not None and stamp.exists():  # the time from the fault on, without the start
            seconds = time.time() - stamp.stat().st_mtime
        time.sleep(0.2)
        left = [pid for pid in pids if alive(pid)]
        said = [line for log in (ranks.log(0), ranks.log(1)) for line in log.splitlines() if "Error" in line]
        others = [line for line in ranks.log(0).splitlines() if "Error" not in line and "bundled demo" not in line]
    good = len(said) == 1 and not left and seconds <= LIMIT and 1 in codes and not others
    verdict = "good" if good else "BAD "
    print(f"{verdict} {name}: {seconds:.1f} s, codes {codes}, {len(left)} left; {' | '.join(said)}", flush=True)
    for line in others[:5]:
        print(f"     beside it: {line}")
    return {"fault": name, "good": good, "seconds": round(seconds, 1), "codes": codes, "said": said}


def hit(rank: int, child: bool, number: int, ranks: Ranks) -> None:
    pid = ranks.processes[rank].pid
    os.kill((children(pid) or [pid])[0] if child else pid, number)


def shorten(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(10**6)


def edit_settings(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(file.read_text().replace("0.005", "0.006"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "another checkpoint": edit_settings,
    "truncated weights": lambda folder: shorten(folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "a folder in the place of the weights": lambda folder: (
        (folder / "model.safetensors").unlink() or (folder / "model.safetensors").mkdir()
    ),
}


def faults(args: argparse.Namespace) -> list[dict]:
    import mlx_dgemma.checkpoint.find as find

    def fault(name: str, *how: Any, **where: Any) -> dict:
        return fault_of(name, *how, **where) if args.only in name else {}

    chance, found = random.Random(args.seed), []
    for i in range(args.kills):
        rank, child, wait = chance.randrange(2), chance.random() < 0.7, chance.uniform(0, args.latest)
        who = f"{'rank' if child else 'watcher of rank'} {rank}"
        found.append(fault(f"kill -9 {i + 1}, {who}, at {wait:.1f} s", partial(hit, rank, child, signal.SIGKILL), wait))
    for rank, child in ((1, True), (0, True), (1, False)):
        who = f"{'rank' if child else 'watcher of rank'} {rank}"
        found.append(fault(f"SIGSTOP, {who}", partial(hit, rank, child, signal.SIGSTOP), args.latest))
    for rank in (0, 1):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = free_ports(2)
            ports[rank] = taken.getsockname()[1]
            found.append(fault(f"the port of rank {rank} in use", None, 0, ports=ports))
    for name, change in CHANGES.items():
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder, str(rank)) for rank in (0, 1)]
            for one in folders:
                shutil.copytree(find.DEMO, one / "model")
            change(folders[1] / "model")
            found.append(fault(f"{name} on rank 1", None, 0, "model", folders=folders))
    here = Path.cwd()  # `python -m` looks there first
    version, struck = '__version__ = "{}"', "    open('struck', 'w').close()\n"
    for name, file, old, new in (
        ("another version of mlx-dgemma", "__init__", version.format(mlx_dgemma.__version__), version.format("9.9")),
        ("an error while loading", "checkpoint/build", "    checkpoint.require_native()\n", f"{struck}    1 / 0\n"),
        ("an error while computing", "decoding/loop", "        self._join()\n", f"    {struck}        1 / 0\n"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(Path(mlx_dgemma.__file__).parent, Path(folder, "mlx_dgemma"))
            changed = copy / f"{file}.py"
            changed.write_text(changed.read_text().replace(old, new))
            found.append(fault(f"{name} on rank 1", None, 0, "", Path(folder, "struck"), folders=(here, Path(folder))))
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "mlx-9.9.dist-info", "METADATA")
        told.parent.mkdir()
        told.write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 9.9\n")
        found.append(fault("another version of MLX on rank 1", None, 0, folders=(here, Path(folder))))
    return [one for one in found if one]
