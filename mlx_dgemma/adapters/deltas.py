"""Adapters: low-rank changes of linear maps (LoRA, DoRA), put into a model and taken out of it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from ..errors import CheckpointError, OptionError
from ..model.diffusion_gemma import DiffusionGemma

LAYERS = "model.decoder.layers."
GROUPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("router.proj",),
}
"""What can be adapted in every layer; "self-conditioning" is the decoder's, once."""
SELF_CONDITIONING = tuple(f"model.decoder.self_conditioning.{name}_proj" for name in ("gate", "up", "down"))
_ADAPTED = (LoRALinear, DoRALinear, LoRASwitchLinear)


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear map W [out, in]: scale * b @ a.

    With a magnitude the result is DoRA's (arXiv 2402.09353): every row of W + scale * b @ a is brought to its length.

    Attributes:
        a: [r, in] float32; of experts [E, r, in].
        b: [out, r] float32; of experts [E, out, r].
        scale: factor of the product.
        magnitude: [out] float32, or None.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.a.nbytes + self.b.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def on(self, weight: mx.array) -> mx.array:
        """The changed weight, float32, of W [out, in] or of experts' [E, out, in]."""
        weight = weight.astype(mx.float32) + self.scale * (self.b @ self.a)
        if self.magnitude is not None:
            weight = weight * (self.magnitude / mx.linalg.norm(weight, axis=1))[:, None]
        return weight

    def same(self, other: Delta | None) -> bool:
        """Whether the other one is equal, bit for bit."""
        if other is None or self.scale != other.scale or (self.magnitude is None) != (other.magnitude is None):
            return False
        pairs = [(self.a, other.a), (self.b, other.b)]
        if self.magnitude is not None and other.magnitude is not None:
            pairs.append((self.magnitude, other.magnitude))
        return all(a is b or mx.array_equal(a, b).item() for a, b in pairs)


