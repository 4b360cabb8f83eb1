"""Quantization recipes: how each part of the model is stored. This module is plain data and does not import MLX.

The experts hold nine tenths of the weights, so a recipe mostly chooses the experts' format. The router, the
embedding and attention are small and sensitive; they stay at 8 bits. The vision tower, its projector, norms and
scalars always keep their float dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mlx_dgemma.errors import OptionError

from .macs import MACS

# {mode: (bits, group sizes)} that MLX supports; the first of each is the default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
_FALLBACKS = (128, 64, 32)  # tried when an affine recipe's group size does not divide the input size

# {part of the model: pattern of its module paths}, in the order in which parts are listed.
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
    """How a weight matrix is quantized: `bits` per element, and a scale (affine: also a bias) for every group.

    Raises:
        OptionError: a mode, bits or group size that MLX does not support.
    """

    bits: int = 4
    group_size: int = 64  # elements along the input axis
    mode: str = "affine"

    def __post_init__(self):
        if self.mode not in MODES:
            raise OptionError(f"q-mode is {self.mode!r}; it should be one of {', '.join(MODES)}.")
        for name, value, bounds in zip(("q-bits", "q-group-size"), (self.bits, self.group_size), MODES[self.mode]):
            if value not in bounds:
                raise OptionError(f"{name} is {value}; with {self.mode} it should be {_any_of(bounds)}.")

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"

    @property
    def as_dict(self) -> dict[str, Any]:
        """The keywords of `mx.quantize` and the entry of config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fit(self, width: int) -> Quantization | None:
        """The quantization to use for an input of `width` elements.

        That is this one if its group size divides `width`. Otherwise affine modes fall back to the largest group size
        that does. None if there is none.
        """
        if width % self.group_size == 0:
            return self
        if self.mode != "affine":
            return None
        return next((Quantization(self.bits, size) for size in _FALLBACKS if width % size == 0), None)

    def stored_tensors(self, path: str, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that store the weight of the module at `path`.

        Args:
            path: path of the module.
            shape: shape of the unquantized weight.
            dtype: safetensors' name of the floats' dtype, used for affine scales and biases.

        Returns:
            {tensor: (safetensors dtype, shape)}.
        """
        packed = (*shape[:-1], shape[-1] * self.bits // 32)
        scales = (*shape[:-1], shape[-1] // self.group_size)
        tensors = {f"{path}.weight": ("U32", packed)}
        if self.mode == "affine":
            return {**tensors, f"{path}.scales": (dtype, scales), f"{path}.biases": (dtype, scales)}
        return {**tensors, f"{path}.scales": ("U8", scales)}


FLOAT = "float"  # the name of no quantization


def width_name(width: Quantization | None) -> str:
    """A short name: "4g64", "mxfp4", "float"."""
    if width is None:
        return FLOAT
    return f"{width.bits}g{width.group_size}" if width.mode == "affine" else width.mode


def width_named(name: str) -> Quantization | None:
    """What `width_name` named.

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


def unfolded(kinds: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Widths by layer from their short form: "4g64*2 3g64" is 4g64, 4g64, 3g64."""
    found: dict[str, tuple[str, ...]] = {}
    for kind, text in kinds.items():
        runs = [one.partition("*") for one in text.split()]
        found[kind] = tuple(name for name, _, times in runs for _ in range(int(times or 1)))
    return found


@dataclass(frozen=True)
class Recipe:
    """A quantization for every part of the model; None keeps floats."""

    name: str
    experts: Quantization | None
    attention: Quantization | None = Quantization(8)
    mlp: Quantization | None = Quantization(8)
    router: Quantization | None = Quantization(8)
    embedding: Quantization | None = Quantization(8)
    self_conditioning: Quantization | None = Quantization(8)

    def requested(self, path: str) -> Quantization | None:
        """The recipe's quantization for the module at `path`, regardless of its input size."""
        part = part_of(path)
        return getattr(self, part) if part else None

    def fitted(self, path: str, width: int) -> Quantization | None:
        """The quantization that the module at `path` gets if it has `width` inputs; None if it stays float."""
        requested = self.requested(path)
        return requested.fit(width) if requested else None

    def quantization(self, path: str, width: int) -> dict[str, Any] | None:
        """`fitted` as {"group_size", "bits", "mode"}; None if the module stays float."""
        fitted = self.fitted(path, width)
        return fitted.as_dict if fitted else None

    def nbytes(self, shapes: Mapping[str, tuple[int, ...]], float_bytes: int = 2) -> int:
        """Stored size of a model in bytes.

        Args:
            shapes: {parameter: shape} of the unquantized model, as in `Checkpoint.shapes`.
            float_bytes: bytes per weight that stays float (2 for bfloat16).
        """
        sizes = {"U32": 4, "U8": 1, "float": float_bytes}
        total = 0
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            fitted = self.fitted(path, shape[-1])
            tensors = fitted.stored_tensors(path, shape, "float") if fitted else {name: ("float", shape)}
            total += sum(sizes[dtype] * prod(stored) for dtype, stored in tensors.values())
        return total


@dataclass(frozen=True)
class ByLayer(Recipe):
    """A recipe that names a width for every module of every layer.

    Attributes:
        kinds: {path of a module in its layer, or in the decoder: its widths, layer by layer}, as `macs` has them; a
            model with more layers takes the last for them.
    """

    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def requested(self, path: str) -> Quantization | None:
        """The recipe's quantization for the module at `path`."""
        found = re.fullmatch(r"model\.decoder\.(?:layers\.(\d+)\.)?(.+)", path)
        if found is None or found[2] not in self.kinds:
            return super().requested(path)
        names = self.kinds[found[2]]
        return width_named(names[min(int(found[1] or 0), len(names) - 1)])


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
        *(ByLayer(name, Quantization(4), kinds=unfolded(kinds)) for name, kinds in MACS.items()),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        OptionError: there is no such recipe.
    """
    if name not in RECIPES:
        raise OptionError(f"recipe is {name!r}; take one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def custom_recipe(bits: int | None = None, group_size: int | None = None, mode: str | None = None) -> Recipe:
    """The default recipe with another quantization of the experts.

    None takes the default of the mode; the default mode is affine with 4 bits and groups of 64. If a named recipe
    quantizes the experts in the same way, that recipe is returned.

    Raises:
        OptionError: a combination that MLX does not support.
    """
    mode = mode or "affine"
    (default_bits, *_), (default_group, *_) = MODES.get(mode, MODES["affine"])
    experts = Quantization(
        default_bits if bits is None else bits, default_group if group_size is None else group_size, mode
    )
    equal = (recipe for recipe in RECIPES.values() if recipe.experts == experts)
    return next(equal, Recipe(f"experts at {experts}", experts))


def part_of(path: str) -> str | None:
    """The part of the model that a module path belongs to; None for modules that are never quantized."""
    for part, pattern in PARTS.items():
        if re.fullmatch(r"model\.decoder\." + pattern, path):
            return part
    return None


def _any_of(values: tuple[int, ...]) -> str:
    *rest, last = map(str, sorted(values))
    return f"{', '.join(rest)} or {last}" if rest else last
