"""The headers of safetensors files: which tensors a checkpoint holds and where, without reading any of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..model.config import read_json, refuse_pointer
from .weights import is_copy

INDEX = "model.safetensors.index.json"
VISION = "optiq_vision.safetensors"  # OptiQ's file of the vision tower
FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: its bytes are file[start:end]."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, U32, ...
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors in the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or is shorter than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(32)
            refuse_pointer(file, start)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file} is truncated: its header is cut off; download it again.")
            stream.seek(8)
            header = json.loads(stream.read(length))
        tensors = {
            name: TensorInfo(file, one["dtype"], tuple(one["shape"]), *(8 + length + at for at in one["data_offsets"]))
            for name, one in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"The shard {file} is missing; download it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file} is not a safetensors file; download it again.") from None
    end = max((info.end for info in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(f"{file} is truncated: it has {size} of {end} bytes; download it again.")
    return tensors


def weight_files(path: Path) -> list[Path]:
    """A folder's safetensors files. macOS leaves `._*` files beside others on disks that are not its own."""
    return sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("._"))


def read_tensors(path: Path, notes: list[str] | None = None) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, checked against its index if it has one.

    Args:
        path: the folder.
        notes: takes a sentence about files that are not read.

    Raises:
        CheckpointError: a shard is missing or truncated, a tensor is in the index and in no shard, or in a shard and
            not in the index (copies of tied weights may be), or there is no index and the files are not one set.
    """
    notes = [] if notes is None else notes
    files = weight_files(path)
    if (path / INDEX).exists():
        tensors, used = _read_indexed(path)
    elif files:
        used = _one_set(path, files)
        tensors = _read_all(used)
    else:
        way = "point at a folder that holds a whole checkpoint"
        if any(path.glob("*.gguf")):
            way = "convert its GGUF file first: mlx-dgemma convert FILE.gguf --mlx-path NAME -q"
        raise CheckpointError(f"{path} holds no .safetensors file; {way}.")
    towers = [file for file in (path / "optiq" / VISION, path / VISION) if file.exists() and file not in used]
    if towers and not any("vision_tower." in name for name in tensors):
        used = [*used, towers[0]]
        tensors |= read_header(towers[0])
    if stray := sorted(file.name for file in set(files) - set(used)):
        why = f"not in {INDEX}" if (path / INDEX).exists() else "not one of the shards"
        notes.append(f"{', '.join(stray)} {'is' if len(stray) == 1 else 'are'} {why} and not read.")
    return tensors


def _one_set(path: Path, files: list[Path]) -> list[Path]:
    """The weights of a folder without index: a numbered set, model.safetensors, or the only file."""
    numbered = {file: found for file in files if (found := _SHARD.fullmatch(file.name))}
    sets = {(found[1], int(found[3])) for found in numbered.values()}
    whole = path / "model.safetensors"
    if len(sets) > 1 or (sets and whole in files):
        kinds = [*sorted(f"{stem}-*-of-{count:05d}" for stem, count in sets), *([whole.stem] if whole in files else [])]
        raise CheckpointError(
            f"{path} has no {INDEX} and holds the weights of {' and of '.join(kinds)}; remove all but one."
        )
    if sets:
        [(stem, count)] = sets
        there = {int(found[2]) for found in numbered.values()}
        if lost := sorted(set(range(1, count + 1)) - there):
            raise CheckpointError(
                f"The shard {path / f'{stem}-{lost[0]:05d}-of-{count:05d}.safetensors'} is missing; download it again."
            )
        return list(numbered)
    if whole in files:
        return [whole]
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} shards but no {INDEX}; download the index.")
    return files


def _read_all(files: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{tensors[name].file} and {file} both hold {name}; remove the stray one.")
            tensors[name] = info
    return tensors


def _read_indexed(path: Path) -> tuple[dict[str, TensorInfo], list[Path]]:
    """(tensors, files) that an index names."""
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{path / INDEX} has no weight_map; download it again.")
    files = sorted({path / name for name in index.values()})
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(read_header(file))
    for name, shard in index.items():
        if name not in tensors and is_copy(name):  # a tied weight, which is saved once
            continue
        if name not in tensors or tensors[name].file != path / shard:
            raise CheckpointError(
                f"{INDEX} names the tensor {name}, but {shard} does not hold it; download both again."
            )
    if extra := sorted(name for name in set(tensors) - set(index) if not is_copy(name)):
        raise CheckpointError(
            f"{tensors[extra[0]].file} holds {extra[0]}, which {INDEX} does not name; download both again."
        )
    return tensors, files