@dataclass(frozen=True)
class Adapter:
    """Changes by the path of the module that they belong to, such as "model.decoder.layers.0.self_attn.q_proj".

    The encoder and the decoder share their layers' weights, but what is added to them may differ by mode. Both dicts
    name the layers by the decoder's paths.
    """

    encode: dict[str, Delta]
    denoise: dict[str, Delta]

    @property
    def shared(self) -> bool:
        """Whether both modes change their layers alike."""
        paths = {path for path in (*self.encode, *self.denoise) if path.startswith(LAYERS)}
        return all(path in self.encode and self.encode[path].same(self.denoise.get(path)) for path in paths)

    @property
    def changes(self) -> dict[str, Delta]:
        """Those of both modes by path; the encoder's where they differ."""
        return {**self.denoise, **self.encode}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; what is shared counts once."""
        return sum({id(one): one.nbytes for mode in (self.encode, self.denoise) for one in mode.values()}.values())


def apply(model: DiffusionGemma, adapter: Adapter) -> None:
    """Put an adapter into a model, for generation.

    Where the modes differ, the encoder gets layers of its own, which share every weight with the decoder's.

    Raises:
        CheckpointError: a change that belongs to no module of this model, or a DoRA that it cannot take.
    """
    decoder = model.model.decoder

    def layers(changes: dict[str, Delta]) -> list[Any]:
        own = {path.removeprefix(LAYERS): delta for path, delta in changes.items() if path.startswith(LAYERS)}
        parts = [
            {p[len(f"{i}.") :]: d for p, d in own.items() if p.startswith(f"{i}.")} for i in range(len(decoder.layers))
        ]
        return [_changed(layer, part, f"{LAYERS}{i}.") for i, (layer, part) in enumerate(zip(decoder.layers, parts))]

    both = adapter.changes
    for path in both:
        _module(model, path)
    encoder = None if adapter.shared else tuple(layers(adapter.encode))
    decoder.layers, model._encoder_layers = layers(adapter.denoise), encoder
    alone = {path: adapted(_module(model, path), d, path) for path, d in both.items() if not path.startswith(LAYERS)}
    model.update_modules(tree_unflatten(list(alone.items())))
    mx.eval(model.parameters(), [layer.parameters() for layer in encoder or ()])


def _module(model: nn.Module, path: str) -> Any:
    found: Any = model
    try:
        for name in path.split("."):
            found = found[int(name)] if isinstance(found, list) else found[name]
    except (KeyError, IndexError, ValueError, TypeError):
        raise CheckpointError(
            f"The adapter changes {path}, which this model does not have; it is another one's."
        ) from None
    return found


def _changed(module: nn.Module, deltas: dict[str, Delta], path: str) -> nn.Module:
    """A module with changes inside, by relative path; it shares everything else with the one given."""
    new = copy(module) if deltas else module
    for name in {one.partition(".")[0] for one in deltas}:
        own = {rest: d for p, d in deltas.items() if (rest := p.partition(".")[2]) and p.partition(".")[0] == name}
        inner = f"{path}{name}"
        setattr(new, name, _changed(new[name], own, f"{inner}.") if own else adapted(new[name], deltas[name], inner))
    return new


def adapted(module: nn.Module, delta: Delta, path: str, dropout: float = 0.0) -> nn.Module:
    """A linear map with a change beside it, as a module of mlx-lm's.

    Raises:
        CheckpointError: the module is no linear map, or one whose packing DoRA cannot be computed with.
    """
    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)) and delta.magnitude is None:
        experts, rank, width = delta.a.shape
        new: Any = LoRASwitchLinear(width, delta.b.shape[1], experts, rank, dropout, delta.scale)
        new.linear, new.lora_a, new.lora_b = module, delta.a, delta.b
        return new
    if not isinstance(module, (nn.Linear, nn.QuantizedLinear)):
        raise CheckpointError(f"The adapter changes {path}, which takes no such change.")
    if delta.magnitude is not None and getattr(module, "mode", "affine") != "affine":
        raise CheckpointError(f"The adapter is a DoRA, which {path} in {module.mode} cannot take; use affine weights.")
    kind = LoRALinear if delta.magnitude is None else DoRALinear
    new = kind(delta.a.shape[1], delta.b.shape[0], delta.a.shape[0], dropout, delta.scale)
    if delta.magnitude is None:
        new.linear = module
    else:
        new.set_linear(module)
        new.m = delta.magnitude
    new.lora_a, new.lora_b = delta.a.T, delta.b.T
    return new


def targets(model: DiffusionGemma, groups: tuple[str, ...], layers: int | None = None) -> list[str]:
    """Paths of the modules of some `GROUPS`, in the last `layers` layers (None: all), self-conditioning included.

    Raises:
        OptionError: an unknown group, or more layers than there are.
    """
    known = (*GROUPS, "self-conditioning")
    for group in groups:
        if group not in known:
            raise OptionError(f"There is no target {group!r}; take some of {', '.join(known)}.")
    held = model.model.decoder.layers
    if layers is not None and not 1 <= layers <= len(held):
        raise OptionError(f"layers is {layers}; the model has {len(held)}.")
    found = []
    for i in range(len(held) - (layers or len(held)), len(held)):
        for name in (name for group in groups for name in GROUPS.get(group, ())):
            parent, _, leaf = name.partition(".")
            if leaf in held[i][parent]:  # full layers have no v_proj
                found.append(f"{LAYERS}{i}.{name}")
    return found + (list(SELF_CONDITIONING) if "self-conditioning" in groups else [])


def start(
    model: DiffusionGemma, paths: list[str], rank: int, scale: float, dropout: float, dora: bool, key: mx.array
) -> None:
    """Put an adapter that changes nothing yet into a model: a is uniform within 1 / sqrt(in), b is zero.

    Raises:
        OptionError: DoRA of modules that it cannot be computed for, or a model that has an adapter already.
    """
    if model._encoder_layers is not None or any(isinstance(module, _ADAPTED) for module in model.modules()):
        raise OptionError("The model has an adapter already; load it without one.")
    changes = {}
    for path, own in zip(paths, mx.random.split(key, len(paths))):
        module = _module(model, path)
        switch = isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
        packed = module.bits if hasattr(module, "bits") else None
        *experts, out, width = module.weight.shape
        width = width * 32 // packed if packed else width
        bound = width**-0.5
        a = mx.random.uniform(-bound, bound, (*experts, rank, width), key=own)
        if dora and switch:
            raise OptionError("DoRA is not defined for experts here; leave experts out of --targets, or take lora.")
        magnitude = mx.linalg.norm(plain_weight(module).astype(mx.float32), axis=1) if dora else None
        changes[path] = adapted(module, Delta(a, mx.zeros((*experts, out, rank)), scale, magnitude), path, dropout)
    model.update_modules(tree_unflatten(list(changes.items())))


def taken(model: DiffusionGemma) -> Adapter:
    """The adapter that `start` put into a model, as it is now: the same in both modes."""
    found = {path: _delta(module) for path, module in model.named_modules() if isinstance(module, _ADAPTED)}
    return Adapter({path: d for path, d in found.items() if path.startswith(LAYERS)}, found)


def _delta(module: Any) -> Delta:
    """What an adapted module adds."""
    a, b = module.lora_a, module.lora_b
    if not isinstance(module, LoRASwitchLinear):
        a, b = a.T, b.T
    return Delta(a, b, module.scale, module.m if isinstance(module, DoRALinear) else None)


def plain_weight(module: Any) -> mx.array:
    """The weight of a linear map, unpacked."""
    if "scales" not in module:
        return module.weight
    return mx.dequantize(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
    )
