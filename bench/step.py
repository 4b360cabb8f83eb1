"""Time of one denoising step, beside mlx-vlm's on the same weights where it is installed.

    python bench/step.py                                   # a small shape, for a CPU
    python bench/step.py --shape 26b --recipe 4bit --prefix 1024 8192      # a GPU

A step is everything between two canvases: forward, head, temperature, argmax, entropy, acceptance,
sample, noise, stop rule, self-conditioning. Weights are random (a step's time does not depend on
them), so the stop rule is never met. Prints the median of each and a last line of JSON.
"""

import argparse
import json
import statistics
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_dgemma.checkpoint import DTYPES, suit_device
from mlx_dgemma.config import ModelConfig
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.generate import GenerationOptions, denoise_block, prefill
from mlx_dgemma.model import DiffusionGemma

SHAPES = {
    "26b": {},
    "small": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "global_head_dim": 128,
        "num_global_key_value_heads": 2, "sliding_window": 256, "num_experts": 16, "top_k_experts": 4,
        "moe_intermediate_size": 128,
    },
}  # fmt: skip


def raw_config(shape: str, layers: int | None) -> dict:
    """config.json of a shape; the release's where a size is not given."""
    text = {"model_type": "diffusion_gemma_text", "num_hidden_layers": 30, "num_global_key_value_heads": 2,
            "global_head_dim": 512, "use_bidirectional_attention": "vision", **SHAPES[shape]}  # fmt: skip
    if layers:
        text["num_hidden_layers"] = layers
    return {"model_type": "diffusion_gemma", "canvas_length": 256 if shape == "26b" else 64, "text_config": text}


def random_model(raw: dict, dtype: mx.Dtype, recipe: str | None) -> DiffusionGemma:
    """A model of random weights, quantized by a recipe."""
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    keys = iter(mx.random.split(mx.random.key(0), 4096))

    def fill(path: str, a: mx.array) -> mx.array:
        key = next(keys)
        if a.ndim < 2:
            return mx.ones(a.shape, dtype)
        return (mx.random.normal(a.shape, key=key, dtype=dtype) * a.shape[-1] ** -0.5).astype(dtype)

    model.update(tree_map_with_path(fill, model.parameters()))
    quantize(model, recipe)
    mx.eval(model.parameters())
    return model


def quantize(model: nn.Module, recipe: str | None) -> None:
    """Give both runtimes the same quantized modules."""
    if recipe is None:
        return
    rules = RECIPES[recipe]

    def choose(path: str, module: nn.Module):
        if not hasattr(module, "to_quantized"):
            return False
        return rules.quantization(path, module.weight.shape[-1]) or False

    nn.quantize(model, class_predicate=choose)


def ours(model: DiffusionGemma, prompt: mx.array, steps: int):
    """(seconds of each step, seconds of prefill, peak bytes)."""
    options = GenerationOptions(confidence_threshold=0.0, max_denoising_steps=steps)
    prefix = model.new_prefix(capacity=prompt.shape[1] + 2 * model.config.canvas_length)
    mx.reset_peak_memory()
    started = time.perf_counter()
    prefill(model, prefix, np.asarray(prompt), options.prefill_chunk)
    encoded = time.perf_counter() - started
    times, last = [], time.perf_counter()
    for _ in denoise_block(model, prefix, options, mx.random.key(1)[None]):
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    return times, encoded, mx.get_peak_memory()


