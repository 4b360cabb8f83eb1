"""Open what is to be converted: a folder in a layout that can be loaded, another program's format, or a GGUF file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_dgemma.checkpoint.find import fetch, find
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
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:[/:](.+\.gguf)|:([\w.-]+)|(?<=[-_.](?:gguf|GGUF)))")
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


def find_source(name: str | os.PathLike) -> Path:
    """The folder or GGUF file that is to be converted.

    Args:
        name: what `find` takes, or a GGUF file of the Hub, `owner/name/file.gguf`, `owner/name:file.gguf` or, by a part
            of its name, `owner/name:Q4_K_M`. Of a split all files are fetched.

    Raises:
        CheckpointError: as `find`; or there is no such file, or several.
    """
    found = _ON_HUB.fullmatch(str(name))
    if found is None or str(name).startswith((".", "~")) or Path(name).exists():
        return find(name)
    repository, file, part = found.groups()
    if file:
        wanted = [file, re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-?????-of-\1", file)]
    elif part:
        cases = {part, part.upper(), part.lower()}
        ends = [one + rest for one in sorted(cases) for rest in (".gguf", "-?????-of-?????.gguf")]
        wanted = [*ends, *(f"*[-._/]{end}" for end in ends)]
    else:
        raise CheckpointError(f"{name} holds GGUF files; name the one to convert, such as {name}:Q4_K_M.")

    def matching(folder: Path) -> list[Path]:
        files = {one: one.relative_to(folder).as_posix() for one in sorted(folder.rglob("*.gguf"))}
        models = {one: path for one, path in files.items() if not one.name.startswith("mmproj")}
        return [one for one, path in models.items() if any(fnmatchcase(path, pattern) for pattern in wanted)]

    def is_complete(folder: Path) -> bool:
        found = matching(folder)
        return len(found) >= max([1, *(int(one.stem[-5:]) for one in found if "-of-" in one.stem)])

    beside = ("tokenizer*.json", "chat_template*")
    folder = fetch(repository, (*wanted, *beside), is_complete, "name a file that is there")
    files = [one for one in matching(folder) if "-of-" not in one.stem or "-00001-of-" in one.stem]
    if len(files) != 1:
        names = ", ".join(str(one.relative_to(folder)) for one in files) or "none"
        raise CheckpointError(f"{name} stands for one GGUF file, and there is {names}; give the file's whole name.")
    return files[0]


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
