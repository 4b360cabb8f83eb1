"""The ways to store a module that a search tries, and what each takes. Plain data; MLX is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ..recipes import FLOAT, MODES, Quantization, part_of

ALL: tuple[Quantization, ...] = (
    *(Quantization(bits, size) for bits in sorted(MODES["affine"][0]) for size in sorted(MODES["affine"][1])),
    Quantization(4, 32, "mxfp4"),
    Quantization(4, 16, "nvfp4"),
)

# A router's errors change which experts are chosen: seldom and by much, which no gradient shows. It takes a thousandth
# of the weights.
LEAST_ROUTER_BITS = 8


def modules_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{path: shape of its weight} of the modules that a conversion quantizes."""
    paths = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {path: shape for path, shape in paths.items() if part_of(path)}


def allowed(path: str, shape: tuple[int, ...], widths: Sequence[Quantization] = ALL) -> list[Quantization]:
    """The widths that a module can have: its input size is a multiple of the group."""
    least = LEAST_ROUTER_BITS if part_of(path) == "router" else 0
    return [one for one in widths if shape[-1] % one.group_size == 0 and one.bits >= least]


def nbytes(shape: tuple[int, ...], width: Quantization | None, float_bytes: int = 2) -> int:
    """Bytes of a weight of that shape."""
    if width is None:
        return float_bytes * prod(shape)
    sizes = {"U32": 4, "U8": 1, FLOAT: float_bytes}
    return sum(sizes[kind] * prod(stored) for kind, stored in width.stored_tensors("", shape, FLOAT).values())
