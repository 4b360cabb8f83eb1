"""Convert DiffusionGemma checkpoints to MLX: `convert("google/diffusiongemma-26B-A4B-it", "out", recipe="4bit")`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversion import convert
    from .recipes import DEFAULT, RECIPES, Quantization, Recipe
    from .report import Report
    from .verify import Verification

_HOME = {
    "conversion": ("convert",),
    "recipes": ("DEFAULT", "RECIPES", "Quantization", "Recipe"),
    "report": ("Report",),
    "verify": ("Verification",),
}
__all__ = ["DEFAULT", "RECIPES", "Quantization", "Recipe", "Report", "Verification", "convert"]


def __getattr__(name: str):
    """Import a public name on first use, so that `--help` does not import MLX."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
