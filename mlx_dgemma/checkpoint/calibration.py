"""Stop rules that were fitted on a user's own prompts: a small file beside a checkpoint or an adapter."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError
from ..files import atomic_file
from ..model.config import read_json
from .find import DEMO

FILE = "calibration.json"
OPTIONS = {  # which may be fitted: whether the value is a whole number
    "entropy_bound": False,
    "certainty_threshold": False,
    "patience": True,
}


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        options: values by the names of `OPTIONS`, for the default mode.
        prompts: number of prompts that they were fitted on.
        agreement: share of their answers that the rules leave as they are.
        positions: positions denoised an answer, and `exact_positions` those of exact mode.
    """

    options: dict[str, float]
    prompts: int
    agreement: float
    positions: float
    exact_positions: float

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value:g}" for name, value in self.options.items())
        return f"{told}, fitted on {self.prompts} prompts at {100 * self.agreement:.1f} % agreement"


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in a folder; None if it has none.

    Raises:
        CheckpointError: the file is broken, or it sets what is not known.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    raw = read_json(file)
    options = raw.get("options")
    if not isinstance(options, dict) or set(raw) != set(Calibration.__dataclass_fields__):
        names = ", ".join(Calibration.__dataclass_fields__)
        raise CheckpointError(f"{file} should have {names}; calibrate again, or remove it.")
    for name, value in options.items():
        if name not in OPTIONS:
            raise CheckpointError(f"{file} sets {name}, which is not fitted; calibrate again, or remove it.")
        if not _is_number(value) or (OPTIONS[name] and type(value) is not int):
            noun = "a whole number" if OPTIONS[name] else "a number"
            raise CheckpointError(f"{file} sets {name} to {value!r}; it should be {noun} of at least 0.")
    for name in set(raw) - {"options"}:
        if not _is_number(raw[name]):
            raise CheckpointError(f"{file} has {name} {raw[name]!r}; it should be a number of at least 0.")
    return Calibration(**raw)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def writable_folder(folder: Path) -> Path:
    """The folder, if a calibration may be saved there.

    Raises:
        OptionError: it is the bundled demo's, which belongs to the package, or it cannot be written.
    """
    if folder.resolve() == DEMO.resolve():
        raise OptionError("The bundled demo is part of the package; give an --adapter to save beside, or --dry-run.")
    if not os.access(folder, os.W_OK):
        raise OptionError(f"{folder} cannot be written; allow it, or take --dry-run.")
    return folder


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write a calibration into a folder; returns the file, which replaces an earlier one.

    Raises:
        DgemmaError: it cannot be written.
    """
    with atomic_file(folder / FILE) as draft:
        draft.write_text(json.dumps(vars(calibration), indent=2) + "\n", encoding="utf-8")
    return folder / FILE
