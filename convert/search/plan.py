"""`Plan`: a recipe that names a width for every module, and the file that holds one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from mlx_dgemma.errors import OptionError, human

from ..recipes import FLOAT, Quantization, Recipe, width_name, width_named
from . import knapsack, widths
from .knapsack import Choice

FORMAT = "mlx-dgemma plan 1"
_DEFAULT = Quantization(4)


@dataclass(frozen=True)
class Plan(Recipe):
    """A recipe by module; `experts` and the other parts are what a module without an entry gets.

    Attributes:
        modules: {module path: its quantization, or None for floats}.
    """

    experts: Quantization | None = _DEFAULT
    modules: Mapping[str, Quantization | None] = field(default_factory=dict)

    def requested(self, path: str) -> Quantization | None:
        """The plan's quantization for the module at `path`."""
        return self.modules[path] if path in self.modules else super().requested(path)


def choices(
    shapes: Mapping[str, tuple[int, ...]], costs: Mapping[str, Mapping[str, float]], float_bytes: int
) -> dict[str, list[Choice]]:
    """The knapsack's choices of every module that was measured; floats cost nothing but bytes."""
    found = {}
    for path, own in costs.items():
        shape = shapes[f"{path}.weight"]
        known = [Choice(name, widths.nbytes(shape, width_named(name)), max(cost, 0)) for name, cost in own.items()]
        found[path] = [*known, Choice(FLOAT, widths.nbytes(shape, None, float_bytes), 0.0)]
    return found


def planned(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    costs: Mapping[str, Mapping[str, float]],
    nbytes: int,
    float_bytes: int = 2,
) -> tuple[Plan, float]:
    """The plan with the least sum of costs whose checkpoint takes at most so many bytes, and that sum.

    Raises:
        OptionError: not even the smallest widths fit.
    """
    options = choices(shapes, costs, float_bytes)
    rest = sum(float_bytes * prod(shape) for path, shape in shapes.items() if path.removesuffix(".weight") not in costs)
    try:
        chosen = knapsack.best(options, nbytes - rest)
    except ValueError:
        least = rest + sum(min(one.nbytes for one in some) for some in options.values())
        raise OptionError(
            f"target-size is {human(nbytes)}, and this model takes at least {human(least)}; ask for more."
        ) from None
    modules = {path: width_named(one.name) for path, one in chosen.items()}
    return Plan(name, modules=modules), sum(one.cost for one in chosen.values())


def save(file: Path, plan: Plan) -> None:
    """Write a plan as JSON."""
    modules = {path: width_name(width) for path, width in sorted(plan.modules.items())}
    content = {"format": FORMAT, "name": plan.name, "modules": modules}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(file: Path) -> Plan:
    """Read what `save` wrote.

    Raises:
        OptionError: it is no plan.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError
        modules = {path: width_named(name) for path, name in content["modules"].items()}
        return Plan(str(content["name"]), modules=modules)
    except OSError as error:
        raise OptionError(f"{file} cannot be read ({error.strerror or error}); give a plan's file.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(f"{file} is no plan; give a file that `convert --target-size` wrote.") from None
