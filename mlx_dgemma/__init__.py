"""DiffusionGemma on MLX: `engine = mlx_dgemma.load(); engine.generate("...").text`."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .decoding.events import Block, Draft, Finished, Result
    from .decoding.options import GenerationOptions
    from .decoding.session import Session
    from .engine import Engine, load
    from .errors import CheckpointError, DgemmaError, MemoryLimitError, OptionError, PromptError

_HOME = {
    "engine": ("Engine", "load"),
    "errors": ("CheckpointError", "DgemmaError", "MemoryLimitError", "OptionError", "PromptError"),
    "decoding.events": ("Block", "Draft", "Finished", "Result"),
    "decoding.options": ("GenerationOptions",),
    "decoding.session": ("Session",),
}
__all__ = [
    "Block",
    "CheckpointError",
    "DgemmaError",
    "Draft",
    "Engine",
    "Finished",
    "GenerationOptions",
    "MemoryLimitError",
    "OptionError",
    "PromptError",
    "Result",
    "Session",
    "load",
]

# A checkout keeps convert/ beside the package, an installation inside it.
if not (Path(__file__).parent / "convert").exists():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str):
    """Names load on first use, so that `mlx-dgemma --help` imports no MLX."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
