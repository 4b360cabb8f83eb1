"""Open what is to be converted: a folder in a layout that can be loaded, another program's format, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_dgemma.checkpoint.folder import Checkpoint, read_generation
from mlx_dgemma.checkpoint.headers import weight_files
from mlx_dgemma.checkpoint.processor import read_processor
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.config import ModelConfig

from ..jobs import Job
from ..recipes import Recipe
from .gguf_file import GGUF, read_gguf
from .gguf_model import config_of, generation_of, make_gguf_jobs
from .gguf_tokenizer import write_tokenizer
from .parts import Decoded
from .quantized import make_decoded_jobs

Jobs = Callable[[Recipe | None, str | None], tuple[Sequence[Job | Decoded], list[str]]]
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
    if file := _gguf_of(path):
        with TemporaryDirectory() as temporary:
            yield _open_gguf(read_gguf(file), Path(temporary))
        return
    checkpoint = Checkpoint.open(path)
    if checkpoint.foreign is None:
        yield Source(checkpoint)
    else:
        yield Source(checkpoint, lambda recipe, dtype: make_decoded_jobs(checkpoint, recipe, dtype))


def _gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path stands for, or None: the file itself, or the only model in a folder without others."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    found = [file for file in sorted(path.glob("*.gguf")) if not file.name.startswith(("._", "mmproj"))]
    if not found or weight_files(path):
        return None
    first = [file for file in found if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(first) != 1:
        names = ", ".join(file.name for file in first or found)
        raise CheckpointError(f"{path} holds several GGUF files ({names}); give the path of one.")
    return first[0]


def _open_gguf(source: GGUF, folder: Path) -> Source:
    """A GGUF file as a checkpoint; `folder` takes what its metadata stand for, as JSON files."""
    raw = config_of(source)
    for name, content in (("config.json", raw), ("generation_config.json", generation_of(source))):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    told = write_tokenizer(source, folder)
    config = ModelConfig.from_dict(raw)
    generation, processor = read_generation(folder, config, []), read_processor(folder, None)
    checkpoint = Checkpoint(folder, config, generation, processor, raw, {})

    def decode(recipe: Recipe | None, dtype: str | None) -> tuple[Sequence[Decoded], list[str]]:
        jobs, notes = make_gguf_jobs(source, checkpoint, recipe, dtype)
        return jobs, [*notes, *told]

    return Source(checkpoint, decode)
