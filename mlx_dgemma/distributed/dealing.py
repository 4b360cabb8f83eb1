"""How sizes are dealt to ranks: pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """A range of an axis, without its end."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """How many it holds."""
        return self.end - self.start


def deal(total: int, ranks: int, unit: int = 1, turn: int = 0) -> list[Span]:
    """Deal `total` to ranks in order, in multiples of `unit`; the last unit may be cut off.

    Args:
        total: size of the axis.
        ranks: how many there are.
        unit: borders are multiples of it.
        turn: the first rank that gets one of the units that are left over; ranks behind the last one go on at 0.

    Returns:
        A span for each rank, empty where there are fewer units than ranks.
    """
    units = -(-total // unit)
    counts = [units // ranks] * ranks
    for i in range(units % ranks):
        counts[(turn + i) % ranks] += 1
    spans, start = [], 0
    for count in counts:
        end = min(start + count * unit, total)
        spans.append(Span(start, end))
        start = end
    return spans


def largest(spans: list[Span]) -> int:
    """Size of the largest of some spans."""
    return max(span.size for span in spans)


def kv_heads_of(heads: Span, per_kv_head: int) -> list[int]:
    """The KV heads that a rank holds for its query heads, which share them in runs of equal length.

    A KV head that several ranks need is held by each. Where the queries of a rank begin or end within a run, the KV
    heads repeat, so that runs are equal again.

    Args:
        heads: the rank's query heads.
        per_kv_head: query heads that share a KV head in the whole model.
    """
    owners = [head // per_kv_head for head in range(*heads)]
    for length in range(len(owners), 0, -1):
        if len(owners) % length == 0:
            runs = [set(owners[i : i + length]) for i in range(0, len(owners), length)]
            if all(len(run) == 1 for run in runs):
                return [run.pop() for run in runs]
    return []
