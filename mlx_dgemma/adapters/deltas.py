"""Adapters: low-rank changes of linear layers (LoRA, DoRA), added to a model and extracted from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..checkpoint.slices import Cut
from ..errors import CheckpointError, OptionError
from ..model.diffusion_gemma import DiffusionGemma
from ..upstream import DoRALinear, LoRALinear, LoRASwitchLinear, QuantizedSwitchLinear, SwitchLinear

LAYERS = "model.decoder.layers."
GROUPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("router.proj",),
}
"""Modules of each layer by target group. The group "self-conditioning" is separate: the decoder has it once."""
SELF_CONDITIONING = tuple(f"model.decoder.self_conditioning.{name}_proj" for name in ("gate", "up", "down"))
_ADAPTED = (LoRALinear, DoRALinear, LoRASwitchLinear)


@dataclass(frozen=True)
class Delta:
    """The change of one linear layer with the weight W [out, in]: W + scale * b @ a.

    With a magnitude it is DoRA (arXiv 2402.09353): each row of W + scale * b @ a is scaled to its norm in `magnitude`.

    Attributes:
        a: [r, in] float32; for experts [E, r, in].
        b: [out, r] float32; for experts [E, out, r].
        scale: factor of b @ a.
        magnitude: [out] float32 row norms, or None for LoRA.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def nbytes(self) -> int:
        """Size of its arrays in bytes."""
        return self.a.nbytes + self.b.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def apply_to(self, weight: mx.array) -> mx.array:
        """The changed weight in float32; `weight` is W [out, in], or [E, out, in] for experts."""
        weight = weight.astype(mx.float32) + self.scale * (self.b @ self.a)
        if self.magnitude is not None:
            weight = weight * (self.magnitude / mx.linalg.norm(weight, axis=1))[:, None]
        return weight

    def equals(self, other: Delta | None) -> bool:
        """True if the other delta is equal bit for bit."""
        if other is None or self.scale != other.scale or (self.magnitude is None) != (other.magnitude is None):
            return False
        pairs = [(self.a, other.a), (self.b, other.b)]
        if self.magnitude is not None and other.magnitude is not None:
            pairs.append((self.magnitude, other.magnitude))
        return all(a is b or mx.array_equal(a, b).item() for a, b in pairs)


