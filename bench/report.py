"""What every benchmark prints alike: the machine, spreads, tables, failures, and the last line of JSON."""

import gc
import json
import os
import platform
import statistics
from collections.abc import Callable
from importlib import import_module, metadata

import mlx.core as mx

import mlx_dgemma

GIB = 2**30
Cell = str | float | int | None


def machine(*packages: str) -> dict:
    """Print the machine and the versions, those of `packages` among them; returns both."""
    versions = {"mlx-dgemma": mlx_dgemma.__version__, "mlx": mx.__version__, "python": platform.python_version()}
    versions.update({name: version(name) for name in packages})
    found = {
        "device": mx.device_info().get("device_name", str(mx.default_device())),
        "backend": "cpu" if on_cpu() else "gpu",
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
    }
    print(f"{found['device']} ({found['backend']}), {found['system']}")
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    return found


def version(package: str) -> str:
    """A package's version, also where it is only on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    try:
        return import_module(f"{package.replace('-', '_')}.version").__version__
    except (ImportError, AttributeError):
        return "not found"


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def spread(values: list[float], digits: int = 2) -> dict:
    """Median, smallest and largest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def show(one: dict | None, digits: int = 1) -> str:
    """A spread in a table's cell."""
    return "-" if one is None else f"{one['median']:.{digits}f} ({one['min']:.{digits}f}-{one['max']:.{digits}f})"


def attempt(function: Callable, *args) -> dict:
    """What a function returns, or {"failure": text}: a peer that runs out of memory does not end the run."""
    try:
        return function(*args)
    except Exception as error:
        failure = {"failure": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    gc.collect()  # only now do the failed frames let go of their arrays
    mx.clear_cache()
    return failure


def ratio(ours: float | None, peer: float | None) -> float | None:
    return round(ours / peer, 3) if ours is not None and peer else None


def table(header: list[str], rows: list[list[Cell]]) -> None:
    """Print rows in columns: the first to the left, the others to the right."""
    cells = [header, *([_cell(one) for one in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print(row[0].ljust(widths[0]), *(one.rjust(width) for one, width in zip(row[1:], widths[1:])), sep="  ")


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def finish(bench: str, **content) -> None:
    """The last line: everything once more, as JSON."""
    print(json.dumps({"bench": bench, **content}))
