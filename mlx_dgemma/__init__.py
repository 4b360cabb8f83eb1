"""DiffusionGemma on MLX: `engine = mlx_dgemma.load(); engine.generate("...").text`."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .decoding.events import Block, Draft, Finished, Result
    from .decoding.options import GenerationOptions
    from .decoding.session import Session
    from .engine import Engine, load
    from .errors import CheckpointError, DgemmaError, MemoryLimitError, OptionError, PromptError, RangeError

_HOME = {
    "engine": ("Engine", "load"),
    "errors": ("CheckpointError", "DgemmaError", "MemoryLimitError", "OptionError", "PromptError", "RangeError"),
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
    "RangeError",
    "Result",
    "Session",
    "load",
]


if not TYPE_CHECKING:  # type checkers read the imports above and refuse other names

    def __getattr__(name: str) -> Any:
        """Names load on first use, so that `mlx-dgemma --help` imports no MLX."""
        for module, names in _HOME.items():
            if name in names:
                return getattr(import_module(f".{module}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _load_convert() -> None:
    """Make `mlx_dgemma.convert` of a checkout's convert/, which lies beside the package."""
    from importlib.util import module_from_spec, spec_from_file_location

    file = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "convert", "__init__.py")
    spec = spec_from_file_location(f"{__name__}.convert", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()["convert"] = module


if not os.path.exists(os.path.join(os.path.dirname(__file__), "convert")):
    _load_convert()
