"""Open what is to be converted: a folder in a layout that can be loaded, another program's format, or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_dgemma.checkpoint.folder import Checkpoint

from ..jobs import Job
from ..recipes import Recipe
from .parts import Decoded
from .quantized import make_decoded_jobs

Jobs = Callable[[Recipe | None, str | None], tuple[list[Job | Decoded], list[str]]]
# Files that describe the source's quantization and would be wrong beside the result.
STALE = ("hf_quant_config.json", "recipe.yaml", "quant_strategy.json")


@dataclass(frozen=True)
class Source:
    """What is converted.

    Attributes:
        checkpoint: its configuration, files and headers.
        decode: gives the jobs and notes of a format that only a conversion reads; None for the others.
    """

    checkpoint: Checkpoint
    decode: Jobs | None = None


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a source; what is temporary goes at the end.

    Raises:
        CheckpointError: it is broken, of another model, or in a format that is not read.
    """
    checkpoint = Checkpoint.open(path)
    if checkpoint.foreign is None:
        yield Source(checkpoint)
    else:
        yield Source(checkpoint, lambda recipe, dtype: make_decoded_jobs(checkpoint, recipe, dtype))
