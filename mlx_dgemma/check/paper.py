"""The paper model of a denoising step: its arithmetic, its bytes, and how much of a chip's peak reaches them.

It was made from MLX's sources and other people's measurements, not on these machines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..model.config import ModelConfig, TextConfig

# device name: (GB/s, TFLOP/s of dense 16-bit matrix products). Apple's are the largest bins, from core counts
# and clocks; M5's with its neural accelerators, the base chip's measured, the others scaled from it.
DEVICES: dict[str, tuple[float, float]] = {
    "H100": (3350, 989), "H200": (4800, 989),
    "Apple M1": (68, 2.6), "Apple M1 Pro": (200, 5.2), "Apple M1 Max": (400, 10.4), "Apple M1 Ultra": (800, 21.2),
    "Apple M2": (100, 3.6), "Apple M2 Pro": (200, 6.8), "Apple M2 Max": (400, 13.6), "Apple M2 Ultra": (800, 27.2),
    "Apple M3": (100, 3.5), "Apple M3 Pro": (150, 6.4), "Apple M3 Max": (400, 14.2), "Apple M3 Ultra": (819, 28.4),
    "Apple M4": (120, 4.3), "Apple M4 Pro": (273, 9.2), "Apple M4 Max": (546, 18.4),
    "Apple M5": (153, 15.4), "Apple M5 Pro": (307, 30.8), "Apple M5 Max": (614, 61.6),
}  # fmt: skip


class Efficiency(NamedTuple):
    """Shares of a chip's peak arithmetic that the parts of a step reach."""

    products: float  # dense and quantized products of a canvas, in bfloat16
    experts: float  # of useful rows: tiles that experts do not fill are computed too
    scores: float  # attention, which is not fused for these head sizes
    half: float | None = None  # products in float16, where they are faster than in bfloat16


FILLED = 0.8 * 0.68  # grouped products beside plain ones, and the useful rows of their tiles
EFFICIENCY = {
    "Apple M1": Efficiency(0.43, 0.43 * FILLED, 0.50, 0.76),
    "Apple M2": Efficiency(0.43, 0.43 * FILLED, 0.50, 0.76),
    "Apple M3": Efficiency(0.70, 0.70 * FILLED, 0.64),
    "Apple M4": Efficiency(0.70, 0.70 * FILLED, 0.64),
    "Apple M5": Efficiency(0.55, 0.40, 0.38),
}
TILE = {"Apple M5": 32}  # rows of an expert that are computed at once; 16 on the others
ULTRA = 0.8  # what two dies reach of twice one die's arithmetic
BANDWIDTH = 0.78  # usable share of the memory's bandwidth
ACTIVATION_BYTES = 4e9  # of gathers, sums and norms between the products of a step
KERNEL_MS = 0.003  # of a small dependent kernel
BUFFERS, BUFFER_MS = 90, 0.020  # command buffers of a step


class Way(NamedTuple):
    """What a step costs besides products, by the way it is computed."""

    launches: int  # primitives that launch a kernel, as bench/primitives.py counts them
    head_passes: float  # over the head's logits, as if they were float32


PLAIN, WITH_KERNELS = Way(2313, 12.3), Way(1136, 1.5)  # custom kernels read the head's products twice in 16 bits


