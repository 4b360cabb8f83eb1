"""DiffusionGemma on MLX: `engine = mlx_dgemma.load(); engine.generate("...").text`."""

import os
import sys

__version__ = "0.1.0"

TYPE_CHECKING = False  # as typing's, whose import a call of a running server has no time for
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import Any

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

    def __getattr__(name: str) -> "Any":
        """Names load on first use, so that `mlx-dgemma --help` imports no MLX."""
        from importlib import import_module

        if name == "convert":
            return import_module(".convert", __name__)
        for module, names in _HOME.items():
            if name in names:
                return getattr(import_module(f".{module}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _ConvertBeside:
    """Finds `mlx_dgemma.convert` of a checkout, which lies beside the package."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """As `importlib.abc.MetaPathFinder` has it."""
        if name != f"{__name__}.convert":
            return None
        from importlib.util import spec_from_file_location

        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        return spec_from_file_location(name, os.path.join(root, "convert", "__init__.py"))


if not os.path.exists(os.path.join(os.path.dirname(__file__), "convert")):
    sys.meta_path.append(_ConvertBeside)
