"""One layer's products and the head's at the release's shape, against the same from unpacked weights in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.build import unpacked
from ..convert.recipes import RECIPES, Quantization
from ..model import device
from ..model.attention import Attention, LayerContext
from ..model.config import ModelConfig, TextConfig
from ..model.experts import Experts
from ..model.functions import entropy
from ..model.head import Head, matmul_slice
from ..model.kv_cache import LayerKV
from ..model.masks import Mask
from .lines import SKIPPED, Line, attempt, judged
from .recording import dtype_name
from .shapes import fill, raw_config

DTYPES = (mx.bfloat16, mx.float16)
BOUNDS = {mx.float32: 1e-3, mx.bfloat16: 3e-2, mx.float16: 1e-2}  # of the worst row: |difference| / |row|
CPU_BOUNDS = {**BOUNDS, mx.bfloat16: 2e-1, mx.float16: 3e-2}  # the CPU sums up quantized products in 16 bits


SMALL = (
    10**10
)  # bytes of a device that computes a fourth of the experts: while they are made they take three times theirs


class Size(NamedTuple):
    """How much of the release's shape is computed."""

    text: TextConfig
    rows: int  # positions
    attending: int  # positions, of attention
    prefix: int  # keys before the canvas
    vocab: int  # of the vocabulary


def size_of(quick: bool) -> Size:
    """The release's shape on a GPU, a small shape to be quick.

    The CPU takes a second for 0.1 GFLOP of a quantized product in 16 bits: there, the release's hidden size with fewer
    and narrower experts, fewer heads and fewer rows.
    """
    text = ModelConfig.from_dict(raw_config("small" if quick else "26b")).text
    if device.on_cpu():
        few = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_global_key_value_heads": 1}
        return Size(replace(text, num_experts=4, top_k_experts=4, moe_intermediate_size=128, **few), 16, 4, 4, 512)
    if quick:
        return Size(text, 64, 64, 64, text.vocab_size)
    experts = text.num_experts if device.available() > SMALL else text.num_experts // 4
    return Size(replace(text, num_experts=experts), 256, 256, 1024, 16384)


def lines(size: Size) -> Iterator[Line]:
    """The lines of this section."""
    kept = {str(one): one for recipe in RECIPES.values() if (one := recipe.experts)}
    rest = {str(one): one for recipe in RECIPES.values() if (one := recipe.embedding)}
    slow = compiles_slowly()
    if slow:
        some = str(RECIPES["4bit"].experts)
        yield Line(
            f"recipes but {some}", SKIPPED, "CUDA compiles each quantized product on first use, for up to a minute."
        )
        kept = {some: kept[some]}
    for dtype in DTYPES:
        shown = dtype_name(dtype)
        if slow and dtype == mx.float16:
            rest = kept = {}
        for name, one in rest.items():
            yield compared(f"head, {name}, {shown}", partial(_table, size, dtype, one, True))
            yield compared(f"conditioning, {name}, {shown}", partial(_table, size, dtype, one, False))
        if rest:
            yield compared(f"head's statistics, {shown}", partial(_statistics, size, dtype))
        for name, stored in {"not quantized": None, **kept}.items():
            yield compared(f"experts, {name}, {shown}", partial(_experts, size, dtype, stored))
        for kind in ("sliding_attention", "full_attention"):
            shape = f"{size.text.num_attention_heads} x {size.text.kv_shape(kind)[1]}"
            for name, stored in {"not quantized": None, **rest}.items():
                title = f"{kind.replace('_', ' ')} {shape}, {name}, {shown}"
                yield compared(title, partial(_attention, size, kind, dtype, stored))


def compiles_slowly() -> bool:
    """Whether each kind of quantized product takes long to compile: on CUDA."""
    return not device.on_cpu() and not mx.metal.is_available()


def compared(name: str, make: Callable[[], tuple[mx.array, mx.array]]) -> Line:
    """The line of a result and what it should be, [rows, width] or more axes: the error of the worst row is judged."""

    def line() -> Line:
        got, wanted = make()
        bound = (CPU_BOUNDS if device.on_cpu() else BOUNDS)[got.dtype]
        error = worst_row(got, wanted)
        return judged(name, error <= bound, f"worst row off by {error:.1e}, allowed {bound:.0e}", error=error)

    return attempt(name, line)


def worst_row(got: mx.array, wanted: mx.array) -> float:
    """The largest |difference| / |row| of all rows (the last axis), infinite where something is not finite."""
    x, y = (np.asarray(a.astype(mx.float32), np.float64).reshape(-1, a.shape[-1]) for a in (got, wanted))
    error = np.linalg.norm(x - y, axis=-1) / np.maximum(np.linalg.norm(y, axis=-1), 1e-6)
    return float(np.where(np.isfinite(error), error, np.inf).max())


def _drawn(dtype: mx.Dtype, *shape: int, seed: int = 1) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _quantized(module: nn.Module, one: Quantization | None) -> None:
    """Quantize all linear maps of a module that can be."""
    if one is not None:
        nn.quantize(module, **one.as_dict, class_predicate=lambda _, child: hasattr(child, "to_quantized"))
    mx.eval(module.parameters())


