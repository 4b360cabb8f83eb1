"""The metrics of a run: a CSV file that grows line by line, and a plot of the losses."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..errors import DataError
from ..files import atomic_file, told_errors

COLUMNS = (
    "step", "seconds", "learning_rate", "loss", "canvas", "encoder", "norm", "valid_loss", "valid_right", "peak_bytes",
)  # fmt: skip
SIZE, MARGIN = (900, 500), (70, 40, 20, 50)  # pixels; left, top, right, bottom
LINES = {"loss": (150, 185, 230), "smoothed": (20, 80, 180), "valid_loss": (200, 60, 40)}
BACKGROUND, AXES, TEXT = (255, 255, 255), (190, 190, 190), (60, 60, 60)
SMOOTH = 0.95  # decay of the running mean per step

Row = Mapping[str, float | None]


class MetricsLog:
    """The metrics of every step, in memory and in a CSV file.

    Args:
        file: created with a header if it does not exist.
        step: step from which a run is resumed; later rows, and a line that a killed run left half written, are
            removed from the file.
        columns: names of the metrics; "step" is one of them.

    Raises:
        DataError: the file exists, but cannot be read.
        DgemmaError: it cannot be written; `add` and `complete` raise this, too.
    """

    def __init__(self, file: Path, step: int = 0, columns: Sequence[str] = COLUMNS):
        self._file, self._columns = file, columns
        self.rows: list[dict[str, float | None]] = []
        if step and file.exists():
            content = file.read_text(encoding="utf-8")
            texts = list(csv.DictReader(content[: content.rfind("\n") + 1].splitlines()))  # the last may be cut short
            try:
                rows: list[dict[str, float | None]] = [
                    {name: float(row[name]) if row[name] else None for name in columns} for row in texts
                ]
            except (KeyError, TypeError, ValueError):
                raise DataError(f"{file} is broken; remove it to start a new log.") from None
            self.rows = [{**row, "step": int(row["step"] or 0)} for row in rows if (row["step"] or 0) <= step]
        self._rewrite()

    def add(self, **row: float | None) -> None:
        """Append a row; missing columns are empty."""
        complete = {name: row.get(name) for name in self._columns}
        self.rows.append(complete)
        with told_errors(self._file), self._file.open("a", newline="", encoding="utf-8") as lines:
            csv.DictWriter(lines, self._columns).writerow(complete)

    def complete(self, **values: float | None) -> None:
        """Change columns of the last row. The file is replaced atomically."""
        self.rows[-1].update(values)
        self._rewrite()

    def _rewrite(self) -> None:
        with atomic_file(self._file, flush=False) as draft, draft.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def draw_curves(rows: Sequence[Row], file: Path) -> None:
    """Plot the losses over the steps as a PNG: the loss of each step, its running mean, and the validation loss."""
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    mean = weight = 0.0  # of the running mean, and the sum of its weights
    for row in rows:
        step, loss, valid = row["step"] or 0, row.get("loss"), row.get("valid_loss")
        if loss is not None:
            mean, weight = SMOOTH * mean + (1 - SMOOTH) * loss, SMOOTH * weight + 1 - SMOOTH
            curves["loss"].append((step, loss))
            curves["smoothed"].append((step, mean / weight))
        if valid is not None:
            curves["valid_loss"].append((step, valid))
    image = Image.new("RGB", SIZE, BACKGROUND)
    pen = ImageDraw.Draw(image)
    values = sorted(y for curve in curves.values() for _, y in curve)
    if values:
        _plot(pen, curves, values)
    with atomic_file(file, flush=False) as draft:
        image.save(draft, "PNG")


def _plot(pen: ImageDraw.ImageDraw, curves: Mapping[str, list[tuple[float, float]]], values: list[float]) -> None:
    """Draw axes, labels and curves; `values` are the sorted losses of all curves."""
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    last = max(x for curve in curves.values() for x, _ in curve) or 1
    low, high = 0.0, values[int(0.99 * (len(values) - 1))] * 1.05 or 1.0  # the highest 1 % of the losses are cut off

    def at(x: float, y: float) -> tuple[float, float]:
        height = min(max((y - low) / (high - low), 0), 1)
        return left + (right - left) * x / last, bottom - (bottom - top) * height

    for i in range(5):
        x, y = last * i / 4, low + (high - low) * i / 4
        pen.line([at(0, y), at(last, y)], fill=AXES)
        pen.text((8, at(0, y)[1] - 6), f"{y:.3g}", fill=TEXT)
        pen.text((at(x, low)[0] - 10, bottom + 8), f"{x:g}", fill=TEXT)
    pen.text(((left + right) / 2 - 10, bottom + 26), "step", fill=TEXT)
    for i, (name, curve) in enumerate(curves.items()):
        if len(curve) > 1:
            pen.line([at(*point) for point in curve], fill=LINES[name], width=1 if name == "loss" else 3)
        for point in curve if name == "valid_loss" else curve[:1]:
            x, y = at(*point)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=LINES[name])
        pen.text((left + 160 * i, 14), name.replace("_", " ") + " (nats per token)", fill=LINES[name])
