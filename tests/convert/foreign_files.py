"""Weights as other programs store them, made of arrays: each function gives the tensors and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors_files import write_safetensors

Stored = dict[str, tuple[str, list[int], bytes]]  # {part: (dtype, shape, bytes)}
Encoded = tuple[Stored, np.ndarray]
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def e4m3_values() -> np.ndarray:
    """The 127 values from 0 to 448, by their codes."""
    small = [mantissa / 512 for mantissa in range(8)]
    large = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return np.array((small + large)[:127], np.float32)


FP8 = e4m3_values()


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The index of the nearest of ascending values."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, values).astype(np.uint8)


def signed(values: np.ndarray, table: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, what they stand for)."""
    codes = nearest(np.abs(values), table)
    return codes | np.where(values < 0, sign, 0).astype(np.uint8), np.copysign(table[codes], values)


def raw(array: np.ndarray, dtype: str) -> tuple[str, list[int], bytes]:
    return dtype, list(array.shape), np.ascontiguousarray(array).tobytes()


def f32(value) -> tuple[str, list[int], bytes]:
    return raw(np.asarray(value, np.float32), "F32")


def bf16(array: np.ndarray) -> np.ndarray:
    """Cut to bfloat16, as float32."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def raw_bf16(array: np.ndarray) -> tuple[str, list[int], bytes]:
    return raw((np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16), "BF16")


def _fp4(weight: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed codes, values) of groups with these scales."""
    groups = weight.reshape(len(weight), scales.shape[1], -1)
    codes, values = signed(groups / scales[..., None], FP4, 8)
    codes = codes.reshape(len(weight), -1)
    return codes[:, ::2] | codes[:, 1::2] << 4, (values * scales[..., None]).reshape(weight.shape)


def _nvfp4_scales(weight: np.ndarray) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """(codes of the scales, the factor, the scales as floats)."""
    largest = np.abs(weight.reshape(len(weight), -1, 16)).max(axis=2)
    factor = np.float32(largest.max() / (6 * 448))
    codes = np.maximum(nearest(largest / 6 / factor, FP8), 1)
    return codes, factor, FP8[codes] * factor


def modelopt_nvfp4(weight: np.ndarray) -> Encoded:
    codes, factor, scales = _nvfp4_scales(weight)
    packed, values = _fp4(weight, scales)
    stored = {"weight": raw(packed, "U8"), "weight_scale": raw(codes, "F8_E4M3"), "weight_scale_2": f32(factor)}
    return {**stored, "input_scale": f32(0.02)}, values


def packed_nvfp4(weight: np.ndarray) -> Encoded:
    codes, factor, scales = _nvfp4_scales(weight)
    packed, values = _fp4(weight, scales)
    stored = {"weight_packed": raw(packed, "U8"), "weight_scale": raw(codes, "F8_E4M3")}
    return {**stored, "weight_global_scale": f32([1 / factor]), "input_global_scale": f32([3])}, values


def packed_mxfp4(weight: np.ndarray) -> Encoded:
    largest = np.abs(weight.reshape(len(weight), -1, 32)).max(axis=2)
    exponents = np.floor(np.log2(largest)) - 2
    packed, values = _fp4(weight, (2.0**exponents).astype(np.float32))
    scale = raw((exponents + 127).astype(np.uint8), "U8")
    return {"weight_packed": raw(packed, "U8"), "weight_scale": scale}, values


def modelopt_fp8(weight: np.ndarray) -> Encoded:
    scale = np.float32(np.abs(weight).max() / 448)
    codes, values = signed(weight / scale, FP8, 128)
    return {"weight": raw(codes, "F8_E4M3"), "weight_scale": f32(scale), "input_scale": f32(1)}, values * scale


def channel_fp8(weight: np.ndarray) -> Encoded:
    scale = bf16(np.abs(weight).max(axis=1, keepdims=True) / 400)
    codes, values = signed(weight / scale, FP8, 128)
    return {"weight": raw(codes, "F8_E4M3"), "weight_scale": raw_bf16(scale)}, values * scale


BLOCK = (48, 32)


