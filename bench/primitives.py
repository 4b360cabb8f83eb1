"""How many of MLX's primitives one denoising step, or one token, launches on Metal, counted from its graph.

    python bench/primitives.py --shape 26b                            # the release's shape, 4bit
    python bench/primitives.py --shape 26b --recipe none --canvas 64 --dense 64
    python bench/primitives.py --shape 26b --plain                    # without custom kernels
    python bench/primitives.py --shape 26b --token --recipe none      # a token of causal mode, on CUDA too
    python bench/primitives.py --shape 26b --host                     # what building a step takes this processor

Nothing is computed. The graph is built on the CPU backend with every question about the device answered as Metal
answers it. Weights are zeros that take no memory. Primitives that only describe another view of their input launch
nothing and are not counted; a reshape, a slice or a product of an array that is not contiguous may still copy it, which
a graph does not tell.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_dgemma.check.shapes import SHAPES, quantize, raw_config
from mlx_dgemma.checkpoint.build import DTYPES
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.decoding.canvas import CanvasBatch, Forward
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.decoding.step import fast_step, inputs, plain_step, predict
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma
from mlx_dgemma.model.functions import finite
from mlx_dgemma.model.kv_cache import BUFFER_STEP

# MLX's backend/gpu/primitives.cpp: these share their input's buffer.
VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten NumberOfElements Reshape Slice
    Split Squeeze StopGradient Transpose Unflatten View""".split()
)
# The CPU backend takes mx.fast's functions apart, Metal has a primitive for each. In the graph these stand in for
# them: primitives of one input that keep shape and dtype, that mx.compile fuses with nothing, and that a step has not.
STANDING_IN = {
    "CumMin": "RMSNorm", "CumMax": "RoPE", "CumProd": "ScaledDotProductAttention", "CumLogAddExp": "CustomKernel",
}  # fmt: skip
M4_MAX = {
    "device_name": "Apple M4 Max", "architecture": "applegpu_g16s", "memory_size": 64 * 2**30,
    "max_recommended_working_set_size": 48 * 2**30, "max_buffer_length": 36 * 2**30, "resource_limit": 499000,
}  # fmt: skip


@contextmanager
def answering_as_metal() -> Iterator[None]:
    """Answer the questions that code asks about the device as a Mac would; arrays are still the CPU backend's."""
    new_stream = mx.new_stream
    with (
        patch.object(mx, "new_stream", lambda _: new_stream(mx.cpu)),
        patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        patch.object(mx, "device_info", lambda *_: dict(M4_MAX)),
        patch.object(mx, "set_wired_limit", lambda _: 0),
        patch.object(mx, "is_available", lambda device: True),
        patch.object(mx.metal, "is_available", lambda: True),
    ):
        yield