def paper_step(
    device: str,
    config: ModelConfig,
    prefix: int,
    half: bool = False,
    dense: bool = False,
    way: Way = WITH_KERNELS,
    width: int | None = None,
    weights: int = 0,
) -> dict | None:
    """Milliseconds of one step at the release's shape, by part and in all; None for a device without a model.

    Args:
        device: a device's name.
        config: the model's; `ACTIVATION_BYTES` and the kernels are the release's.
        prefix: positions behind which the canvas stands.
        half: products in float16.
        dense: every position is conditioned on the whole vocabulary, as in a canvas's early steps.
        way: with custom kernels or without.
        width: positions of the canvas that are computed; None: all.
        weights: bytes of the weights that a step reads: it takes no less time than that; 0: not known.
    """
    limits = limits_of(device)
    family = next((name for name in EFFICIENCY if name in device), None)
    if limits is None or family is None:
        return None
    rate, peak = limits
    share = EFFICIENCY[family]
    peak *= ULTRA if "Ultra" in device else 1
    faster = share.half / share.products if half and share.half else 1
    canvas = config.canvas_length
    rows = width or canvas
    flops = step_flops(config, prefix, rows)

    def product_ms(name: str, reached: float) -> float:
        return flops[name] / (peak * reached * 1e9)

    fast = share.products * faster
    logits = 4 * rows * config.text.vocab_size
    parts = {
        # A narrow canvas has fewer rows, but nearly as many tiles.
        "experts": product_ms("experts", share.experts * faster)
        * (_tiles(config.text, family, rows) * canvas)
        / (_tiles(config.text, family, canvas) * rows),
        "attention projections": product_ms("attention projections", fast),
        "attention scores": product_ms("attention scores", share.scores),
        "dense MLP": product_ms("dense MLP", fast),
        "head": product_ms("head", fast) + way.head_passes * logits / (rate * BANDWIDTH * 1e6),
        "activations": ACTIVATION_BYTES * rows / canvas / (rate * BANDWIDTH * 1e6),
        "launches": way.launches * KERNEL_MS + BUFFERS * BUFFER_MS,
    }
    if dense:
        parts["dense self-conditioning"] = product_ms("dense self-conditioning", fast)
    read = weights / (rate * BANDWIDTH * 1e6)
    return {**parts, "sum": max(sum(parts.values()), read + parts["launches"] if weights else 0)}


def floor_ms(device: str, config: ModelConfig, prefix: int, weights: int) -> float | None:
    """Milliseconds that one step at least takes on a known device, by arithmetic and by bytes.

    Args:
        device: its name.
        config: the model's.
        prefix: positions behind which the canvas stands.
        weights: bytes of the weights that a step reads.
    """
    if (limits := limits_of(device)) is None:
        return None
    rate, peak = limits
    nbytes = weights + kv_bytes(config, prefix, 2)
    return max(sum(step_flops(config, prefix).values()) / (peak * 1e9), nbytes / (rate * 1e6))


def limits_of(device: str) -> tuple[float, float] | None:
    """(GB/s, TFLOP/s) of the longest known name in a device's name."""
    names = [name for name in DEVICES if name in device]
    return DEVICES[max(names, key=len)] if names else None


def step_flops(config: ModelConfig, prefix: int, rows: int | None = None) -> dict[str, float]:
    """FLOPs of one denoising step behind `prefix` positions, by part; a multiplication and an addition are two.

    Of a narrow canvas so many `rows` are computed; they see all positions.
    """
    text, canvas = config.text, config.canvas_length
    rows = rows or canvas
    hidden, heads = text.hidden_size, text.num_attention_heads
    projections = scores = 0.0
    for kind in text.layer_types:
        full = kind == "full_attention"
        kv_heads, dim = text.kv_shape(kind)
        # Full layers have no values of their own: their keys serve as both.
        projections += 2 * rows * hidden * dim * (2 * heads + (1 if full else 2) * kv_heads)
        scores += 4 * rows * heads * dim * (_kept(text, kind, prefix) + canvas)
    layers, vocabulary = text.num_hidden_layers, 2 * rows * hidden * text.vocab_size
    mlp = 6 * rows * hidden * text.intermediate_size
    return {
        "attention projections": projections,
        "attention scores": scores,
        "dense MLP": layers * mlp,
        "experts": layers * 6 * rows * hidden * text.moe_intermediate_size * text.top_k_experts,
        "router": layers * 2 * rows * hidden * text.num_experts,
        "head": vocabulary,
        "dense self-conditioning": vocabulary + mlp,
    }


def _tiles(text: TextConfig, family: str, rows: int) -> float:
    """Expected tiles of a grouped product where each row draws its experts evenly."""
    p, height = text.top_k_experts / text.num_experts, TILE.get(family, 16)
    share = [math.comb(rows, n) * p**n * (1 - p) ** (rows - n) for n in range(rows + 1)]
    return text.num_experts * sum(one * -(-n // height) for n, one in enumerate(share))


def kv_bytes(config: ModelConfig, prefix: int, itemsize: int) -> int:
    """Bytes of the keys and values of `prefix` positions that a canvas attends to."""
    total = 0
    for kind in config.text.layer_types:
        heads, dim = config.text.kv_shape(kind)
        total += 2 * heads * dim * itemsize * _kept(config.text, kind, prefix)
    return total


def _kept(text: TextConfig, kind: str, prefix: int) -> int:
    return prefix if kind == "full_attention" else min(prefix, text.sliding_window - 1)
