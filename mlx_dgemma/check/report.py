"""The whole check: its sections, the verdict in words, and one line of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import mlx.core as mx

from .. import __version__
from ..checkpoint.find import DEMO
from ..engine import Engine, load
from ..errors import count
from ..model import device
from . import answers, machine, operations, products, references, speed
from .lines import FAILED, PASSED, SKIPPED, WARNING, Line, described

STATUSES = (PASSED, WARNING, FAILED, SKIPPED)


class Found(NamedTuple):
    """One line, with the section that it stands in."""

    section: str
    line: Line


class Section(NamedTuple):
    """A part of the check; a section that fails as a whole becomes a line of its own."""

    name: str
    lines: Callable[[], Iterator[Line]]


def sections(quick: bool = False, only: Sequence[str] = ()) -> list[Section]:
    """The sections in their order.

    Args:
        quick: leave out speed, and compute products of a small shape.
        only: names of the sections to keep; without any, all.
    """
    demo = _Demo()
    found = [
        Section("machine", machine.lines),
        Section("operations", lambda: operations.lines(demo.load())),
        Section("products", lambda: products.lines(products.size_of(quick))),
        Section("references", lambda: references.lines(demo.load("float32").model)),
        Section("answers", lambda: answers.lines(demo.load())),
    ]
    if not quick or "speed" in only:
        found.append(Section("speed", speed.lines))
    return [one for one in found if not only or one.name in only]


class _Demo:
    """The bundled demo, loaded when it is first asked for in a dtype; None: what this device takes."""

    def __init__(self) -> None:
        self._engines: dict[str | None, Engine] = {}

    def load(self, dtype: str | None = None) -> Engine:
        if dtype not in self._engines:
            self._engines[dtype] = load(DEMO, dtype)
        return self._engines[dtype]


def run(parts: list[Section], begin: Callable[[str], None] = lambda name: None) -> Iterator[Found]:
    """The lines of the sections, as they are found. What a section raises is a line, and the next section follows.

    Args:
        parts: the sections.
        begin: called with the name of each section before its work, which can take minutes where kernels are compiled.
    """
    for part in parts:
        begin(part.name)
        try:
            for line in part.lines():
                yield Found(part.name, line)
        except Exception as error:
            yield Found(part.name, Line(part.name, FAILED, described(error)))
        mx.clear_cache()


def summary(found: list[Found], seconds: float) -> dict[str, Any]:
    """Everything as JSON values; `passed` is true if no line failed."""
    numbers = {status: sum(one.line.status == status for one in found) for status in STATUSES}
    return {
        "check": "mlx-dgemma",
        "version": __version__,
        "mlx": metadata.version("mlx"),
        "device": machine.device_name(),
        "backend": "cpu" if device.on_cpu() else "metal" if mx.metal.is_available() else "cuda",
        "passed": numbers[FAILED] == 0,
        "counts": numbers,
        "seconds": round(seconds, 1),
        "lines": [
            {"section": one.section, **{key: _plain(value) for key, value in vars(one.line).items()}} for one in found
        ],
    }


def verdict(found: list[Found]) -> str:
    """What all of it comes to, in a few sentences."""
    names = {status: [one.line.name for one in found if one.line.status == status] for status in STATUSES}
    on = f"{machine.device_name()} with MLX {metadata.version('mlx')}"
    if failed := names[FAILED]:
        say = f"{count(len(failed), 'line')} of {len(found)} failed on {on}: {'; '.join(failed)}."
    else:
        say = (
            f"Everything that could be checked is as it should be on {on}: {count(len(names[PASSED]), 'line')} passed."
        )
    if names[WARNING]:
        say += f" To know: {'; '.join(names[WARNING])}."
    if names[SKIPPED]:
        say += f" Not checked here: {'; '.join(names[SKIPPED])}."
    steps = [
        f"{one.line.name.removeprefix('predicted ')} {one.line.figures['predicted_ms']:.0f} ms"
        for one in found
        if "predicted_ms" in one.line.figures
    ]
    return say + (f" Predicted: {', '.join(steps)}." if steps else "")


def check(quick: bool, only: Sequence[str], tell: Callable[[str], None]) -> dict[str, Any]:
    """Run the check and tell each line as it is found.

    Args:
        quick, only: see `sections`.
        tell: takes text, a line at a time.

    Returns:
        As `summary`, with the verdict.
    """
    began, found = time.perf_counter(), []
    for one in run(sections(quick, only), lambda name: tell(f"\n{name}")):
        tell(f"  {one.line}")
        found.append(one)
    made = summary(found, time.perf_counter() - began)
    made["verdict"] = verdict(found)
    tell(f"\n{made['verdict']}")
    return made


def _plain(value: Any) -> Any:
    """A value that JSON can hold: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_json(made: dict[str, Any]) -> str:
    """One line."""
    return json.dumps(made, ensure_ascii=False, allow_nan=False)
