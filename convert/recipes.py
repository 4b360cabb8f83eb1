"""Quantization recipes: which part of the model is stored how. Plain data, no MLX needed.

Experts hold nine tenths of the weights, so a recipe is mostly a choice for them. What routes,
embeds or attends is small and sensitive and stays at 8 bit. The vision tower, its projector,
norms and scalars always keep their float dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mlx_dgemma.errors import OptionError

# mode: (bits, group sizes), the default first; what MLX computes.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
_FALLBACKS = (128, 64, 32)  # group sizes tried where an affine recipe's own does not divide the input

# Parts of the model in the order of their table, by the module paths that belong to them.
PARTS = {
    "experts": r"layers\.\d+\.experts\.(?:gate_up|down)_proj",
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"layers\.\d+\.mlp\.(?:gate|up|down)_proj",
    "router": r"layers\.\d+\.router\.proj",
    "embedding": r"embed_tokens",
    "self_conditioning": r"self_conditioning\.(?:gate|up|down)_proj",
}


@dataclass(frozen=True)
class Quantization:
    """How a matrix is packed: `bits` an element, a scale (affine: and a bias) for every group.

    Raises:
        OptionError: a mode, bits or group size that MLX does not compute.
    """

    bits: int = 4
    group_size: int = 64  # elements along the input
    mode: str = "affine"

    def __post_init__(self):
        if self.mode not in MODES:
            raise OptionError(f"q-mode is {self.mode!r}; it should be one of {', '.join(MODES)}.")
        for name, value, bounds in zip(("q-bits", "q-group-size"), (self.bits, self.group_size), MODES[self.mode]):
            if value not in bounds:
                raise OptionError(f"{name} is {value}; with {self.mode} it should be {_either(bounds)}.")

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"

    @property
    def as_dict(self) -> dict[str, Any]:
        """The keywords of `mx.quantize` and the entry of config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fit(self, width: int) -> Quantization | None:
        """Itself where its groups divide an input of `width` elements, else affine's largest that do, else None."""
        if width % self.group_size == 0:
            return self
        if self.mode != "affine":
            return None
        return next((Quantization(self.bits, size) for size in _FALLBACKS if width % size == 0), None)

    def stored(self, path: str, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{tensor: (safetensors dtype, shape)} that a module's weight of `shape` and float `dtype` becomes."""
        packed = (*shape[:-1], shape[-1] * self.bits // 32)
        scales = (*shape[:-1], shape[-1] // self.group_size)
        tensors = {f"{path}.weight": ("U32", packed)}
        if self.mode == "affine":
            return {**tensors, f"{path}.scales": (dtype, scales), f"{path}.biases": (dtype, scales)}
        return {**tensors, f"{path}.scales": ("U8", scales)}


@dataclass(frozen=True)
class Recipe:
    """A quantization, or None, for every part of the model."""

    name: str
    experts: Quantization | None
    attention: Quantization | None = Quantization(8)
    mlp: Quantization | None = Quantization(8)
    router: Quantization | None = Quantization(8)
    embedding: Quantization | None = Quantization(8)
    self_conditioning: Quantization | None = Quantization(8)

    def wanted(self, path: str) -> Quantization | None:
        """What the recipe asks for at a module path, whatever the input's width."""
        part = part_of(path)
        return getattr(self, part) if part else None

    def quantization(self, path: str, width: int) -> dict[str, Any] | None:
        """{"group_size", "bits", "mode"} of the module at `path` with `width` inputs; None where it stays float."""
        fitting = (wanted := self.wanted(path)) and wanted.fit(width)
        return fitting.as_dict if fitting else None

    def nbytes(self, shapes: Mapping[str, tuple[int, ...]], float_bytes: int = 2) -> int:
        """Stored bytes of a model.

        Args:
            shapes: {parameter: shape} of the unquantized model, as `Checkpoint.shapes` has them.
            float_bytes: size of a float that stays one (2 for bfloat16).
        """
        sizes = {"U32": 4, "U8": 1, "float": float_bytes}
        total = 0
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            fitting = (wanted := self.wanted(path)) and wanted.fit(shape[-1])
            tensors = fitting.stored(path, shape, "float") if fitting else {name: ("float", shape)}
            total += sum(sizes[dtype] * prod(stored) for dtype, stored in tensors.values())
        return total


DEFAULT = "4bit"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("3bit", Quantization(3)),
        Recipe("4bit", Quantization(4)),
        Recipe("6bit", Quantization(6)),
        Recipe("8bit", Quantization(8)),
        Recipe("mxfp4", Quantization(4, 32, "mxfp4")),
        Recipe("mxfp8", Quantization(8, 32, "mxfp8")),
        Recipe("nvfp4", Quantization(4, 16, "nvfp4")),
    )
}


def named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in RECIPES:
        raise OptionError(f"There is no recipe {name!r}; take one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def custom(bits: int | None = None, group_size: int | None = None, mode: str | None = None) -> Recipe:
    """The default recipe with other experts; what is None takes its mode's default (affine: 4 bits, groups of 64).

    Where that is what a named recipe does, it is that recipe.

    Raises:
        OptionError: a combination that MLX does not compute.
    """
    mode = mode or "affine"
    (default_bits, *_), (default_group, *_) = MODES.get(mode, MODES["affine"])
    experts = Quantization(
        default_bits if bits is None else bits, default_group if group_size is None else group_size, mode
    )
    same = (recipe for recipe in RECIPES.values() if recipe.experts == experts)
    return next(same, Recipe(f"experts at {experts}", experts))


def part_of(path: str) -> str | None:
    """The part of the model that a module path belongs to, or None for what is never quantized."""
    for part, pattern in PARTS.items():
        if re.fullmatch(r"model\.decoder\." + pattern, path):
            return part
    return None


def _either(values: tuple[int, ...]) -> str:
    *rest, last = map(str, sorted(values))
    return f"{', '.join(rest)} or {last}" if rest else last
