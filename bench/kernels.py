"""Steps and prefill chunks behind a prefix of any length, and the kernels that CUDA runs for them.

    python bench/kernels.py --shape 26b --prefix 1024 65536 131072
    python bench/kernels.py --shape 26b --recipe 4bit --prefix 1024 --plain

The prefix holds random keys and values, so that a long one costs nothing: only the last chunk of a prompt is encoded.
PyTorch's profiler sees the kernels that MLX starts in the same process; it slows the host down, so idle time is an
upper bound. Without CUDA only times and peaks are printed.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from report import GIB, finish, machine, spread
from shapes import add_arguments, from_arguments

from mlx_dgemma.check.shapes import random_prompt
from mlx_dgemma.checkpoint.build import choose_kernels, suit_device
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.prefill import evaluate, prefill
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.kv_cache import Prefix

CHUNK = 1024  # tokens of the prefill that is timed
NEVER = {"confidence_threshold": 0.0, "certainty_threshold": 0.0, "patience": 0}  # a canvas settles


def random_prefix(model: DiffusionGemma, length: int) -> Prefix:
    """A prefix of `length` positions that were never encoded."""
    text, prefix = model.config.text, model.new_prefix()
    for i, (layer, kind) in enumerate(zip(prefix.layers, text.layer_types)):
        heads, dim = text.kv_shape(kind)
        slots = (layer.window_slots or length + CHUNK) + 2 * model.config.canvas_length
        for name in ("keys", "values"):
            drawn = mx.random.normal((1, heads, slots, dim), key=mx.random.key(2 * i + (name == "keys")))
            setattr(layer, name, drawn.astype(model.dtype))
        mx.eval(layer.keys, layer.values)
    prefix.offset = length
    return prefix


def timed(call: Callable[[], object], runs: int) -> tuple[list[float], float]:
    """Milliseconds of each call, and the peak of all in GiB above what is held."""
    call()
    mx.synchronize()
    held, found = mx.get_active_memory(), []
    mx.reset_peak_memory()
    for _ in range(runs):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e3)
    return found, (mx.get_peak_memory() - held) / GIB


def kernels(call: Callable[[], object], runs: int) -> dict[str, tuple[float, float]]:
    """Launches of every kernel a call, and its milliseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.init()
    mx.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            call()
        mx.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            found[event.name].append(event.device_time_total / 1e3)
    return {name: (len(each) / runs, sum(each) / runs) for name, each in found.items()}


def of_a_step(model: DiffusionGemma, prompt: mx.array, top: int = 12) -> dict:
    """How many kernels a step behind a prompt launches, and the milliseconds that they and messages among them take."""
    prefix = model.new_prefix()
    prefill(model, prefix, np.asarray(prompt), None)
    steps = denoise_block(model, prefix, GenerationOptions(max_denoising_steps=20, **NEVER), mx.random.key(1)[None])
    for _ in range(3):
        next(steps)
    found = kernels(lambda: next(steps), 4)
    launches, busy = (sum(one[i] for one in found.values()) for i in (0, 1))
    messages = sum(spent for name, (_, spent) in found.items() if "nccl" in name.lower())
    slowest = sorted(
        ((round(spent, 2), round(count), name[:80]) for name, (count, spent) in found.items()), reverse=True
    )
    figures = {"launches": round(launches), "busy_ms": round(busy, 2), "messages_ms": round(messages, 2)}
    return {**figures, "top": slowest[:top]}


def measure(model: DiffusionGemma, prompt: mx.array, length: int, args: argparse.Namespace) -> dict:
    """A prefill chunk and a step behind `length` positions."""
    prefix, row = random_prefix(model, length), {"prefix": length}

    def chunk() -> None:
        model.encode(prompt, prefix)
        evaluate(prefix)
        prefix.offset = length

    options = GenerationOptions(max_denoising_steps=10 * args.steps, **NEVER)
    steps = denoise_block(model, prefix, options, mx.random.key(1)[None])
    for name, call in (("chunk", chunk), ("step", lambda: next(steps))):
        ms, peak = timed(call, args.steps)
        row[name] = {"ms": spread(ms), "peak_gib": round(peak, 3)}
        print(f"{name} at {length}: {np.median(ms):.1f} ms ({min(ms):.1f}-{max(ms):.1f}), peak {peak:.3f} GiB")
        if mx.cuda.is_available():
            by_kernel = kernels(call, 3)
            launches, busy = (sum(one[i] for one in by_kernel.values()) for i in (0, 1))
            row[name].update(launches=round(launches), busy_ms=round(busy, 2))
            print(f"  {launches:.0f} launches, {busy:.2f} ms busy")
            for kernel, (count, spent) in sorted(by_kernel.items(), key=lambda one: -one[1][1])[: args.top]:
                print(f"  {spent:9.3f} ms {count:7.1f}  {kernel[:100]}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="without custom kernels")
    parser.add_argument("--top", type=int, default=15, help="kernels that are printed")
    args = parser.parse_args()
    found = machine()
    raw, dtype, model = from_arguments(args)
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    model.uses_kernels = model.uses_kernels and not args.plain
    print(f"shape {args.shape}, {args.recipe or dtype}, custom kernels: {model.uses_kernels}")
    prompt = random_prompt(raw, CHUNK)
    rows = [measure(model, prompt, length, args) for length in args.prefix]
    finish("kernels", **found, config=raw, recipe=args.recipe, dtype=dtype, kernels=model.uses_kernels, rows=rows)


if __name__ == "__main__":
    main()
