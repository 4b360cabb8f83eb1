"""How much memory a checkpoint needs, and whether the device has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import MemoryLimitError
from ..model import device
from ..model.attention import SCORE_BYTES
from ..model.cache.quantized import bytes_per_position
from ..model.config import ModelConfig
from ..model.device import on_cpu
from ..model.kv_cache import BUFFER_STEP
from .build import empty_model, slices_of
from .folder import Checkpoint
from .headers import FLOATS
from .slices import Slices

GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes of memory: of the weights, of the prefix's KV cache, and of the arrays of a step."""

    weights: int
    prefix: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.weights + self.prefix + self.workspace


def prefix_bytes(
    config: ModelConfig,
    context: int,
    itemsize: int,
    batch_size: int = 1,
    kv_bits: int | None = None,
    mine: Slices | None = None,
) -> int:
    """Bytes of the KV of `context` positions: full layers hold all of them, sliding layers those in the window.

    Of the KV heads that a rank holds, or of all.
    """
    text, canvas, total = config.text, config.canvas_length, 0
    for layer, kind in enumerate(text.layer_types):
        heads, dim = text.kv_shape(kind)
        if mine is not None:
            heads = len(mine.kv_heads(layer))
        full = kind == "full_attention"
        if full and kv_bits is not None:
            slots = -(-context // BUFFER_STEP) * BUFFER_STEP
            held = slots * bytes_per_position(heads, dim, kv_bits, itemsize) + 2 * heads * dim * canvas * itemsize
        else:
            positions = context if full else min(context, text.sliding_window - 1)
            held = 2 * heads * dim * itemsize * (-(-(positions + canvas) // BUFFER_STEP) * BUFFER_STEP)
        total += held * batch_size
    return total


def need(
    checkpoint: Checkpoint,
    context: int,
    dtype: str | None = None,
    dequantize: bool = False,
    kv_bits: int | None = None,
    ranks: int = 1,
) -> Need:
    """Estimate from the headers what loading and a prompt of `context` tokens take; of several ranks one alone.

    The workspace is the larger of two bounds of peaks, which were measured at the release's size (bench/RESULTS.md):
    a denoising step takes at most eight float32 arrays of [canvas, vocabulary] (exact mode; other modes take less), and
    a prefill chunk eight arrays of [heads, chunk, context] attention scores, each at most `attention.SCORE_BYTES`; the
    rows of the experts are counted in.
    """
    itemsize = 4 if dtype == "float32" else 2
    dealt: list[Slices | None] = [None]
    if ranks > 1:
        model = empty_model(checkpoint)
        dealt = [slices_of(model, rank, ranks) for rank in range(ranks)]
        weights = max(one.total for one in rank_weights(checkpoint, ranks, dtype, dequantize))
    elif dequantize or (not checkpoint.quantization and dtype is not None):
        weights = checkpoint.parameters * itemsize
    else:
        weights = checkpoint.nbytes
    config = checkpoint.config
    step = 8 * 4 * config.canvas_length * config.text.vocab_size
    scores = 8 * min(itemsize * config.text.num_attention_heads * min(1024, context) * context, SCORE_BYTES)
    workspace = max(step, scores)
    prefix = max(prefix_bytes(config, context, itemsize, kv_bits=kv_bits, mine=mine) for mine in dealt)
    return Need(weights, prefix, workspace)


@dataclass(frozen=True)
class RankWeights:
    """Bytes of the weights that one rank holds: its slices, and by part what every rank holds."""

    slices: int
    replicated: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.slices + sum(self.replicated.values())


REPLICATED = {
    "vision": r"model\.encoder\.(vision_tower|embed_vision)\..+",
    "self-conditioning": r"model\.decoder\.self_conditioning\..+",
    "routers": r".+\.router\..+",
    "norms and scalars": r".+",
}


def rank_weights(
    checkpoint: Checkpoint, ranks: int, dtype: str | None = None, dequantize: bool = False
) -> list[RankWeights]:
    """What each of so many ranks holds of the weights.

    Raises:
        CheckpointError: the model cannot be dealt to so many ranks.
    """
    model, shapes = empty_model(checkpoint), checkpoint.shapes
    stored = dict(tree_flatten(model.parameters()))
    found = []
    for rank in range(ranks):
        mine, slices, replicated = slices_of(model, rank, ranks), 0, dict.fromkeys(REPLICATED, 0)
        for name, array in stored.items():
            path, _, part = name.rpartition(".")
            cut, packed = mine.cut(name), mine.quantized.get(path)
            whole = shapes[f"{path}.weight" if packed else name]
            if packed and dequantize:
                size = prod(whole) * itemsize_of(checkpoint, name, dtype) if part == "weight" else 0
            elif mx.issubdtype(array.dtype, mx.floating):
                size = array.size * itemsize_of(checkpoint, name, dtype)
            else:
                size = array.nbytes
            if cut is None:
                replicated[next(kind for kind, names in REPLICATED.items() if re.fullmatch(names, name))] += size
                continue
            slices += size * cut.size // whole[cut.axis]
        found.append(RankWeights(slices, replicated))
    return found


def itemsize_of(checkpoint: Checkpoint, name: str, dtype: str | None) -> int:
    """Bytes of an unquantized number of a parameter: as it is loaded, else as most of the checkpoint is stored."""
    if dtype is not None:
        return 4 if dtype == "float32" else 2
    return FLOATS[checkpoint.tensors[name].dtype].size if name in checkpoint.tensors else 2


def context(checkpoint: Checkpoint) -> int:
    """Tokens of context that must fit for loading: 4,096, or the longest context of the model if that is shorter."""
    return min(4096, checkpoint.config.text.max_position_embeddings)


def resolve_dtype(
    checkpoint: Checkpoint, dtype: str | None = None, dequantize: bool | None = None, ranks: int = 1
) -> tuple[str | None, bool]:
    """The (dtype, dequantize) that loading uses; None leaves the choice to this function.

    On the CPU quantized matrix products are slow and float32 is fastest, so weights are unpacked to float32 if they
    fit. On a GPU they stay as stored.
    """
    if on_cpu() and dtype is None and (dequantize is not False or not checkpoint.quantization):
        dtype = "float32"
    if dequantize is None:
        slow = on_cpu() and checkpoint.quantization is not None
        needed = need(checkpoint, context(checkpoint), dtype, True, ranks=ranks).total if slow else 0
        dequantize = slow and needed <= device.available()
    return dtype, dequantize


def free_bytes_beside(checkpoint: Checkpoint, rows: int, kv_bits: int | None = None) -> int:
    """Bytes left beside a loaded checkpoint and `rows` prompts of `context` tokens, at least 0."""
    dtype, dequantize = resolve_dtype(checkpoint)
    needed = need(checkpoint, context(checkpoint), dtype, dequantize, kv_bits)
    return max(device.available() - needed.total - (rows - 1) * needed.prefix, 0)


def check(checkpoint: Checkpoint, needed: Need, recipe_sizes: Callable[[], Mapping[str, int]]) -> None:
    """Refuse a checkpoint that does not fit.

    Args:
        checkpoint: for its name.
        needed: bytes that it takes.
        recipe_sizes: gives the bytes of the weights under each conversion recipe; called only to refuse.

    Raises:
        CheckpointError: it must be converted first.
        MemoryLimitError: says how much is missing, which recipe would fit, and what to try.
    """
    checkpoint.require_native()
    have = device.available()
    if needed.total <= have:
        return
    rest, sizes = needed.total - needed.weights, recipe_sizes()
    fitting = [name for name, size in sizes.items() if size + rest <= have]
    if fitting:
        best = max(fitting, key=sizes.__getitem__)
        way = f"the recipe {best} would fit ({sizes[best] / GB:.1f} GB of weights)"
    else:
        small = min(sizes, key=sizes.__getitem__)
        way = f"no recipe fits (the smallest, {small}, has {sizes[small] / GB:.1f} GB of weights)"
    if mx.metal.is_available():
        way += "; `sudo sysctl iogpu.wired_limit_mb=N` raises what macOS gives"
    raise MemoryLimitError(
        f"{checkpoint.path.name} needs {needed.total / GB:.1f} GB (weights {needed.weights / GB:.1f}, prefix "
        f"{needed.prefix / GB:.1f}, workspace {needed.workspace / GB:.1f}) and this machine gives {have / GB:.1f} GB: "
        f"{(needed.total - have) / GB:.1f} GB are missing; {way}; --ignore-memory (ignore_memory=True) tries anyway."
    )
