"""What a machine cannot beat: the arithmetic of a denoising step and the bytes that it must read."""

import mlx.core as mx
from report import GIB

from mlx_dgemma.model.config import ModelConfig, VisionConfig

# device name: (GB/s, TFLOP/s of dense 16-bit matrix products). Apple's are the largest bins, from core counts
# and clocks; M5's with its neural accelerators, the base chip's measured, the others scaled from it.
DEVICES = {
    "H100": (3350, 989), "H200": (4800, 989),
    "Apple M1": (68, 2.6), "Apple M1 Pro": (200, 5.2), "Apple M1 Max": (400, 10.4), "Apple M1 Ultra": (800, 21.2),
    "Apple M2": (100, 3.6), "Apple M2 Pro": (200, 6.8), "Apple M2 Max": (400, 13.6), "Apple M2 Ultra": (800, 27.2),
    "Apple M3": (100, 3.5), "Apple M3 Pro": (150, 6.4), "Apple M3 Max": (400, 14.2), "Apple M3 Ultra": (819, 28.4),
    "Apple M4": (120, 4.3), "Apple M4 Pro": (273, 9.2), "Apple M4 Max": (546, 18.4),
    "Apple M5": (153, 15.4), "Apple M5 Pro": (307, 30.8), "Apple M5 Max": (614, 61.6),
}  # fmt: skip


def step_flops(config: ModelConfig, prefix: int) -> dict[str, float]:
    """FLOPs of one denoising step behind `prefix` positions, by part; a multiplication and an addition are two."""
    text, rows = config.text, config.canvas_length
    hidden, heads = text.hidden_size, text.num_attention_heads
    projections = scores = 0
    for kind in text.layer_types:
        full = kind == "full_attention"
        kv_heads, dim = text.kv_shape(kind)
        # Full layers have no values of their own: their keys serve as both.
        projections += 2 * rows * hidden * dim * (2 * heads + (1 if full else 2) * kv_heads)
        scores += 4 * rows * heads * dim * (_kept(text, kind, prefix) + rows)
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


def kv_bytes(config: ModelConfig, prefix: int, itemsize: int) -> int:
    """Keys and values of `prefix` positions that a canvas attends to."""
    total = 0
    for kind in config.text.layer_types:
        heads, dim = config.text.kv_shape(kind)
        total += 2 * heads * dim * itemsize * _kept(config.text, kind, prefix)
    return total


def _kept(text, kind: str, prefix: int) -> int:
    return prefix if kind == "full_attention" else min(prefix, text.sliding_window - 1)


def look_flops(tower: VisionConfig, patches: int, text_hidden: int) -> dict[str, float]:
    """FLOPs of looking at one picture of so many patches, by part."""
    hidden, width = tower.hidden_size, tower.num_attention_heads * tower.head_dim
    kv_width = tower.num_key_value_heads * tower.head_dim
    layers = tower.num_hidden_layers
    soft = patches // tower.pooling_kernel_size**2
    return {
        "patch embedding": 2 * patches * 3 * tower.patch_size**2 * hidden,
        "attention projections": layers * 4 * patches * hidden * (width + kv_width),
        "attention scores": layers * 4 * patches**2 * width,
        "MLP": layers * 6 * patches * hidden * tower.intermediate_size,
        "projector": 2 * soft * hidden * text_hidden,
    }


def report(flops: dict[str, float], nbytes: dict[str, float], what: str) -> dict:
    """Print the terms with their totals and, on a known device, the floor; returns all of it."""
    work, read = sum(flops.values()), sum(nbytes.values())
    print(f"ceiling, {what}: {work / 1e12:.4g} TFLOP, {read / GIB:.4g} GiB read")
    print("  TFLOP: " + ", ".join(f"{name} {value / 1e12:.4g} ({value / work:.0%})" for name, value in flops.items()))
    print("  GiB:   " + ", ".join(f"{name} {value / GIB:.4g}" for name, value in nbytes.items()))
    found = {"flops": flops, "total_flops": work, "bytes": nbytes, "total_bytes": read, "floor_ms": None}
    if limits := limits_of(mx.device_info().get("device_name", "")):
        rate, peak = limits
        compute, memory = work / peak / 1e9, read / rate / 1e6
        found.update(compute_ms=compute, bytes_ms=memory, floor_ms=max(compute, memory))
        print(
            f"  floor: {max(compute, memory):.2f} ms (arithmetic {compute:.2f} at {peak:g} TFLOP/s in 16 bit, "
            f"bytes {memory:.2f} at {rate:g} GB/s)"
        )
    return found


def limits_of(device: str) -> tuple[float, float] | None:
    """(GB/s, TFLOP/s) of the longest known name in a device's name."""
    names = [name for name in DEVICES if name in device]
    return DEVICES[max(names, key=len)] if names else None
