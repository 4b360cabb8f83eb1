"""Random weights in other programs' formats, at the release's sizes, for `bench/convert.py --format`."""

import json
import re
from math import prod
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

CHUNK = 64 * 2**20  # bytes written at a time
MATRICES = re.compile(r".*\.(self_attn\.\w+_proj|mlp\.\w+_proj|experts\.\w+_proj)\.weight")


def fill(stream, nbytes: int, code: np.ndarray) -> None:
    """Write so many bytes, repeating a block."""
    while nbytes:
        count = min(nbytes, len(code))
        stream.write(code[:count])
        nbytes -= count


def blocks() -> dict[str, np.ndarray]:
    """Bytes of each kind of tensor: any codes, scales near 1, and floats near 0."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, CHUNK // 4).astype(np.float32).view(np.uint32)
    return {
        "codes": rng.integers(0, 256, CHUNK, dtype=np.uint8),
        "fp8": rng.integers(0, 120, CHUNK, dtype=np.uint8),
        "BF16": (noise >> 16).astype(np.uint16).view(np.uint8),
        "F32": np.full(CHUNK // 4, 0.01, np.float32).view(np.uint8),
    }


def nvfp4(name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...], str]]:
    """(tensor, dtype, shape, kind of bytes) of a weight; experts one by one."""
    if not MATRICES.fullmatch(name):
        return [(name, "BF16", shape, "BF16")]
    path = name.removesuffix(".weight")
    paths, rows = [path], shape[0]
    if len(shape) == 3:
        kinds = ("gate", "up") if "gate_up" in path else ("down",)
        rows = shape[1] // len(kinds)
        paths = [f"{path.rpartition('.')[0]}.{e}.{kind}_proj" for e in range(shape[0]) for kind in kinds]
    parts = []
    for one in paths:
        parts.append((f"{one}.weight", "U8", (rows, shape[-1] // 2), "codes"))
        parts.append((f"{one}.weight_scale", "F8_E4M3", (rows, shape[-1] // 16), "fp8"))
        parts += [(f"{one}.{scale}", "F32", (), "F32") for scale in ("weight_scale_2", "input_scale")]
    return parts


def fp8(name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...], str]]:
    """The same at a byte a weight and a scale a row."""
    parts = []
    for tensor, dtype, size, kind in nvfp4(name, shape):
        if dtype == "U8":
            parts.append((tensor, "F8_E4M3", (size[0], size[1] * 2), "fp8"))
            parts.append((f"{tensor}_scale", "F32", (size[0], 1), "F32"))
        elif dtype == "BF16":
            parts.append((tensor, dtype, size, kind))
    return parts


FORMATS = {
    "modelopt-nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "compressed-fp8": (fp8, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
}
_ITEM = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


def make_foreign(folder: Path, form: str, model) -> int:
    """Write model.safetensors beside the config.json that is there, to which the format is added; returns bytes."""
    parts_of, declared = FORMATS[form]
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": declared}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = []
    for name, array in tree_flatten(model.parameters()):
        tensors += parts_of(name, array.shape)
    header, at = {}, 0
    for name, dtype, shape, _ in tensors:
        size = prod(shape) * _ITEM[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = blocks()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape, kind in tensors:
            fill(stream, prod(shape) * _ITEM[dtype], content[kind])
    return at


# ggml's codes: the release's mixture of Q4_K_M, Q8_0 where 256 does not divide a row, and F32 for vectors.
def gguf_kind(name: str, shape: tuple[int, ...]) -> str:
    """The type of a tensor."""
    if len(shape) < 2 or "router" in name:
        return "F32"
    return "Q8_0" if shape[-1] % 256 else "Q6_K" if "embed_tokens" in name else "Q4_K"


def gguf_codes(kind: str, nbytes: int) -> np.ndarray:
    """Random blocks of a type, whose float16 scales are small numbers."""
    rng = np.random.default_rng(0)
    size, places = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,)), "Q8_0": (34, (0,))}[kind]
    data = rng.integers(0, 256, (nbytes // size + 1, size), dtype=np.uint8)
    for place in places:
        data[:, place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return data.reshape(-1)


def make_gguf(file: Path, config: dict, model, tokenizer: Path) -> int:
    """Write a GGUF file with the names and types of the release's; returns its bytes. Needs tests/ on the path."""
    from gguf import GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf_files import add_sizes, add_tokenizer, gguf_name

    writer = GGUFWriter(str(file), "diffusion-gemma")
    add_sizes(writer, config["text_config"])
    writer.add_uint32("diffusion.canvas_length", config["canvas_length"])
    add_tokenizer(writer, tokenizer)
    pairs = config["text_config"]["global_head_dim"] // 2
    tensors = [("rope_freqs.weight", (pairs,), "F32")]
    for name, array in tree_flatten(model.parameters()):
        if not re.search(r"\.(vision_tower|embed_vision)\.", name):
            tensors.append((gguf_name(name), array.shape, gguf_kind(name, array.shape)))
    sizes = []
    for name, shape, kind in tensors:
        number = GGMLQuantizationType[kind]
        block, nbytes = GGML_QUANT_SIZES[number]
        sizes.append(prod(shape) // block * nbytes)
        writer.add_tensor_info(name, list(shape), np.dtype(np.float32), sizes[-1], raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    content = {kind: gguf_codes(kind, CHUNK) for kind in ("Q4_K", "Q6_K", "Q8_0")}
    content["F32"] = np.full(CHUNK // 4, 0.01, np.float32).view(np.uint8)
    with file.open("ab") as stream:
        for (name, _, kind), size in zip(tensors, sizes):
            stream.write(b"\0" * (-stream.tell() % 32))
            if name == "rope_freqs.weight":
                stream.write(np.array([1] * (pairs // 4) + [1e30] * (pairs - pairs // 4), np.float32).tobytes())
            else:
                fill(stream, size, content[kind])
    return file.stat().st_size
