"""What a search tells: `report.md` with its tables, and `report.svg`, the plan and what a size costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_dgemma.errors import human
from mlx_dgemma.files import told_errors

from ..recipes import FLOAT, width_name, width_named
from . import knapsack
from .plan import Plan, choices
from .sensitivity import Costs
from .trajectories import Trajectory

REPORT, PLOT = "report.md", "report.svg"
POINTS = 24  # of the curve of costs over sizes
FEW_PROMPTS = 20  # of several steps; fewer leave the plan to chance
FEW_ROWS = 32  # below so many rows an expert's cost says little
_CELL, _LEFT, _TOP = 22, 190, 40
_COLOURS = {2: "#b2182b", 3: "#ef8a62", 4: "#fddbc7", 5: "#d1e5f0", 6: "#67a9cf", 8: "#2166ac", 16: "#444444"}


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        plan: a width for every module.
        nbytes: of the whole checkpoint.
        bits_per_weight: stored bits, everything counted.
        expected: the sum of the modules' divergences, nats a position.
        divergence: KL(source || plan) in nats, measured over the trajectories with the whole plan.
        agreement: share of positions with the same most probable token.
        peak: bytes of MLX's arrays at most.
        seconds: duration.
        recipes: {name: (bytes, the sum of its modules' divergences)} of the named recipes.
        asked: prompts, and how many of their canvases took several steps.
    """

    plan: Plan
    nbytes: int
    bits_per_weight: float
    expected: float
    divergence: float
    agreement: float
    peak: int
    seconds: float
    recipes: dict[str, tuple[int, float]]
    asked: tuple[int, int]

    @property
    def doubt(self) -> str | None:
        """Why the plan may be worse than it could be, if it may."""
        prompts, several = self.asked
        if several >= FEW_PROMPTS:
            return None
        return (
            f"Only {several} of {prompts} prompts took several steps, so little is known of later states; with "
            f"{FEW_PROMPTS} or more such --prompts a plan can be better."
        )


def write(
    folder: Path,
    found: Found,
    costs: Costs,
    shapes: Mapping[str, tuple[int, ...]],
    trajectories: Sequence[Trajectory],
    float_bytes: int,
) -> None:
    """Write both files.

    Raises:
        DgemmaError: they cannot be written.
    """
    curve = frontier(costs, shapes, float_bytes)
    with told_errors(folder):
        (folder / REPORT).write_text(_text(found, costs, shapes, trajectories), encoding="utf-8")
        (folder / PLOT).write_text(_plot(found, curve), encoding="utf-8")


def frontier(costs: Costs, shapes: Mapping[str, tuple[int, ...]], float_bytes: int) -> list[tuple[int, float]]:
    """(bytes, sum of divergences) of the plans of several sizes, from the smallest to 8 bits."""
    options = choices(shapes, costs.modules, float_bytes)
    rest = sum(
        float_bytes * int(np.prod(shape))
        for name, shape in shapes.items()
        if name.removesuffix(".weight") not in options
    )
    low = sum(min(one.nbytes for one in some) for some in options.values())
    high = sum(next(one.nbytes for one in some if one.name == FLOAT) for some in options.values()) // 2
    found = []
    for size in np.linspace(low, max(high, low), POINTS).astype(int).tolist():
        chosen = knapsack.greedy(options, size).values()
        found.append((rest + sum(one.nbytes for one in chosen), sum(one.cost for one in chosen)))
    return found


def _text(found: Found, costs: Costs, shapes: Mapping[str, tuple[int, ...]], trajectories: Sequence[Trajectory]) -> str:
    states = sum(len(one.steps) for one in trajectories)
    positions = sum(one.canvases.size for one in trajectories)
    lines = [
        f"# {found.plan.name}",
        "",
        f"{human(found.nbytes)}, {found.bits_per_weight:.2f} bits a weight, everything counted.",
        "",
        f"Over {len(trajectories)} trajectories, {states} states, {positions} positions: KL {found.divergence:.4g} "
        f"nats a position, the same most probable token at {found.agreement:.1%}. The modules' own divergences add up "
        f"to {found.expected:.4g}.",
        "",
        f"{found.seconds:.0f} s; {human(found.peak)} of arrays at most.",
        "",
        "![the plan](report.svg)",
        "",
        "| recipe | size | sum of divergences |",
        "|---|---|---|",
        *(f"| {name} | {human(size)} | {value:.4g} |" for name, (size, value) in found.recipes.items()),
        f"| this plan | {human(found.nbytes)} | {found.expected:.4g} |",
        "",
        *([found.doubt, ""] if found.doubt else []),
        *_few_rows(costs),
        "| module | width | divergence | at 2, 3, 4, 6, 8 bits, groups of 64 |",
        "|---|---|---|---|",
    ]
    for path, own in sorted(costs.modules.items(), key=lambda entry: _order(entry[0])):
        name = width_name(found.plan.fitted(path, shapes[f"{path}.weight"][-1]))
        others = ", ".join(f"{own[f'{bits}g64']:.2g}" if f"{bits}g64" in own else "-" for bits in (2, 3, 4, 6, 8))
        lines.append(f"| {path} | {name} | {own.get(name, 0):.2g} | {others} |")
    return "\n".join(lines) + "\n"