def block_fp8(weight: np.ndarray) -> Encoded:
    high, wide = (-(-n // size) for n, size in zip(weight.shape, BLOCK))
    scale = np.zeros((high, wide), np.float32)
    full = np.zeros_like(weight)
    for i in range(high):
        for j in range(wide):
            at = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            full[at] = scale[i, j] = np.abs(weight[at]).max() / 448
    codes, values = signed(weight / full, FP8, 128)
    return {"weight": raw(codes, "F8_E4M3"), "weight_scale": f32(scale)}, values * full


def channel_int8(weight: np.ndarray) -> Encoded:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float32)
    codes = np.round(weight / scale).astype(np.int8)
    return {"weight": raw(codes, "I8"), "weight_scale": f32(scale)}, codes * scale


def pack_bits(codes: np.ndarray, bits: int) -> tuple[str, list[int], bytes]:
    """Unsigned codes, row by row, into 32-bit words: bit by bit, from the lowest."""
    every = (codes[:, :, None] >> np.arange(bits)) & 1
    every = every.reshape(len(codes), -1)
    every = np.pad(every, ((0, 0), (0, -every.shape[1] % 32))).reshape(len(codes), -1, 32)
    words = (every.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=2)
    return raw(words.astype(np.uint32), "I32")


def packed_int(bits: int, group: int, zeros: bool = False, ordered: bool = False):
    """compressed-tensors' pack-quantized integers."""

    def encode(weight: np.ndarray) -> Encoded:
        width = weight.shape[1]
        owner = np.arange(width) // group
        if ordered:  # activation ordering: a column's group is told
            owner = np.random.default_rng(0).permutation(owner)
        count, half = width // group, 1 << (bits - 1)
        low, high = (
            np.stack([pick(weight[:, owner == g], axis=1) for g in range(count)], axis=1) for pick in (np.min, np.max)
        )
        if zeros:
            scale = bf16((high - low) / (2 * half - 1))
            zero = np.clip(np.round(-low / scale), 0, 2 * half - 1)
        else:
            scale = bf16(np.maximum(high, -low) / (half - 0.5))
            zero = np.full_like(scale, half)
        codes = np.clip(np.round(weight / scale[:, owner]) + zero[:, owner], 0, 2 * half - 1)
        values = (codes - zero[:, owner]) * scale[:, owner]
        stored = {"weight_packed": pack_bits(codes.astype(np.uint8), bits), "weight_scale": raw_bf16(scale)}
        stored["weight_shape"] = raw(np.array(weight.shape, np.int64), "I64")
        if zeros:
            dtype, (high_, wide), data = pack_bits(zero.T.astype(np.uint8), bits)
            turned = np.frombuffer(data, np.uint32).reshape(high_, wide).T
            stored["weight_zero_point"] = raw(turned, dtype)
        if ordered:
            stored["weight_g_idx"] = raw(owner.astype(np.int32), "I32")
        return stored, values.astype(np.float32)

    return encode


def write_foreign(folder: Path, source: Path, weights: dict[str, np.ndarray], encode, config: dict, **how) -> dict:
    """Write a checkpoint whose matrices are encoded; returns {parameter: what it stands for}.

    Args:
        folder: to be made.
        source: a folder with config.json and tokenizer files.
        weights: {parameter: float32 values}, experts together.
        encode: gives the tensors of a matrix.
        config: keys that are added to config.json.
        how: `prefix` of the experts ("experts" or "moe.experts"), `kept`: ends of modules that stay floats,
            `fused`: experts in one tensor.
    """
    kept = how.get("kept", ("router.proj.weight", "embed_tokens.weight"))
    stored: Stored = {}
    meaning = {}
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        if weight.ndim < 2 or name.endswith(kept) or ".vision_tower." in name or ".embed_vision." in name:
            meaning[name] = bf16(weight)
            stored[name] = raw_bf16(weight)
        elif weight.ndim == 2 or how.get("fused"):
            tensors, values = encode(weight.reshape(-1, weight.shape[-1]))
            meaning[name] = values.reshape(weight.shape)
            for part, (dtype, shape, data) in tensors.items():
                lead = list(weight.shape[:-1]) if len(shape) > 1 and shape[0] == weight[..., 0].size else shape[:-1]
                stored[f"{path}.{part}"] = (dtype, [*lead, *shape[-1:]], data)
        else:
            kinds = ("gate", "up") if path.endswith("gate_up_proj") else ("down",)
            found = [[] for _ in weight]
            for e, expert in enumerate(weight):
                for kind, half in zip(kinds, np.split(expert, len(kinds))):
                    tensors, values = encode(half)
                    found[e].append(values)
                    base = path.rpartition(".experts.")[0] + f".{how.get('prefix', 'experts')}.{e}.{kind}_proj"
                    stored |= {f"{base}.{part}": one for part, one in tensors.items()}
            meaning[name] = np.stack([np.concatenate(parts) for parts in found])
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    whole = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(whole))
    order = np.random.default_rng(1).permutation(sorted(stored))  # experts lie in no order
    write_safetensors(folder / "model.safetensors", {name: stored[name] for name in map(str, order)})
    return meaning