def wide(module: nn.Module) -> mx.array:
    """A linear map's or an embedding's weight in float32."""
    return (unpacked(module) if "scales" in module else module.weight).astype(mx.float32)


def _embedding(size: Size, dtype: mx.Dtype, one: Quantization | None) -> nn.Module:
    holder = nn.Module()
    holder.table = nn.Embedding(size.vocab, size.text.hidden_size)
    fill(holder, dtype)
    _quantized(holder, one)
    return holder.table


def _table(size: Size, dtype: mx.Dtype, one: Quantization, transpose: bool) -> tuple[mx.array, mx.array]:
    """A product with the embedding: hidden states to logits, or probabilities to embeddings without `transpose`."""
    table = _embedding(size, dtype, one)
    x = _drawn(dtype, size.rows, size.text.hidden_size if transpose else size.vocab)
    weight = wide(table)
    return matmul_slice(table, x, 0, size.vocab, transpose), x.astype(mx.float32) @ (weight.T if transpose else weight)


def _statistics(size: Size, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Largest probability, entropy and log-sum-exp of every position: the head's pass, and all logits at once."""
    table = _embedding(size, dtype, RECIPES["4bit"].embedding)
    head = Head(table, size.vocab, size.text.final_logit_softcapping, size.text.hidden_size**0.5, dtype)
    hidden = _drawn(dtype, 1, size.rows, size.text.hidden_size) * 4
    made = head.predict(hidden, 0.6, mx.random.key(1)[None])
    logits = head.logits(hidden) / 0.6
    total = mx.logsumexp(logits, axis=-1)
    rounded = mx.logsumexp(logits.astype(dtype).astype(mx.float32), axis=-1)
    wanted = mx.stack([mx.exp(logits.max(axis=-1) - total), entropy(logits), rounded], axis=-1)
    return mx.stack([made.confidence, made.entropy, made.logsumexp], axis=-1), wanted


def _experts(size: Size, dtype: mx.Dtype, one: Quantization | None) -> tuple[mx.array, mx.array]:
    """The mixture as a layer calls it, and expert by expert from unpacked weights."""
    experts = Experts(size.text)
    on_cpu = device.on_cpu() and one is None
    fill(experts, mx.float32 if on_cpu else dtype)  # as the loader stores them
    _quantized(experts, one)
    count, top_k = size.text.num_experts, size.text.top_k_experts
    x = _drawn(dtype, size.rows, size.text.hidden_size)
    indices = mx.argsort(_drawn(mx.float32, size.rows, count, seed=2), axis=-1)[:, :top_k].astype(mx.uint32)
    weights = mx.softmax(_drawn(mx.float32, size.rows, top_k, seed=3), axis=-1).astype(dtype)
    got = experts(x, indices, weights)
    mx.eval(got, indices, weights)
    total = mx.zeros(x.shape)
    for expert in range(count):
        share = mx.where(indices == expert, weights.astype(mx.float32), 0).sum(axis=-1, keepdims=True)
        gate, up = mx.split(x.astype(mx.float32) @ _one_expert(experts.gate_up_proj, expert).T, 2, axis=-1)
        total = total + share * ((nn.gelu_approx(gate) * up) @ _one_expert(experts.down_proj, expert).T)
        mx.eval(total)  # so that one unpacked expert is in memory at a time
    return got, total


def _one_expert(module: nn.Module, expert: int) -> mx.array:
    """One expert's matrix in float32."""
    if "scales" not in module:
        return module.weight[expert].astype(mx.float32)
    biases = module.get("biases")
    return mx.dequantize(
        module.weight[expert],
        module.scales[expert],
        None if biases is None else biases[expert],
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    ).astype(mx.float32)


def _attention(size: Size, kind: str, dtype: mx.Dtype, one: Quantization | None) -> tuple[mx.array, mx.array]:
    """A layer's attention over a prefix and a canvas, and the same from unpacked weights in float32."""
    modules = [Attention(size.text, kind) for _ in range(2)]
    fill(modules[0], dtype)
    modules[0].q_norm.weight *= size.text.kv_shape(kind)[1] ** -0.5  # scores of deviation 1: softmax magnifies rounding
    _quantized(modules[0], one)
    for name, module in modules[0].children().items():
        if hasattr(module, "weight"):
            modules[1][name].weight = wide(module)
    x = _drawn(dtype, 1, size.attending, size.text.hidden_size)
    before = _drawn(dtype, 1, size.prefix, size.text.hidden_size, seed=2)
    got, wanted = (
        _attend(size, kind, module, x.astype(d), before.astype(d)) for module, d in zip(modules, (dtype, mx.float32))
    )
    return got, wanted


def _attend(size: Size, kind: str, module: Attention, x: mx.array, before: mx.array) -> mx.array:
    window = size.text.sliding_window - 1 if kind == "sliding_attention" else None
    cache, length = LayerKV(window), before.shape[1]
    keys, positions = np.arange(length), np.arange(length)
    causal = Mask(keys, positions, size.text.sliding_window if window else None)
    module(before, LayerContext([cache], [0], [causal], 0, canvas=False))
    held = np.arange(cache.used(length) + x.shape[1])
    return module(x, LayerContext([cache], [length], [Mask(held)], length, canvas=True))
