"""Times and memory of a prefill and the denoising steps behind it, measured alike for every runtime."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from report import GIB, show, spread, table

WARM_UP = 2  # steps: the first has no self-conditioning, and caches make room for the canvas
MEMORY = ("kv", "prefill_peak", "step_peak", "peak")  # GiB; peaks above weights and KV, the last above the weights
HEADER = ["", "step ms", "prefill ms", "KV GiB", "prefill peak", "step peak", "peak over weights"]


@dataclass(frozen=True)
class Memory:
    """How a framework tells its memory, in bytes."""

    settle: Callable[[], None]  # wait, and let go of what nobody holds
    active: Callable[[], int]
    peak: Callable[[], int]
    reset: Callable[[], None]


def settle() -> None:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()


MLX = Memory(settle, mx.get_active_memory, mx.get_peak_memory, mx.reset_peak_memory)


class Meter:
    """Made before a prefill; told of its end and of every step's. `memory` is None where none can be measured."""

    def __init__(self, memory: Memory | None = MLX):
        self.memory = memory
        self.steps: list[float] = []
        self.kv = self.prefill_peak = self.highest = 0
        if memory:
            memory.settle()
            self.base = memory.active()  # the weights, and those of a runtime beside
            memory.reset()
        self.last = time.perf_counter()

    def prefilled(self, kv: int) -> None:
        """The prompt is encoded and holds `kv` bytes."""
        self.prefill = time.perf_counter() - self.last
        self.kv = kv
        if self.memory:
            self.highest = self.memory.peak() - self.base
            self.prefill_peak = self.highest - kv
            self.memory.settle()
            self.memory.reset()
        self.last = time.perf_counter()

    def stepped(self, kv: int) -> None:
        """A step is over; `kv` bytes are held now."""
        self.steps.append(time.perf_counter() - self.last)
        if self.memory and len(self.steps) == WARM_UP:
            self.highest = max(self.highest, self.memory.peak() - self.base)
            self.memory.reset()
            self.kv = kv
        self.last = time.perf_counter()

    def result(self) -> dict:
        """Seconds and bytes of this run."""
        found: dict[str, Any] = {"steps": self.steps[WARM_UP:], "prefill": self.prefill, "kv": self.kv}
        if self.memory:
            reached = self.memory.peak() - self.base
            highest = max(self.highest, reached)
            found.update(prefill_peak=self.prefill_peak, step_peak=reached - self.kv, peak=highest)
        return found


def summary(runs: list[dict]) -> dict:
    """Several runs of one prefix: all their steps together, and the largest of each memory figure."""
    failed = [run for run in runs if "failure" in run]
    if failed or not runs:
        return failed[0] if failed else {"failure": "not run"}
    steps = [seconds * 1e3 for run in runs for seconds in run["steps"]]
    row: dict[str, Any] = {
        "step_ms": spread(steps),
        "prefill_ms": spread([run["prefill"] * 1e3 for run in runs]),
        "steps": len(steps),
    }
    for name in MEMORY:
        row[f"{name}_gib"] = round(max(run[name] for run in runs) / GIB, 4) if name in runs[0] else None
    return row


def print_rows(prefix: int, rows: dict[str, dict]) -> None:
    """A line for every runtime of one prefix; a failure says so."""
    lines = [
        [name, show(row["step_ms"]), show(row["prefill_ms"]), *(row[f"{one}_gib"] for one in MEMORY)]
        for name, row in rows.items()
        if "failure" not in row
    ]
    print(f"\nprefix {prefix}: median (min-max); peaks in GiB above weights and KV")
    table(HEADER, lines)
    for name, row in rows.items():
        if "failure" in row:
            print(f"{name} failed: {row['failure']}")
