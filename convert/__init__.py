"""Checkpoints of DiffusionGemma into MLX: `convert("google/diffusiongemma-26B-A4B-it", "out", recipe="4bit")`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversion import Report, convert
    from .recipes import DEFAULT, RECIPES, Quantization, Recipe
    from .verify import Verification

_HOME = {
    "conversion": ("Report", "convert"),
    "recipes": ("DEFAULT", "RECIPES", "Quantization", "Recipe"),
    "verify": ("Verification",),
}
__all__ = ["DEFAULT", "RECIPES", "Quantization", "Recipe", "Report", "Verification", "convert"]


def __getattr__(name: str):
    """Names load on first use, so that `--help` imports no MLX."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