@dataclass(frozen=True)
class Adapter:
    """Deltas by module path, such as "model.decoder.layers.0.self_attn.q_proj", for each of the two modes.

    The encoder and the decoder share the weights of their layers, but may have different deltas. Both dicts use the
    decoder's paths for these layers.

    Attributes:
        encode: deltas used when a prompt is encoded.
        denoise: deltas used when a canvas is denoised.
    """

    encode: dict[str, Delta]
    denoise: dict[str, Delta]

    @property
    def shared(self) -> bool:
        """True if both modes have the same deltas for the shared layers."""
        paths = {path for path in (*self.encode, *self.denoise) if path.startswith(LAYERS)}
        return all(path in self.encode and self.encode[path].equals(self.denoise.get(path)) for path in paths)

    @property
    def changes(self) -> dict[str, Delta]:
        """Deltas of both modes by path; where the modes differ, the encoder's."""
        return {**self.denoise, **self.encode}

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes; deltas that both modes share count once."""
        unique = {id(delta): delta for deltas in (self.encode, self.denoise) for delta in deltas.values()}
        return sum(delta.nbytes for delta in unique.values())


def dealt(adapter: Adapter, cut_of: Callable[[str], Cut | None]) -> Adapter:
    """What a rank holds of a LoRA: of b what it holds of its layer's outputs, of a what it holds of the inputs.

    Args:
        adapter: the whole.
        cut_of: what the rank holds of the weight of a module, by path; None: all of it.
    """
    done: dict[int, Delta] = {}

    def of(path: str, delta: Delta) -> Delta:
        cut = cut_of(path)
        if cut is not None and id(delta) not in done:
            kept = np.concatenate([np.arange(*span) for span in cut.spans])
            if cut.axis == -1:
                done[id(delta)] = replace(delta, a=mx.array(np.asarray(delta.a)[..., kept]))
            else:
                done[id(delta)] = replace(delta, b=mx.array(np.asarray(delta.b)[..., kept, :]))
        return done.get(id(delta), delta)

    modes = adapter.encode, adapter.denoise
    return Adapter(*({path: of(path, delta) for path, delta in one.items()} for one in modes))


def apply(model: DiffusionGemma, adapter: Adapter) -> None:
    """Add an adapter to a model, for generation.

    If the modes differ, the encoder gets its own layers, which share all weights with the decoder's layers.

    Raises:
        CheckpointError: the model lacks a module that the adapter changes, or a module cannot take a DoRA.
    """
    decoder = model.model.decoder

    def layers_with(deltas: dict[str, Delta]) -> list[Any]:
        by_layer: list[dict[str, Delta]] = [{} for _ in decoder.layers]
        for path, delta in deltas.items():
            if path.startswith(LAYERS):
                index, _, name = path.removeprefix(LAYERS).partition(".")
                by_layer[int(index)][name] = delta
        return [
            _with_deltas(layer, own, f"{LAYERS}{i}.") for i, (layer, own) in enumerate(zip(decoder.layers, by_layer))
        ]

    changes = adapter.changes
    for path in changes:
        _module(model, path)
    encoder_layers = None if adapter.shared else tuple(layers_with(adapter.encode))
    decoder.layers, model._encoder_layers = layers_with(adapter.denoise), encoder_layers
    others = {path: delta for path, delta in changes.items() if not path.startswith(LAYERS)}
    modules = [(path, adapted_module(_module(model, path), delta, path)) for path, delta in others.items()]
    model.update_modules(tree_unflatten(modules))
    mx.eval(model.parameters(), [layer.parameters() for layer in encoder_layers or ()])


def _module(model: nn.Module, path: str) -> Any:
    """The module at a path.

    Raises:
        CheckpointError: there is none.
    """
    found: Any = model
    try:
        for name in path.split("."):
            found = found[int(name)] if isinstance(found, list) else found[name]
    except (KeyError, IndexError, ValueError, TypeError):
        raise CheckpointError(
            f"The adapter changes {path}, which this model does not have; it belongs to another model."
        ) from None
    return found


def _with_deltas(module: nn.Module, deltas: dict[str, Delta], path: str) -> nn.Module:
    """A copy of a module with deltas added to its submodules; everything else is shared with the original.

    Args:
        module: the original, which stays as it is.
        deltas: by the submodules' paths relative to the module.
        path: path of the module with a dot at its end, for error messages.
    """
    if not deltas:
        return module
    new = copy(module)
    for name in {relative.partition(".")[0] for relative in deltas}:
        inner = {
            rest: delta
            for relative, delta in deltas.items()
            if (rest := relative.partition(".")[2]) and relative.partition(".")[0] == name
        }
        if inner:
            setattr(new, name, _with_deltas(new[name], inner, f"{path}{name}."))
        else:
            setattr(new, name, adapted_module(new[name], deltas[name], f"{path}{name}"))
    return new


def adapted_module(module: nn.Module, delta: Delta, path: str, dropout: float = 0.0) -> nn.Module:
    """A linear layer with a delta, as one of mlx-lm's LoRA or DoRA modules.

    Raises:
        CheckpointError: the module is not linear, or it is quantized in a mode that DoRA does not support.
    """
    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)) and delta.magnitude is None:
        experts, rank, width = delta.a.shape
        new: Any = LoRASwitchLinear(width, delta.b.shape[1], experts, rank, dropout, delta.scale)
        new.linear, new.lora_a, new.lora_b = module, delta.a, delta.b
        return new
    if not isinstance(module, (nn.Linear, nn.QuantizedLinear)):
        raise CheckpointError(f"The adapter changes {path}, which does not support this kind of change.")
    if delta.magnitude is not None and getattr(module, "mode", "affine") != "affine":
        raise CheckpointError(
            f"The adapter is a DoRA, which {path} does not support in {module.mode}; use affine weights."
        )
    kind = LoRALinear if delta.magnitude is None else DoRALinear
    new = kind(delta.a.shape[1], delta.b.shape[0], delta.a.shape[0], dropout, delta.scale)
    if delta.magnitude is None:
        new.linear = module
    else:
        new.set_linear(module)
        new.m = delta.magnitude
    new.lora_a, new.lora_b = delta.a.T, delta.b.T
    return new


def target_paths(model: DiffusionGemma, groups: tuple[str, ...], layers: int | None = None) -> list[str]:
    """Paths of the modules in some target groups.

    Args:
        model: the model to look in.
        groups: names in `GROUPS`, or "self-conditioning".
        layers: only the last so many layers; None for all. Self-conditioning is always included.

    Raises:
        OptionError: an unknown group, or more layers than the model has.
    """
    known = (*GROUPS, "self-conditioning")
    for group in groups:
        if group not in known:
            raise OptionError(f"There is no target {group!r}; choose from {', '.join(known)}.")
    all_layers = model.model.decoder.layers
    if layers is not None and not 1 <= layers <= len(all_layers):
        raise OptionError(f"layers is {layers}; the model has {len(all_layers)}.")
    paths = []
    for i in range(len(all_layers) - (layers or len(all_layers)), len(all_layers)):
        for name in (name for group in groups for name in GROUPS.get(group, ())):
            parent, _, leaf = name.partition(".")
            if leaf in all_layers[i][parent]:  # layers with full attention have no v_proj
                paths.append(f"{LAYERS}{i}.{name}")
    return paths + (list(SELF_CONDITIONING) if "self-conditioning" in groups else [])


def add_adapter(
    model: DiffusionGemma, paths: list[str], rank: int, scale: float, dropout: float, dora: bool, key: mx.array
) -> None:
    """Add a new adapter to a model, for training.

    At first it changes nothing: a is uniform in +-1 / sqrt(in), b is zero.

    Args:
        model: changed in place.
        paths: of the modules to adapt, see `target_paths`.
        rank: r of the deltas.
        scale: factor of b @ a.
        dropout: probability with which an input of a is dropped.
        dora: True for DoRA, False for LoRA.
        key: random key for a.

    Raises:
        OptionError: DoRA of modules that do not support it, or a model that already has an adapter.
    """
    if model._encoder_layers is not None or any(isinstance(module, _ADAPTED) for module in model.modules()):
        raise OptionError("The model already has an adapter; load it without one.")
    changes = {}
    for path, own_key in zip(paths, mx.random.split(key, len(paths))):
        module = _module(model, path)
        *experts, out, width = module.weight.shape
        if hasattr(module, "bits"):  # quantized: 32 bits per stored element
            width = width * 32 // module.bits
        bound = width**-0.5
        a = mx.random.uniform(-bound, bound, (*experts, rank, width), key=own_key)
        if dora and isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            raise OptionError("DoRA does not support experts; leave experts out of --targets, or use lora.")
        magnitude = mx.linalg.norm(dequantized_weight(module).astype(mx.float32), axis=1) if dora else None
        delta = Delta(a, mx.zeros((*experts, out, rank)), scale, magnitude)
        changes[path] = adapted_module(module, delta, path, dropout)
    model.update_modules(tree_unflatten(list(changes.items())))


def add_denoising_adapter(model: DiffusionGemma, add: Callable[[], None]) -> None:
    """Let `add` put an adapter into a model whose encoder keeps the layers that it has: only denoising is changed."""
    layers = tuple(_copy_of_modules(layer) for layer in model.model.decoder.layers)
    add()
    model._encoder_layers = layers


def _copy_of_modules(module: nn.Module) -> Any:
    """The same tree of modules with the same arrays; what replaces a module in the one leaves the other as it is."""
    new = copy(module)
    for name, child in module.children().items():
        if isinstance(child, nn.Module):
            setattr(new, name, _copy_of_modules(child))
    return new


@contextmanager
def without_adapter(model: DiffusionGemma) -> Iterator[None]:
    """The model as it was before `add_adapter` added a LoRA, for graphs that are built inside."""
    adapted = [module for module in model.modules() if isinstance(module, (LoRALinear, LoRASwitchLinear))]
    scales = [module.scale for module in adapted]
    for module in adapted:
        module.scale = 0.0
    try:
        yield
    finally:
        for module, scale in zip(adapted, scales):
            module.scale = scale


def extract_adapter(model: DiffusionGemma) -> Adapter:
    """The current state of the adapter that `add_adapter` added to a model.

    It is the same in both modes, or changes denoising alone where `add_denoising_adapter` added it.
    """
    deltas = {path: _delta(module) for path, module in model.named_modules() if isinstance(module, _ADAPTED)}
    both = model._encoder_layers is None
    return Adapter({path: delta for path, delta in deltas.items() if both and path.startswith(LAYERS)}, deltas)


def _delta(module: Any) -> Delta:
    """The delta of an adapted module."""
    a, b = module.lora_a, module.lora_b
    if not isinstance(module, LoRASwitchLinear):
        a, b = a.T, b.T
    return Delta(a, b, module.scale, module.m if isinstance(module, DoRALinear) else None)


def dequantized_weight(module: Any) -> mx.array:
    """The weight of a linear layer, dequantized if necessary."""
    if "scales" not in module:
        return module.weight
    return mx.dequantize(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
    )
