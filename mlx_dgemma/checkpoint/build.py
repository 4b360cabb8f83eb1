"""Build the model of a checkpoint: modules as its quantization asks for, weights as the device computes fastest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..distributed.agreement import together
from ..distributed.group import ALONE, Group
from ..errors import CheckpointError, OptionError
from ..model.attention import LayerContext
from ..model.cache.quantized import GROUP
from ..model.config import ModelConfig
from ..model.device import on_cpu
from ..model.diffusion_gemma import DiffusionGemma
from ..model.kernels import launch as kernels
from ..model.kv_cache import LayerKV
from ..model.masks import Mask
from ..upstream import QuantizedSwitchLinear, SwitchLinear
from . import slices, weights
from .float16 import compute_in_float16
from .folder import Checkpoint, parameter_shapes
from .headers import FLOATS, TensorInfo
from .tied import check_tied

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def build(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    dequantize: bool = False,
    compute_dtype: str | None = None,
    group: Group = ALONE,
    kv_bits: int | None = None,
) -> DiffusionGemma:
    """The model with its weights, evaluated.

    Args:
        checkpoint: what to build.
        dtype: of activations and unquantized weights ("float32", "bfloat16", "float16"); None keeps the stored one.
            On the CPU unquantized experts are always float32, because MLX has no other kernel for them there.
        dequantize: unpack quantized weights.
        compute_dtype: of matrix products: "float16", or None for that of activations.
        group: ranks that compute the model together; this one reads its slices alone.
        kv_bits: of keys and values in full layers: 8, 4, or None.

    Raises:
        OptionError: an unknown dtype.
        CheckpointError: a tensor is missing or unknown, has a wrong shape or dtype, differs from the weight that it is
            tied to, or does not fit `compute_dtype`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; it should be one of {', '.join(DTYPES)}.")
    if compute_dtype not in (None, "float16"):
        raise OptionError(f"compute_dtype is {compute_dtype!r}; it should be float16 or None.")
    model = together(group, lambda: _built(checkpoint, dtype, dequantize, compute_dtype, group))
    model.kv_bits = kv_bits
    choose_kernels(model)
    return model


def _built(
    checkpoint: Checkpoint, dtype: str | None, dequantize: bool, compute_dtype: str | None, group: Group
) -> DiffusionGemma:
    checkpoint.require_native()
    model = empty_model(checkpoint)
    shapes = parameter_shapes(model)
    plan = weights.plan(list(checkpoint.tensors), checkpoint.config, set(shapes))
    check_tied(checkpoint)
    cast = DTYPES[dtype] if dtype else None
    if group.size == 1:
        model.load_weights(list(_arrays(checkpoint, plan, shapes, cast)), strict=True)
    else:
        _load_slices(model, checkpoint, plan, shapes, cast, group)
    if dequantize:
        _dequantize(model, cast)
    if compute_dtype is not None:
        compute_in_float16(model)
    suit_device(model)
    mx.eval(model.parameters())
    return model


def empty_model(checkpoint: Checkpoint) -> DiffusionGemma:
    """The modules of a checkpoint, quantized as it is; their arrays are never computed.

    Raises:
        CheckpointError: a quantization that MLX does not know, or one that config.json does not declare.
    """
    model = DiffusionGemma(checkpoint.config)
    stored = {name for name in checkpoint.tensors if name.endswith(".scales")}
    if checkpoint.quantization:
        _quantize(model, checkpoint.quantization, stored, checkpoint.config)
    elif stored:
        raise CheckpointError(f"The checkpoint holds {min(stored)}, but config.json has no quantization entry.")
    return model


def slices_of(model: DiffusionGemma, rank: int, ranks: int) -> slices.Slices:
    """What a rank holds of a model, which is still whole."""
    quantized = {
        path: slices.Stored(one.group_size, one.bits, one.mode)
        for path, one in model.named_modules()
        if hasattr(one, "bits")
    }
    return slices.Slices(model.config, rank, ranks, quantized)


def suit_device(model: nn.Module) -> None:
    """Store weights in the layout that MLX's default device computes fastest: on the CPU column by column.

    The BLAS of the CPU wheels takes half the time for columns. It computes experts in float32 only.
    """
    if not on_cpu():
        return
    for module in model.modules():
        if isinstance(module, SwitchLinear):
            module.weight = module.weight.astype(mx.float32)
        if isinstance(module, (nn.Linear, SwitchLinear)):
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)