def peer(raw: dict, weights: list, recipe: str | None, prompt: mx.array, steps: int):
    """The same of mlx-vlm: its model and the parts of its entropy-bound loop, in its order."""
    from mlx_vlm.generate import diffusion as loop
    from mlx_vlm.models.diffusion_gemma.config import ModelConfig as PeerConfig
    from mlx_vlm.models.diffusion_gemma.diffusion_gemma import Model

    model = Model(PeerConfig.from_dict(raw))
    quantize(model, recipe)
    model.load_weights(weights)
    vocab, length = raw_vocab(model), raw["canvas_length"]
    mx.reset_peak_memory()
    started = time.perf_counter()
    cache = model.diffusion_prefill_cache(prompt, cache=model.make_cache(), prefill_step_size=2048, chunk_prefill=True)
    mx.eval([c.state for c in cache])
    encoded = time.perf_counter() - started
    context = model.diffusion_prepare_self_conditioning()
    canvas = loop._diffusion_initialize_canvas(1, length, vocab, mx.int32)
    masks = model.diffusion_decoder_masks(canvas, cache)
    conditioning, history = None, []
    stopping = {"stability_threshold": 1, "confidence_threshold": 0.0}
    times, last = [], time.perf_counter()
    for step in range(steps, 0, -1):
        logits = model.diffusion_decoder_logits(
            canvas, cache=cache, self_conditioning=conditioning, decoder_attention_mask=masks
        )
        logits = logits / loop._diffusion_linear_temperature(step, steps, {"t_min": 0.4, "t_max": 0.8})
        best = mx.argmax(logits, axis=-1).astype(mx.int32)
        drawn = loop._diffusion_sample_canvas(logits, mx.int32, 1.0)
        accepted = loop._diffusion_entropy_transfer_mask(loop._diffusion_token_entropy(logits), 0.1)
        following = model.diffusion_self_conditioning(logits, context)
        canvas = mx.where(accepted, drawn, loop._diffusion_initialize_canvas(1, length, vocab, mx.int32))
        loop._diffusion_stable_and_confident(best, logits, history, stopping)
        conditioning = following
        mx.eval(canvas, best, conditioning)
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    return times, encoded, mx.get_peak_memory()


def raw_vocab(model: nn.Module) -> int:
    return model.config.text_config.vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers")
    parser.add_argument("--recipe", choices=RECIPES, help="quantize (default: as --dtype says)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024], help="prompt tokens")
    parser.add_argument("--steps", type=int, default=12, help="steps timed; the first two are warm-up")
    parser.add_argument("--no-peer", action="store_true", help="leave mlx-vlm out")
    args = parser.parse_args()
    cpu = mx.default_device() == mx.cpu
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    raw = raw_config(args.shape, args.layers)
    model = random_model(raw, DTYPES[dtype], args.recipe)
    weights = tree_flatten(model.parameters())
    held = sum(a.nbytes for _, a in weights)
    suit_device(model)
    mx.eval(model.parameters())
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(f"{device}, {args.shape}, {args.recipe or dtype}, weights {held / 1e9:.2f} GB, canvas {raw['canvas_length']}")
    runs = {"mlx_dgemma": lambda prompt: ours(model, prompt, args.steps)}
    if not args.no_peer:
        runs["mlx_vlm"] = lambda prompt: peer(raw, weights, args.recipe, prompt, args.steps)
    rows = []
    for length in args.prefix:
        prompt = mx.random.randint(0, model.config.text.vocab_size, (1, length), key=mx.random.key(2))
        row: dict = {"prefix": length}
        for name, run in runs.items():
            run(prompt)  # warm-up: kernels, allocator
            times, encoded, peak = run(prompt)
            row[name] = {
                "step_ms": round(statistics.median(times[2:]) * 1e3, 2),
                "worst_ms": round(max(times[2:]) * 1e3, 2),
                "prefill_ms": round(encoded * 1e3, 1),
                "peak_over_weights_gb": round((peak - held) / 1e9, 2),
            }
            print(f"prefix {length:>6}  {name:<11}", *(f"{key} {value:>9}" for key, value in row[name].items()))
        if "mlx_vlm" in row:
            row["ratio"] = round(row["mlx_dgemma"]["step_ms"] / row["mlx_vlm"]["step_ms"], 3)
            print(f"prefix {length:>6}  ours takes {row['ratio']:.2f} of mlx-vlm's step")
        rows.append(row)
    print(
        json.dumps(
            {
                "bench": "step",
                "device": device,
                "shape": args.shape,
                "recipe": args.recipe,
                "dtype": dtype,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
