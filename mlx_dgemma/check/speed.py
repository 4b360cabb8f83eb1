"""How fast the parts of a step are on this machine, and the step that follows from them, beside the paper model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.build import DTYPES, suit_device
from ..convert.recipes import RECIPES
from ..decoding import costs, sampler
from ..decoding.costs import random_prefix
from ..decoding.lookahead import denoise_block
from ..decoding.options import GenerationOptions
from ..errors import human
from ..model import device, rng
from ..model.config import ModelConfig
from ..model.diffusion_gemma import DiffusionGemma
from ..model.experts import Experts
from ..model.head import matmul_slice
from ..model.kv_cache import Prefix
from .lines import PASSED, SKIPPED, WARNING, Line, attempt
from .machine import device_name
from .paper import floor_ms, paper_step
from .prediction import Parts, is_close, layer_ms, predicted_ms
from .shapes import fill, quantize, raw_config, shared_model

PREFIX = 1024  # positions before the canvas
RUNS, WARM_UP = 5, 2  # passes of each part; the first ones compile kernels and fill caches
CPU_RUNS = 3  # there a pass of the small shape takes seconds
MANY = 20  # products, or tiny kernels, in one evaluation
ROOM = 4 * 2**30  # bytes that random weights, their quantization and a step need besides the weights
Stages = list[Any]


def lines(shape: str | None = None, formats: tuple[str, ...] = ()) -> Iterator[Line]:
    """The lines of this section.

    Args:
        shape: of `shapes.SHAPES`; None: the release's on a GPU, the small one on the CPU.
        formats: dtypes and recipes; without any, what this device would load.
    """
    shape = shape or ("small" if device.on_cpu() else "26b")
    formats = formats or (("float32",) if device.on_cpu() else ("bfloat16", "4bit"))
    raw = raw_config(shape)
    yield attempt("launch and wait", lambda: _launch(DTYPES[_dtype(formats[0])]))
    yield attempt("memory bandwidth", _bandwidth)
    for name, make in _products(ModelConfig.from_dict(raw), DTYPES[_dtype(formats[0])]):
        yield attempt(name, partial(make, name))
    for one in formats:
        yield from _step(raw, shape, one)


def timed(start: Callable[[], None], runs: int | None = None) -> float:
    """Median milliseconds of a call that ends when its work has."""
    seconds = []
    for _ in range(WARM_UP + (runs or RUNS)):
        began = time.perf_counter()
        start()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:]) * 1e3


def pipelined(build: Callable[[], Stages], runs: int | None = None) -> float:
    """Median milliseconds from the end of one pass to the end of the next, which is built while the first is computed.

    Args:
        build: returns stages for `device.Queue`, computing nothing.
        runs: passes that count; None: as many as suit the device.
    """
    runs, current, ends = runs or _passes(), build(), []
    for _ in range(WARM_UP + runs):
        queue = device.Queue()
        queue.add(*current)
        current = build()
        queue.finish()
        ends.append(time.perf_counter())
    return 1e3 * statistics.median(np.diff(ends)[WARM_UP - 1 :].tolist())


def measure(model: DiffusionGemma, prefix: Prefix) -> Parts:
    """The parts of a step of this model behind a prefix."""
    config, dtype = model.config, model.dtype
    length, key = config.canvas_length, mx.random.key(3)[None]
    canvas = rng.noise(length, config.text.vocab_size, key)
    hidden = mx.random.normal((1, length, config.text.hidden_size), key=key[0]).astype(dtype)
    head, t = model.head, mx.array([[[0.6]]])
    made = head.predict(hidden, t, key)
    mx.eval(canvas, hidden, made.carried)

    def layers() -> Stages:
        out = model.denoise(canvas, prefix, hidden)
        return [*prefix.stages, out]

    def vocabulary(dense: bool) -> Stages:
        prediction = head.predict(hidden, t, key, expected_embedding=dense)
        return [*prediction.stages, [*prediction.carried, prediction.condition(head, 0)]]

    def sampling() -> Stages:
        accepted = sampler.accept(made.entropy, 0.1)
        text = sampler.text(made.argmax, mx.array([1], mx.int32), mx.array([length]))
        done = sampler.settled(made.argmax, [made.argmax] * 2, made.entropy, 2, 0.005, text)
        fresh = mx.where(accepted, made.sample, rng.noise(length, config.text.vocab_size, key))
        return [[accepted, done, fresh, made.needs_full_vocab.sum()]]

    return Parts(
        layers=pipelined(layers),
        depth=len(config.text.layer_types),
        head=pipelined(lambda: vocabulary(False)),
        dense_head=pipelined(lambda: vocabulary(True)),
        sampler=pipelined(sampling),
        wait=timed(lambda: mx.eval(mx.array([1.0]) + 1)),
    )


def whole_step(model: DiffusionGemma, prefix: Prefix, runs: int | None = None) -> float:
    """Median milliseconds of a denoising step in the loop that generates; random weights settle nothing."""
    runs = runs or _passes()
    options = GenerationOptions(
        confidence_threshold=0.0,
        certainty_threshold=0.0,
        patience=0,
        canvas="full",
        max_denoising_steps=WARM_UP + runs + 1,
    )
    ends = [time.perf_counter()]
    for _ in denoise_block(model, prefix, options, mx.random.key(1)[None]):
        ends.append(time.perf_counter())
        if len(ends) > WARM_UP + runs:
            break
    return 1e3 * statistics.median(np.diff(ends)[WARM_UP:].tolist())


def _passes() -> int:
    return CPU_RUNS if device.on_cpu() else RUNS


def _dtype(one: str) -> str:
    """The dtype of activations with a format: a dtype or a recipe."""
    return one if one in DTYPES else "float32" if device.on_cpu() else "bfloat16"


def _step(raw: dict[str, Any], shape: str, one: str) -> Iterator[Line]:
    """The lines of one format: the parts of a step, the step that they predict, and the paper model's."""
    recipe = one if one in RECIPES else None
    config = ModelConfig.from_dict(raw)
    name = f"step at {shape}'s shape in {one}"
    need = ROOM if shape == "26b" else 0
    need += _weights(config, recipe)
    if (there := device.available()) < need:
        yield Line(name, SKIPPED, f"two layers and the vocabulary need {human(need)} of {human(there)}.")
        return
    found: dict[str, Any] = {}

    def parts() -> Line:
        with device.wired_limit():
            model = shared_model(raw, DTYPES[_dtype(one)], recipe)
            prefix = random_prefix(model, PREFIX)
            found["parts"] = made = measure(model, prefix)
            found["loop"] = whole_step(model, prefix)
            found["costs"] = made_costs = costs.measure(model)
            costs.write(costs.file_of(model), made_costs)
        says = (
            f"layer {layer_ms(made):.3f} ms, {made.depth} layers {made.layers:.2f}, head {made.head:.2f}, "
            f"with dense conditioning {made.dense_head:.2f}, sampler {made.sampler:.2f}, wait {made.wait:.3f}"
        )
        return Line(f"parts of a {name}", PASSED, says, made._asdict())

    yield attempt(f"parts of a {name}", parts)
    title, paper = f"predicted {name}", f"paper model of a {name}"
    if "costs" in found:
        yield _passes_line(f"passes of a model of {shape}'s shape in {one}", found["costs"])
    if "loop" in found:
        yield attempt(title, lambda: _predicted(title, config, found["parts"], found["loop"]))
        if shape == "26b":
            yield attempt(paper, lambda: _paper(paper, config, recipe))


