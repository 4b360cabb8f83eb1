"""The ways to store a module that a search tries, and what each takes. Plain data; MLX is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod

from mlx_dgemma.errors import OptionError

from ..recipes import MODES, Quantization, part_of

FLOAT = "float"  # the name of no quantization
ALL: tuple[Quantization, ...] = (
    *(Quantization(bits, size) for bits in sorted(MODES["affine"][0]) for size in sorted(MODES["affine"][1])),
    Quantization(4, 32, "mxfp4"),
    Quantization(4, 16, "nvfp4"),
)


def name_of(width: Quantization | None) -> str:
    """A short name: "4g64", "mxfp4", "float"."""
    if width is None:
        return FLOAT
    return f"{width.bits}g{width.group_size}" if width.mode == "affine" else width.mode


def width_named(name: str) -> Quantization | None:
    """What `name_of` named.

    Raises:
        OptionError: there is no such width.
    """
    if name == FLOAT:
        return None
    if found := re.fullmatch(r"(\d)g(\d+)", name):
        return Quantization(int(found[1]), int(found[2]))
    if name in MODES and name != "affine":
        (bits, *_), (size, *_) = MODES[name]
        return Quantization(bits, size, name)
    raise OptionError(f"{name} is no width; write such as 4g64, mxfp4 or {FLOAT}.")


def modules_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{path: shape of its weight} of the modules that a conversion quantizes."""
    paths = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {path: shape for path, shape in paths.items() if part_of(path)}


def allowed(shape: tuple[int, ...], widths: Sequence[Quantization] = ALL) -> list[Quantization]:
    """The widths that a module can have: its input size is a multiple of the group."""
    return [one for one in widths if shape[-1] % one.group_size == 0]


def nbytes(shape: tuple[int, ...], width: Quantization | None, float_bytes: int = 2) -> int:
    """Bytes of a weight of that shape."""
    if width is None:
        return float_bytes * prod(shape)
    sizes = {"U32": 4, "U8": 1, FLOAT: float_bytes}
    return sum(sizes[kind] * prod(stored) for kind, stored in width.stored_tensors("", shape, FLOAT).values())
