"""Checkpoints as tests compare and change them."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors_files import INDEX, read_safetensors, write_safetensors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def changed(source: Path, folder: Path, **tensors) -> Path:
    """A copy of a one-shard checkpoint in `folder`, without index, with other tensors; None removes one."""
    shutil.copytree(source, folder)
    (folder / INDEX).unlink()
    stored = read_safetensors(folder / "model.safetensors")
    stored.update(tensors)
    write_safetensors(
        folder / "model.safetensors", {name: one for name, one in stored.items() if one is not None}, "mlx"
    )
    return folder


def floats(one: tuple[str, list[int], bytes]) -> mx.array:
    dtype, shape, data = one
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}[dtype]
    array = mx.array(np.frombuffer(data, kind)).reshape(shape)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def same(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and mx.array_equal(a, b).item()