def choose_kernels(model: DiffusionGemma) -> None:
    """Use the custom kernels if this device computes the same with them as without, and warn if it does not.

    A layer of each type and the head are compared on random states. In bfloat16 single roundings differ; a wrong kernel
    differs in everything. The model leaves training mode, whose gradients the kernels do not have. With the kernels,
    layers are traced, too.
    """
    model.eval()
    model.layer_traces = None
    text = model.config.text
    if not on_cpu() and model.group.size == 1:  # messages between ranks were never traced
        model.trace_tokens()
    if on_cpu() or text.num_experts > kernels.LAYOUT_THREADS or text.top_k_experts > kernels.MAX_TOP_K:
        return
    rows = min(model.config.canvas_length, 64)
    h = mx.random.normal((1, rows, text.hidden_size), key=mx.random.key(0)).astype(model.dtype)
    kinds = {kind: text.layer_types.index(kind) for kind in text.layer_types}
    turns = model.turns(0, rows)

    def computed(use: bool) -> list[mx.array]:
        found = []
        for kind, i in kinds.items():
            context = LayerContext([LayerKV(None)], [0], [Mask(np.arange(rows))], 0, True, turns[kind] if use else None)
            layer = model.model.decoder.layers[i]
            found.append(layer(h, layer.layer_scalar, context)[0])
        model.uses_kernels = use
        made = model.head.predict(h[:, :8], 1.0, mx.random.key(0)[None])
        found += [made.entropy, made.logsumexp, made.top_probs.max(axis=-1)]
        if model.kv_bits is not None:
            full = model.model.decoder.layers[kinds["full_attention"]].self_attn
            heads, dim = text.kv_shape("full_attention")
            values = mx.random.normal((1, heads, rows, dim), key=mx.random.key(1)).astype(model.dtype)
            group = GROUP[model.kv_bits]
            packed = mx.quantize(values, group, model.kv_bits)
            found += [one.swapaxes(0, 2) for one in full.unpack(packed, group, model.kv_bits, (0, rows), 0, use)]
        mx.eval(found)
        return found

    try:
        plain, fast = computed(False), computed(True)
        agree = all(_agree(a, b) for a, b in zip(plain, fast))
        reason = "they compute something else here"
    except (RuntimeError, ValueError) as error:
        agree, reason = False, str(error).strip().partition("\n")[0]
    model.uses_kernels = agree = all(model.group.gather_values(agree))
    if not agree:
        said = f"Custom kernels are not used, which costs speed ({reason}); please report it."
        warnings.warn(said, stacklevel=2)
        return
    _choose_traces(model, h, kinds, turns)


def _choose_traces(model: DiffusionGemma, h: mx.array, kinds: dict[str, int], turns: dict[str, Any]) -> None:
    """Replay traces of layers if a replayed layer of each type computes the same, and warn if it does not.

    Args:
        model: one that uses the kernels.
        h: [1, L, H], random states.
        kinds: a layer's number by its type.
        turns: of RoPE, by type.
    """
    model.trace_layers()
    assert model.layer_traces is not None
    agree = True
    try:
        for kind, i in kinds.items():
            layer, mask = model.model.decoder.layers[i], Mask(np.arange(h.shape[1]))
            context = LayerContext([LayerKV(None)], [0], [mask], 0, True, turns[kind])
            expected = layer(h, layer.layer_scalar, context)[0]
            mx.eval(expected, context.caches[0].keys)  # an empty cache is not traced
            found = [model.layer_traces(layer, h, layer.layer_scalar, context)[0] for _ in range(2)]
            agree = agree and all(_agree(expected, one) for one in found)
        reason = "they compute something else here"
    except (RuntimeError, ValueError) as error:
        agree, reason = False, str(error).strip().partition("\n")[0]
    if not all(model.group.gather_values(agree)):
        model.layer_traces = None
        said = f"Traced layers are not used, which costs speed ({reason}); please report it."
        warnings.warn(said, stacklevel=3)


