"""What a machine cannot beat: the arithmetic of a denoising step and the bytes that it must read."""

import mlx.core as mx
from report import GIB

from mlx_dgemma.check.paper import limits_of
from mlx_dgemma.model.config import VisionConfig


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
