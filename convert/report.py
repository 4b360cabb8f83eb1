"""What a conversion reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .rounding.run import Rounding
from .verify import Verification


@dataclass(frozen=True)
class Report:
    """The result of `convert()`.

    Attributes:
        source: the checkpoint as it was named: a folder or a Hub id.
        target: the folder that was made.
        recipe: name of the recipe, or None if nothing was quantized.
        dtype: dtype of the weights that stay floats.
        unchanged: True if the weights were copied byte for byte.
        quantized: {part of the model: how it is quantized}.
        regrouped: {module path: how it is quantized}, where the recipe's group size does not divide the input size.
        unquantized: paths of modules whose input size no group size divides.
        nonfinite: parameters that contain NaN or infinity; only looked for with `verify`.
        parameters: number of weights.
        nbytes: stored size in bytes.
        bits_per_weight: stored bits per weight, scales and biases included.
        seconds: duration of the conversion.
        verification: the comparison of logits, with `verify` only.
        url: where the result was uploaded, or None.
        notes: what of the source is not used, one sentence each.
        rounding: what was done for better rounding; None where weights take their nearest codes.
    """

    source: str
    target: Path
    recipe: str | None
    dtype: str
    unchanged: bool
    quantized: dict[str, str]
    regrouped: dict[str, str]
    unquantized: tuple[str, ...]
    nonfinite: tuple[str, ...]
    parameters: int
    nbytes: int
    bits_per_weight: float
    seconds: float
    verification: Verification | None = None
    url: str | None = None
    notes: tuple[str, ...] = ()
    rounding: Rounding | None = None