def _passes_line(name: str, known: costs.Costs) -> Line:
    """What `mode="auto"` chooses by, which is kept for models of this shape and format."""

    def table(values: dict[int, float]) -> str:
        return ", ".join(f"{at}: {value:.1f}" for at, value in values.items())

    says = (
        f"{known.token:.1f} ms a token in causal mode; ms by tokens verified: {table(known.verify)}; "
        f"by positions drafted: {table(known.draft)}; by positions of a step: {table(known.step)}"
    )
    return Line(name, PASSED, says, asdict(known))


def _predicted(name: str, config: ModelConfig, parts: Parts, loop: float) -> Line:
    """The prediction from the parts, and the generating loop over random layers that share their weights."""
    count = len(config.text.layer_types)
    plain, dense = predicted_ms(parts, count), predicted_ms(parts, count, dense=True)
    says = (
        f"{plain:.1f} ms; {dense:.1f} ms in early steps, when all positions are uncertain; "
        f"the generating loop over random weights, always uncertain, took {loop:.1f} ms"
    )
    figures = {"predicted_ms": plain, "predicted_dense_ms": dense, "loop_ms": loop, "prefix": PREFIX}
    return Line(name, PASSED if is_close(dense, loop) else WARNING, says, figures)


def _paper(name: str, config: ModelConfig, recipe: str | None) -> Line:
    chip = device_name()
    if plain := paper_step(chip, config, PREFIX):
        dense = paper_step(chip, config, PREFIX, dense=True) or plain
        half = paper_step(chip, config, PREFIX, half=True) or plain
        says = f"{plain['sum']:.0f} ms ({', '.join(f'{part} {ms:.0f}' for part, ms in plain.items() if part != 'sum')})"
        says += f"; {dense['sum']:.0f} in early steps, {half['sum']:.0f} with float16 products"
        return Line(name, PASSED, says, {"paper": plain, "dense": dense["sum"], "half": half["sum"]})
    floor = floor_ms(chip, config, PREFIX, _read_bytes(config, recipe))
    if floor is None:
        return Line(name, SKIPPED, f"{chip} is not in the table of chips.")
    says = f"there is none of {chip}; its arithmetic or its bytes alone take {floor:.1f} ms"
    return Line(name, PASSED, says, {"floor_ms": floor})


def _weights(config: ModelConfig, recipe: str | None) -> int:
    """Bytes of one layer of each kind and of the embedding."""
    return _shapes_bytes(config, recipe) // len(config.text.layer_types) * 2 + _read_table(config, recipe)