def _agree(expected: mx.array, found: mx.array) -> bool:
    """Whether most rows are equal up to roundings: [rows, ...] each."""
    if expected.dtype != found.dtype:
        return False
    a, b = (one.astype(mx.float32).reshape(one.shape[0], -1) for one in (expected, found))
    error = mx.abs(a - b).max(axis=-1) / (mx.abs(a).max(axis=-1) + 1e-6)
    bound = 1e-3 if expected.dtype == mx.float32 else 0.03
    return bool((mx.sort(error)[error.size * 3 // 4] < bound).item())


def _quantize(model: nn.Module, quantization: dict, stored: set[str], config: ModelConfig) -> None:
    """Quantize every module whose scales are stored, with the parameters that config.json has for its path."""
    paths = {
        target.removesuffix(".scales") for name in stored if (m := weights.match(name, config)) and (target := m[0])
    }
    default = {key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization}

    def choose(path: str, module: nn.Module):
        if path not in paths:
            return False
        own = quantization.get(path) or quantization.get(path.replace("gate_up_proj", "gate_proj"))
        return {**default, "mode": "affine", **own} if isinstance(own, dict) else default

    try:
        nn.quantize(model, class_predicate=choose)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"config.json has a quantization that MLX cannot compute ({error}).") from None


def _load_slices(
    model: DiffusionGemma,
    checkpoint: Checkpoint,
    plan: dict[str, list[weights.Source]],
    shapes: dict,
    cast: mx.Dtype | None,
    group: Group,
) -> None:
    """Read this rank's slices, one parameter after the other."""
    mine = slices_of(model, group.rank, group.size)
    found = []
    for target, sources in plan.items():
        path, _, part = target.rpartition(".")
        packed = path in mine.quantized
        cut, stored = mine.cut(target), mine.quantized.get(path)
        parts = []
        for source in sources:
            info = checkpoint.tensors[source.name]
            _check(info, source, shapes[target], packed)
            own = cut if cut is None or source.half is None else slices.Cut(cut.axis, cut.spans[:1])
            parts.append(slices.read(info, slices.stored_cut(own, part, stored)))
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        if cast is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(cast)
        mx.eval(array)
        found.append((target, array))
    model.update(tree_unflatten(found))
    model.join(group)


def _arrays(
    checkpoint: Checkpoint, plan: dict[str, list[weights.Source]], shapes: dict, cast: mx.Dtype | None
) -> Iterator[tuple[str, mx.array]]:
    files: dict[Path, dict[str, mx.array]] = {}
    for target, sources in plan.items():
        parts = []
        for source in sources:
            info = checkpoint.tensors[source.name]
            _check(info, source, shapes[target], packed=f"{target.rpartition('.')[0]}.scales" in shapes)
            if info.file not in files:
                loaded = mx.load(str(info.file))  # lazy: read when evaluated
                assert isinstance(loaded, dict)
                files[info.file] = loaded
            parts.append(files[info.file].pop(source.name))
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        if cast is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(cast)
        if len(parts) > 1 or array.dtype != parts[0].dtype:
            mx.eval(array)  # now, or what all of them are made of would be in memory together
        yield target, array


def _check(info: TensorInfo, source: weights.Source, shape: tuple[int, ...], packed: bool) -> None:
    wanted = shape if source.half is None else (shape[0], shape[1] // 2, *shape[2:])
    if info.shape != wanted:
        raise CheckpointError(
            f"{source.name} has the shape {list(info.shape)}, but config.json asks for {list(wanted)}."
        )
    if info.dtype not in FLOATS and not (packed and info.dtype in ("U32", "U8")):
        raise CheckpointError(f"{source.name} has the dtype {info.dtype}; it should be one of {', '.join(FLOATS)}.")


def unpacked(module: nn.Module) -> mx.array:
    """The weight of a quantized linear map or embedding, in the dtype of its scales."""
    return mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def _dequantize(model: nn.Module, cast: mx.Dtype | None) -> None:
    """Replace every quantized module by a plain one."""
    kinds = {nn.QuantizedLinear: nn.Linear, nn.QuantizedEmbedding: nn.Embedding, QuantizedSwitchLinear: SwitchLinear}

    def plain(module: nn.Module) -> nn.Module:
        weight = unpacked(module)
        kind = kinds[type(module)]
        new = kind(1, 1, 1, False) if kind is SwitchLinear else kind(1, 1)
        new.pop("bias", None)
        new.weight = weight if cast is None else weight.astype(cast)
        return new

    leaves = [(path, plain(module)) for path, module in model.named_modules() if type(module) in kinds]
    model.update_modules(tree_unflatten(leaves))