def is_fused(q: mx.array, k: mx.array, mask: Any, force: bool) -> bool:
    """Whether Metal has one kernel for this attention and takes it, without M5's accelerators.

    `use_fallback` of MLX's scaled_dot_product_attention.cpp.
    """
    heads, length, dim = q.shape[1:]
    kv_heads, count = k.shape[1:3]
    if length <= 8:
        return length <= count and dim in (64, 96, 128, 256) and length * (heads // kv_heads) <= 32
    causal = isinstance(mask, str)
    if dim == 512:
        return causal and length >= 1024 and heads * -(-length // 32) >= 1024
    if dim not in (64, 72, 80, 96, 128, 192, 256) or (causal and length > count):
        return False
    return force or dim < 192 or (dim == 256 and causal and length == count and length >= 2048)


@contextmanager
def as_primitives() -> Iterator[None]:
    """Let mx.fast make one primitive of each function that is one on Metal. The arrays must not be computed."""
    attention = mx.fast.scaled_dot_product_attention

    def rms_norm(x, weight, eps, **_):
        return mx.depends(mx.cummin(x, axis=-1), [] if weight is None else [weight])

    def rope(x, *_, offset=0, freqs=None, **__):
        return mx.depends(mx.cummax(x, axis=-1), [a for a in (offset, freqs) if isinstance(a, mx.array)])

    def sdpa(q, k, v, *, scale, mask=None, force_fused=False, **_):
        if is_fused(q, k, mask, force_fused):
            return mx.depends(mx.cumprod(q, axis=-1), [k, v])
        return attention(q, k, v, scale=scale, mask=mask)

    held = cache(constant)

    def metal_kernel(**_):
        def call(inputs, output_shapes, output_dtypes, **_):
            ran = mx.logcumsumexp(mx.depends(mx.array([0.0]), [a for a in inputs if isinstance(a, mx.array)]))
            made = [held(tuple(shape), dtype) for shape, dtype in zip(output_shapes, output_dtypes)]
            return [mx.depends(one, [ran]) for one in made]

        return call

    with (
        patch.object(mx.fast, "rms_norm", rms_norm),
        patch.object(mx.fast, "rope", rope),
        patch.object(mx.fast, "scaled_dot_product_attention", sdpa),
        patch.object(mx.fast, "metal_kernel", metal_kernel),
    ):
        yield


def constant(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Zeros that take the memory of one number."""
    zeros = mx.broadcast_to(mx.zeros((1,), dtype), shape)
    mx.eval(zeros)
    return zeros


def primitives(arrays: Iterable[mx.array]) -> Counter:
    """Primitives by name in the graph of arrays that are not computed yet; views are left out."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *arrays)
        names = re.findall(r'\[label ="([^"]*)", shape=rectangle\]', file.read_text())
    kinds = Counter(STANDING_IN.get(name.split()[0], name.split()[0]) for name in names)
    return Counter({name: count for name, count in kinds.items() if name not in VIEWS})


def count_primitives(function: Callable[..., Any], *args: Any) -> Counter:
    """Primitives by name that Metal launches to compute what a function returns: any tree of arrays.

    Its arguments should be computed, or their own graphs count too.
    """
    with answering_as_metal(), as_primitives():
        made = function(*args)
        return primitives(array for _, array in tree_flatten(made) if isinstance(array, mx.array))


def model_of_zeros(raw: dict, dtype: mx.Dtype, recipe: str | None, plain: bool) -> DiffusionGemma:
    """A model whose weights take no memory."""
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    quantize(model, recipe)
    model.update(tree_map(lambda a: constant(a.shape, a.dtype), model.parameters()))
    model.eval()
    if not plain and hasattr(model, "uses_kernels"):
        model.uses_kernels = True
    return model


class Pass:
    """The parts of one step of a canvas, behind a prefix whose keys and values take no memory.

    Args:
        model: from `model_of_zeros`.
        prefix: positions that are encoded.
        mode: "default", "exact" or "fast".
        dense: positions that need the whole vocabulary for their conditioning.
    """

    def __init__(self, model: DiffusionGemma, prefix: int, mode: str, dense: int):
        changes = {} if mode == "default" else {mode: True}
        if mode == "exact":
            changes |= {"certainty_threshold": None, "patience": None}
        options = GenerationOptions(**changes)
        held = model.new_prefix(capacity=prefix + model.config.canvas_length)
        held.offset, self.model, self.dense, self.fast = prefix, model, dense, mode == "fast"
        for layer, kind in zip(held.layers, model.config.text.layer_types):
            heads, dim = model.config.text.kv_shape(kind)
            slots = layer.used(prefix) + model.config.canvas_length
            layer.keys, layer.values = (constant((1, heads, slots, dim), model.dtype) for _ in range(2))
        self.batch = CanvasBatch(model, held, options, constant((1, 2), mx.uint32))
        self.batch.rows = tree_constants(self.batch.rows)
        self.batch.dense = dense
        handles = held.handles()
        first = self.step()
        held.restore(handles)
        self.batch.rows = self.batch.rows._replace(last=tree_constants(first), earlier=(constants_like(first.argmax),))
        self.batch.steps, self._handles = [1], held.handles()

    def rewound(self) -> None:
        """Let go of what earlier graphs wrote."""
        self.batch.prefixes[0].restore([tuple(a.astype(a.dtype) for a in handles) for handles in self._handles])

    def step(self) -> Forward:
        """One step as a graph."""
        build = fast_step if self.fast else plain_step
        return build(self.batch, self.batch.rows.last, self.batch.steps, self.dense)

    def read(self) -> list[Any]:
        """One step with all that is evaluated of it."""
        forward = self.step()
        return [forward.host_state, *forward[1:], [a for a in forward.prediction if isinstance(a, mx.array)]]

    def conditioning(self) -> Any:
        """What a step is computed from."""
        return [a for a in inputs(self.batch, self.batch.rows.last, self.batch.steps, self.dense) if a is not None]

    def layers(self) -> mx.array:
        """Hidden states of the canvas."""
        shape = 1, self.model.config.canvas_length
        with_conditioning = constant((*shape, self.model.config.text.hidden_size), self.model.dtype)
        return self.model.denoise(constant(shape, mx.int32), self.batch.prefixes, with_conditioning)

    def head(self) -> Any:
        """What the head makes of hidden states."""
        shape = 1, self.model.config.canvas_length, self.model.config.text.hidden_size
        hidden = constant(shape, self.model.dtype)
        return predict(self.batch, self.batch.rows.last, hidden, self.batch.steps, self.dense)


class Token:
    """A token of causal mode as a graph, its draw and its place in the prefix included; rings are full.

    Args:
        model: from `model_of_zeros`.
        prefix: positions that are encoded.
        traced: by the trace of an earlier token.
    """

    def __init__(self, model: DiffusionGemma, prefix: int, traced: bool):
        self.model, self.prefix, self.tokens = model, model.new_prefix(), constant((1, 1), mx.int32)
        self.prefix.offset = prefix
        for layer, kind in zip(self.prefix.layers, model.config.text.layer_types):
            heads, dim = model.config.text.kv_shape(kind)
            slots = -(-(layer.used(prefix) + 2) // BUFFER_STEP) * BUFFER_STEP
            layer.keys, layer.values = (constant((1, heads, slots, dim), model.dtype) for _ in range(2))
        if traced:
            model.trace_tokens()
            assert model.token_pass is not None
            model.token_pass.trusted = True  # nothing is computed, so nothing can be compared

    def __call__(self) -> list[mx.array]:
        """All that is evaluated of it."""
        prefix = self.prefix.fork()
        hidden = self.model.encode_ahead(self.tokens, [prefix])
        prefix.accept(1)
        return [mx.argmax(self.model.logits(hidden), axis=-1), finite(hidden), *prefix.state]

    def host_seconds(self, count: int = 10) -> float:
        """Of this process, to build the graph: the least of some runs."""
        taken = []
        for _ in range(count):
            began = time.process_time()
            self()
            taken.append(time.process_time() - began)
        return min(taken)


@contextmanager
def answering_as_cuda() -> Iterator[None]:
    """As `answering_as_metal`, for a GPU of NVIDIA."""
    new_stream = mx.new_stream
    with (
        as_primitives(),
        patch.object(mx, "new_stream", lambda _: new_stream(mx.cpu)),
        patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        patch.object(mx, "device_info", lambda *_: {"device_name": "NVIDIA H200", "total_memory": 141 * 2**30}),
        patch.object(mx.fast, "cuda_kernel", mx.fast.metal_kernel),
    ):
        yield


@contextmanager
def answering_as(device: str) -> Iterator[None]:
    with answering_as_cuda() if device == "CUDA" else answering_as_metal(), as_primitives():
        yield


def count_token(raw: dict, dtype: mx.Dtype, recipe: str | None, plain: bool, prefix: int) -> None:
    """Print a token's primitives, and what building its graph takes this processor, with a trace and without."""
    for device in ("CUDA", "Metal"):
        for traced in (False, True):
            model = model_of_zeros(raw, dtype, recipe, plain)
            with answering_as(device):
                one = Token(model, prefix, traced)
                one()  # makes the trace
                counts, seconds = primitives(one()), one.host_seconds()
            name = "a replayed trace" if traced else "one token"
            table(f"{device}, {name}, {1e3 * seconds:.1f} ms of this processor", counts)


def host_of_step(raw: dict, dtype: mx.Dtype, recipe: str | None, plain: bool, prefix: int) -> None:
    """Print what building a step takes this processor, in milliseconds: the least of some runs on its own clock.

    Without traces of layers; with those of this canvas; and where the canvas is the first of its length and width.
    """
    for device in ("CUDA", "Metal"):
        model = model_of_zeros(raw, dtype, recipe, plain)
        with answering_as(device):
            one, taken = Pass(model, prefix, "default", 8), {}
            for name in ("without traces", "replayed", "made"):
                if name == "replayed":
                    model.trace_layers()
                taken[name] = 1e3 * min(_seconds(one, name == "made") for _ in range(30))
        print(f"{device}, building a step: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in taken.items()))


def _seconds(one: Pass, anew: bool) -> float:
    one.rewound()
    if anew:
        one.model.layer_traces.drop()
    began = time.process_time()
    held = one.step()
    taken = time.process_time() - began
    del held
    return taken


def constants_like(array: mx.array) -> mx.array:
    return constant(array.shape, array.dtype)


def tree_constants(tree: Any) -> Any:
    """The same named tuples with computed zeros in place of every array."""
    if isinstance(tree, mx.array):
        return constants_like(tree)
    if not isinstance(tree, (tuple, list)):
        return tree
    parts = [tree_constants(one) for one in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def table(title: str, counts: Counter, most: int = 100) -> None:
    print(f"{title}: {counts.total()}")
    print("   " + ", ".join(f"{name[:60]} {count}" for name, count in counts.most_common(most)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="26b")
    parser.add_argument("--layers", type=int, help="count so few layers; the step's number is for these")
    parser.add_argument("--canvas", type=int)
    parser.add_argument("--recipe", choices=[*RECIPES, "none"], default="4bit")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--dense", type=int, default=8, help="positions that need the whole vocabulary")
    parser.add_argument("--mode", choices=["default", "exact", "fast"], default="default")
    parser.add_argument("--plain", action="store_true", help="without custom kernels")
    parser.add_argument("--token", action="store_true", help="a token of causal mode")
    parser.add_argument("--host", action="store_true", help="what building a step takes this processor")
    args = parser.parse_args()
    recipe = None if args.recipe == "none" else args.recipe

    if args.token or args.host:
        raw = raw_config(args.shape, args.layers, canvas=args.canvas)
        told = count_token if args.token else host_of_step
        told(raw, DTYPES[args.dtype], recipe, args.plain, args.prefix)
        return

    def counted(part: str, layers: int | None) -> Counter:
        raw = raw_config(args.shape, layers, canvas=args.canvas)
        model = model_of_zeros(raw, DTYPES[args.dtype], recipe, args.plain)
        with answering_as_metal(), as_primitives():
            one = Pass(model, args.prefix, args.mode, args.dense)
        return count_primitives(getattr(one, part))

    # raw_config makes the last layer a full one: two layers are a sliding and a full one, three have one more sliding.
    one, two, three = (counted("layers", count) for count in (1, 2, 3))
    table("a full layer, the canvas's embedding and self-conditioning", one)
    table("a sliding layer more", three - two)
    table("conditioning of the canvas", counted("conditioning", 1))
    table("head", counted("head", 1))
    table("one step" if args.layers is None else f"one step of {args.layers} layers", counted("read", args.layers))


if __name__ == "__main__":
    main()
