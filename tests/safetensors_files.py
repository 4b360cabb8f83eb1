"""Safetensors files read and written byte by byte, without the package's own reader."""

import hashlib
import json
from pathlib import Path

INDEX = "model.safetensors.index.json"


def read_safetensors(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """{name: (dtype, shape, bytes)}, read without the package's own reader."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = memoryview(content)[8 + length :]
    return {
        name: (one["dtype"], one["shape"], bytes(data[slice(*one["data_offsets"])])) for name, one in header.items()
    }


def write_safetensors(file: Path, tensors: dict[str, tuple[str, list[int], bytes]], form: str = "pt") -> None:
    """Write tensors in the order given, as the safetensors library does."""
    header, at = {"__metadata__": {"format": form}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))


def read_folder(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors of a checkpoint folder."""
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in read_safetensors(file).items()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
