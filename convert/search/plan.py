"""`Plan`: a recipe that names a width for every module, and the file that holds one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_dgemma.errors import OptionError

from ..recipes import Quantization, Recipe
from . import widths

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


def save(file: Path, plan: Plan) -> None:
    """Write a plan as JSON."""
    modules = {path: widths.name_of(width) for path, width in sorted(plan.modules.items())}
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
        modules = {path: widths.width_named(name) for path, name in content["modules"].items()}
        return Plan(str(content["name"]), modules=modules)
    except OSError as error:
        raise OptionError(f"{file} cannot be read ({error.strerror or error}); give a plan's file.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(f"{file} is no plan; give a file that `convert --target-size` wrote.") from None
