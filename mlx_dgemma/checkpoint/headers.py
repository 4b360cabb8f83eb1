"""The headers of safetensors files: which tensors a checkpoint holds and where, without reading any of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError
from ..model.config import read_json

INDEX = "model.safetensors.index.json"
FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}

_DTYPES = {**FLOATS, "U32": mx.uint32, "U8": mx.uint8}


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
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file} is truncated: its header is cut off; download it again.")
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


def read_tensors(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, checked against its index.

    Raises:
        CheckpointError: a shard is missing, truncated or not in the index, or a tensor is in the index and in no
            shard, or in a shard and not in the index.
    """
    files = sorted(path.glob("*.safetensors"))
    if not (path / INDEX).exists():
        if not files:
            raise CheckpointError(
                f"{path} holds no .safetensors file; point at a folder that holds a whole checkpoint."
            )
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} shards but no {INDEX}; download the index.")
        return read_header(files[0])
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{path / INDEX} has no weight_map; download it again.")
    named = {path / name for name in index.values()}
    if stray := sorted(set(files) - named):
        raise CheckpointError(f"The shard {stray[0]} is not in {INDEX}; remove it or download the index again.")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(named):
        tensors.update(read_header(file))
    for name, shard in index.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{INDEX} names the tensor {name}, but {shard} does not hold it; download both again."
            )
    if extra := sorted(set(tensors) - set(index)):
        raise CheckpointError(
            f"{tensors[extra[0]].file} holds {extra[0]}, which {INDEX} does not name; download both again."
        )
    return tensors