def _few_rows(costs: Costs) -> list[str]:
    """That the trajectories say little of some experts, if they do."""
    counts = [count for path, rows in costs.rows.items() if path.endswith("gate_up_proj") for count in rows]
    few = sum(count < FEW_ROWS for count in counts)
    if not few:
        return []
    return [
        f"{few} of {len(counts)} experts saw fewer than {FEW_ROWS} rows; their layer's sum hardly counts them. More "
        "prompts would.",
        "",
    ]


def _order(path: str) -> tuple[int, str]:
    layer = re.search(r"layers\.(\d+)\.", path)
    return (int(layer[1]) if layer else -1), path


def _plot(found: Found, curve: Sequence[tuple[int, float]]) -> str:
    """Modules by layers in the colours of their bits, and below it the sum of divergences over the size."""
    cells: dict[str, dict[int, str]] = {}
    for path, width in found.plan.modules.items():
        layer = re.search(r"layers\.(\d+)\.(.+)", path)
        kind, place = (layer[2], int(layer[1])) if layer else (path.removeprefix("model.decoder."), 0)
        cells.setdefault(kind, {})[place] = width_name(width)
    columns = 1 + max((place for row in cells.values() for place in row), default=0)
    wide, high = _LEFT + max(columns * _CELL, 420) + 20, _TOP + len(cells) * _CELL + 250
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{found.plan.name}: bits by module and layer</text>',
    ]
    for row, (kind, places) in enumerate(sorted(cells.items())):
        y = _TOP + row * _CELL
        out.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{kind}</text>')
        for place, name in sorted(places.items()):
            width = width_named(name)
            bits = 16 if width is None else width.bits
            ink = "white" if bits in (2, 8, 16) else "black"
            x = _LEFT + place * _CELL
            out.append(
                f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" fill="{_COLOURS[bits]}">'
                f"<title>{kind}, layer {place}: {name}</title></rect>"
                f'<text x="{x + (_CELL - 2) / 2}" y="{y + 14}" text-anchor="middle" fill="{ink}">{bits}</text>'
            )
    out += _curve(found, curve, _TOP + len(cells) * _CELL + 30)
    return "\n".join([*out, "</svg>"]) + "\n"


def _curve(found: Found, curve: Sequence[tuple[int, float]], top: int) -> list[str]:
    """The sum of divergences over the size, logarithmic, with the named recipes as points."""
    wide, high = 420, 170
    named = {**found.recipes, "this plan": (found.nbytes, found.expected)}
    points = [(size, value) for size, value in (*curve, *named.values()) if value > 0]
    sizes, values = [size for size, _ in points], [np.log10(value) for _, value in points]
    spans = max(max(sizes) - min(sizes), 1), max(max(values) - min(values), 1e-9)

    def place(size: int, value: float) -> tuple[float, float]:
        x = _LEFT + (size - min(sizes)) / spans[0] * (wide - 90)
        return round(x, 1), round(top + 10 + (max(values) - np.log10(value)) / spans[1] * (high - 30), 1)

    line = " ".join(f"{x},{y}" for x, y in (place(size, value) for size, value in curve if value > 0))
    out = [
        f'<text x="10" y="{top}" font-size="14">sum of divergences over the size</text>',
        f'<polyline points="{line}" fill="none" stroke="#2166ac" stroke-width="2"/>',
        f'<text x="{_LEFT - 8}" y="{top + 16}" text-anchor="end">{10 ** max(values):.2g} nats</text>',
        f'<text x="{_LEFT - 8}" y="{top + high - 14}" text-anchor="end">{10 ** min(values):.2g} nats</text>',
        f'<text x="{_LEFT}" y="{top + high + 8}">{human(min(sizes))}</text>',
        f'<text x="{_LEFT + wide - 90}" y="{top + high + 8}" text-anchor="middle">{human(max(sizes))}</text>',
    ]
    for name, (size, value) in named.items():
        if value > 0:
            x, y = place(size, value)
            colour = "#b2182b" if name == "this plan" else "#444444"
            out.append(
                f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/><text x="{x + 6}" y="{y + 4}">{name}</text>'
            )
    return out
