"""GET /metrics: gauges, counters and histograms in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from ..decoding.events import Finished
from ..serving.scheduler import Load

GAUGES = {
    "running": "Requests being generated.",
    "waiting": "Requests waiting in the queue.",
    "cache_bytes": "Bytes of cached prefixes.",
    "cache_entries": "Number of cached prefixes.",
}
COUNTERS = {
    "requests": "Requests submitted.",
    "cancelled": "Requests cancelled because the client disconnected.",
    "failed": "Requests that failed.",
    "prompt_tokens": "Prompt tokens.",
    "cached_tokens": "Prompt tokens reused from the prefix cache.",
    "generated_tokens": "Generated tokens.",
    "blocks": "Finished canvases (blocks).",
    "denoising_steps": "Denoising steps, summed over requests.",
    "canvas_positions": "Canvas positions computed, summed over denoising steps.",
}
HISTOGRAMS = {
    "queue": "Seconds that an answer waited before it was generated.",
    "first_block": "Seconds until the first finished canvas of an answer, waiting included.",
    "step": "Seconds of a denoising step, the mean of each answer.",
    "total": "Seconds until an answer was whole, waiting included.",
}
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # seconds


class Histograms:
    """How long finished answers took, by the names in `HISTOGRAMS`. Used on the event loop alone."""

    def __init__(self) -> None:
        self._counts = {name: [0] * (len(BOUNDS) + 1) for name in HISTOGRAMS}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def observe(self, seconds: float, event: Any) -> None:
        """Count an answer, if the event is its last; `seconds` have passed since it was submitted."""
        if not isinstance(event, Finished):
            return
        stats = event.result.stats
        queue = max(seconds - stats.seconds["total"], 0.0)
        step = stats.seconds["denoise"] / max(stats.denoising_steps, 1)
        for name, value in zip(HISTOGRAMS, (queue, queue + stats.time_to_first_block, step, seconds)):
            self._counts[name][bisect_left(BOUNDS, value)] += 1
            self._sums[name] += value

    def lines(self) -> list[str]:
        """The samples."""
        found: list[str] = []
        for name, help_text in HISTOGRAMS.items():
            full, counts = f"dgemma_{name}_seconds", [*accumulate(self._counts[name])]
            buckets = {f'_bucket{{le="{bound}"}}': count for bound, count in zip((*BOUNDS, "+Inf"), counts)}
            found += _metric(full, "histogram", help_text, {**buckets, "_sum": self._sums[name], "_count": counts[-1]})
        return found


def metrics_text(load: Load, histograms: Histograms, requests: Mapping[tuple[str, int], int]) -> str:
    """The body of /metrics.

    Args:
        load: of the scheduler.
        histograms: of the answers.
        requests: number of HTTP requests by route and status.
    """
    lines: list[str] = []
    for name, help_text in GAUGES.items():
        lines += _metric(f"dgemma_{name}", "gauge", help_text, {"": getattr(load, name)})
    for name, help_text in COUNTERS.items():
        lines += _metric(f"dgemma_{name}_total", "counter", help_text, {"": load.counters[name]})
    counts = {f'{{endpoint="{path}",status="{status}"}}': count for (path, status), count in sorted(requests.items())}
    lines += _metric("dgemma_http_requests_total", "counter", "HTTP requests by endpoint and status.", counts)
    return "\n".join([*lines, *histograms.lines()]) + "\n"


def _metric(name: str, kind: str, help_text: str, values: Mapping[str, float]) -> Iterable[str]:
    samples = [f"{name}{labels} {value}" for labels, value in values.items()]
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *samples]