def _read_bytes(config: ModelConfig, recipe: str | None) -> int:
    """Bytes of all weights, which a step of a whole canvas reads."""
    return _shapes_bytes(config, recipe) + _read_table(config, recipe)


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    parameters: Any = tree_flatten(DiffusionGemma(config).parameters())
    return {name: a.shape for name, a in parameters if ".decoder.layers." in name}


def _shapes_bytes(config: ModelConfig, recipe: str | None) -> int:
    shapes = _layer_shapes(config)
    if recipe is None:
        return sum(2 * int(np.prod(shape)) for shape in shapes.values())
    return RECIPES[recipe].nbytes(shapes)


def _read_table(config: ModelConfig, recipe: str | None) -> int:
    shape = (config.text.vocab_size, config.text.hidden_size)
    if recipe is None:
        return 2 * shape[0] * shape[1]
    return RECIPES[recipe].nbytes({"model.decoder.embed_tokens.weight": shape})


def _launch(dtype: mx.Dtype) -> Line:
    """A chain of tiny dependent kernels, and starting and awaiting a single one."""
    x = mx.zeros((256,), dtype)

    def chain() -> None:
        y = x
        for _ in range(10 * MANY):
            y = y + x
        mx.eval(y)

    wait = timed(lambda: mx.eval(x + x))
    launch = max(timed(chain) - wait, 0) / (10 * MANY)
    says = f"{launch * 1e3:.1f} us a small dependent kernel, {wait * 1e3:.0f} us to start and await one"
    return Line("launch and wait", PASSED, says, {"launch_us": launch * 1e3, "wait_us": wait * 1e3})


def _bandwidth() -> Line:
    """A sum of two large arrays: two are read and one is written."""
    size = 2**22 if device.on_cpu() else 2**26
    x, y = mx.zeros((size,)), mx.ones((size,))
    mx.eval(x, y)
    rate = 3 * x.nbytes / timed(lambda: mx.eval(x + y)) / 1e6
    return Line("memory bandwidth", PASSED, f"{rate:.0f} GB/s", {"gb_per_s": rate})


def _products(config: ModelConfig, dtype: mx.Dtype) -> Iterator[tuple[str, Callable[[str], Line]]]:
    """(name, function of the name that makes its line) of the products that a step is made of."""
    text, rows = config.text, config.canvas_length
    hidden, wide = text.hidden_size, text.num_attention_heads * text.head_dim
    x = mx.random.normal((rows, hidden)).astype(dtype)

    def linear(name: str, recipe: str | None) -> Line:
        holder = nn.Module()
        holder.q_proj = nn.Linear(hidden, wide, bias=False)
        _prepare(holder, dtype, recipe, "model.decoder.layers.0.self_attn.")
        return _rate(name, lambda: holder.q_proj(x), 2 * rows * hidden * wide)

    def experts(name: str, recipe: str | None) -> Line:
        module = Experts(text)
        _prepare(module, dtype, recipe, "model.decoder.layers.0.experts.")
        scores = mx.random.normal((rows, text.num_experts), key=mx.random.key(4))
        indices = mx.argpartition(scores, kth=-text.top_k_experts, axis=-1)[:, -text.top_k_experts :]
        weights = mx.full(indices.shape, 1 / text.top_k_experts, dtype)
        flops = 6 * rows * hidden * text.moe_intermediate_size * text.top_k_experts
        return _rate(name, lambda: module(x, indices, weights), flops, 4)

    def table(name: str, transpose: bool) -> Line:
        tokens = min(text.vocab_size, 16384)
        holder = nn.Module()
        holder.embed_tokens = nn.Embedding(tokens, hidden)
        _prepare(holder, dtype, "4bit", "model.decoder.")
        given = x if transpose else mx.random.normal((rows, tokens)).astype(dtype)
        return _rate(
            name,
            lambda: matmul_slice(holder.embed_tokens, given, 0, tokens, transpose),
            2 * rows * hidden * tokens,
        )

    yield "projection, 8 bit", lambda name: linear(name, "4bit")
    yield "projection, not quantized", lambda name: linear(name, None)
    yield "experts, 4 bit", lambda name: experts(name, "4bit")
    yield "experts, not quantized", lambda name: experts(name, None)
    yield "head's product, 8 bit", lambda name: table(name, True)
    yield "conditioning, 8 bit", lambda name: table(name, False)


def _prepare(module: nn.Module, dtype: mx.Dtype, recipe: str | None, prefix: str) -> None:
    fill(module, dtype)
    quantize(module, recipe, prefix)
    suit_device(module)
    mx.eval(module.parameters())


def _rate(name: str, product: Callable[[], mx.array], flops: float, many: int = MANY) -> Line:
    """TFLOPS of a product, several of which share an evaluation so that its start does not count."""
    many = 1 if device.on_cpu() else many
    ms = timed(lambda: mx.eval([product() for _ in range(many)]), 3) / many
    rate = flops / ms / 1e9
    return Line(name, PASSED, f"{rate:.3g} TFLOPS, {ms:.3f} ms", {"tflops": rate, "ms": ms})
