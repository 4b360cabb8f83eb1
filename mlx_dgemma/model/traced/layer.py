"""Layers of a pass over a canvas or over tokens ahead, traced once for each kind of layer and replayed for all of it.

Building the graph of a pass takes the host as long as a GPU needs for it, or longer. Here a layer's weights are
arguments of its trace, so one trace serves all layers whose modules are alike. Making it costs a few layers' building:
it pays within the pass that makes it, and what is replayed depends on a request's shapes alone, never on earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..attention import LayerContext
from ..cache.quantized import QuantizedKV
from ..kv_cache import LayerKV

KEPT = 32  # traces; every length of a prefix and every width of a canvas needs one or two
KINDS = 6  # of layers that are traced; a model of many would make more traces than it replays
CHANGING = frozenset({"_no_grad", "_training"})  # attributes of a module that a pass without gradients never reads
PLACE = ...  # of an array
ADAPTED = "lora_a"  # an array of the modules that adapters put in place of others

Run = Callable[[Any, mx.array, mx.array, LayerContext], mx.array]


class LayerTraces:
    """Computes a layer as `run` does, by a trace where there can be one.

    Not traced are passes of the encoder that extend a prefix, padding, masks that are arrays, caches that are empty,
    quantized ones ahead of a prefix, layers with an adapter, and those of further kinds than `KINDS`.

    Args:
        run: computes (layer, h, scalar, context) -> h.
    """

    def __init__(self, run: Run):
        self._run = run
        self._traces: dict[Any, Callable[..., Any]] = {}
        self._anatomies: dict[int, Anatomy] = {}
        self._kinds: dict[Any, int] = {}

    def __call__(self, layer: Any, h: mx.array, scalar: mx.array, context: LayerContext) -> mx.array:
        """h [B, L, H] -> [B, L, H]; keys and values are written as the layer itself would write them."""
        anatomy = self._anatomy(layer)
        key = None if anatomy.kind is None else _key(h, context)
        if key is None:
            return self._run(layer, h, scalar, context)
        key = anatomy.kind, *key
        trace = self._traces.pop(key, None)
        if trace is None:
            while len(self._traces) >= KEPT:
                del self._traces[next(iter(self._traces))]
            trace = mx.compile(self._traced(_without_arrays(layer), context))
        self._traces[key] = trace  # the newest stands last
        buffers = [[array for array in cache.arrays if array is not None] for cache in context.caches]
        h, written = trace(anatomy.arrays(), h, scalar, buffers, context.turn or ())
        for cache, (arrays, fresh, stages) in zip(context.caches, written):
            cache.arrays, cache.fresh, cache.stages = arrays, fresh, stages
        return h

    def drop(self) -> None:
        """Drop the traces."""
        self._traces.clear()

    def forget(self) -> None:
        """Drop the traces, and what is known of layers."""
        self.drop()
        self._anatomies.clear()
        self._kinds.clear()

    def _anatomy(self, layer: nn.Module) -> Anatomy:
        found = self._anatomies.get(id(layer))
        if found is None or not found.holds():
            found = self._anatomies[id(layer)] = Anatomy(layer)
            kind = None if found.told is None else self._kinds.setdefault(found.told, len(self._kinds))
            found.kind = kind if kind is not None and kind < KINDS else None
        return found

    def _traced(self, empty: Any, context: LayerContext) -> Callable[..., Any]:
        """A function of all arrays; `empty` is a layer without any."""
        run, bare = self._run, [_without_buffers(cache) for cache in context.caches]
        context = context._replace(caches=bare, turn=None)

        def layer_of(arrays: list[mx.array], h: mx.array, scalar: mx.array, buffers: Any, turn: Any) -> Any:
            layer, caches = _filled(empty, iter(arrays)), [copy(one) for one in bare]
            for cache, own in zip(caches, buffers):
                cache.arrays = (*own, *[None] * (len(cache.names) - len(own)))
                if isinstance(cache, QuantizedKV):
                    cache.unpack = layer.self_attn.unpack
            h = run(layer, h, scalar, context._replace(caches=caches, turn=turn or None))
            return h, [(cache.arrays, cache.fresh, cache.stages) for cache in caches]

        return layer_of


def _key(h: mx.array, context: LayerContext) -> Any:
    """What the graph of a layer depends on besides its modules; None: it is not traced."""
    if not context.canvas:
        return None
    rows = []
    for cache, mask, offset in zip(context.caches, context.masks, context.offsets):
        if type(cache) not in (LayerKV, QuantizedKV) or cache.arrays[0] is None or cache.padding is not None:
            return None
        if isinstance(cache, QuantizedKV) and mask.queries is not None:
            return None  # what it reads depends on its buffers' sizes
        if mask.queries is not None and (context.turn is None or mask.leading is None):
            return None  # it would take the mask as an array
        # Behind a full ring all canvases are alike: where they stand is known to RoPE's angles alone.
        slots = cache.window_slots, cache.capacity, cache.used(offset)
        kind = (cache.bits, cache.by_kernel, cache.keys is None) if isinstance(cache, QuantizedKV) else None
        rows.append((kind, *slots, len(mask.keys), mask.queries is None, mask.leading))
    place = None if context.turn is not None else tuple(context.offsets)
    return h.shape, context.narrow, place, tuple(rows)


class Anatomy:
    """The modules and the arrays of a layer, and what a trace must know of it.

    Args:
        layer: a tree of modules.

    Attributes:
        told: all that tells what the layer computes but for its arrays' numbers; None: it is not traced.
        kind: a number that layers share of which the same is told; None: it is not traced.
    """

    kind: int | None

    def __init__(self, layer: nn.Module):
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._places: list[tuple[nn.Module, str]] = []
        told: list[Any] = []
        self.layer, self.told = layer, tuple(told) if self._describe(layer, told) and _hashable(told) else None

    def arrays(self) -> list[mx.array]:
        """The present arrays."""
        return [module[name] for module, name in self._places]

    def holds(self) -> bool:
        """Whether the layer still consists of the same modules."""
        return all(parent.get(name) is child for parent, name, child in self._children)

    def _describe(self, module: nn.Module, told: list[Any]) -> bool:
        told.append(type(module))
        for name, value in module.items():
            told.append(name)
            if isinstance(value, mx.array):
                self._places.append((module, name))
            elif isinstance(value, nn.Module):
                self._children.append((module, name, value))
                if not self._describe(value, told):
                    return False
            elif value is not None:
                return False
        told.extend(one for one in vars(module).items() if one[0] not in CHANGING)
        return ADAPTED not in module


def _hashable(values: list[Any]) -> bool:
    try:
        hash(tuple(values))
    except TypeError:
        return False
    return True


def _without_arrays(module: nn.Module) -> Any:
    """A copy of a tree of modules, in which `PLACE` stands for every array."""
    new = copy(module)
    for name, value in module.items():
        if isinstance(value, mx.array):
            new[name] = PLACE
        elif isinstance(value, nn.Module):
            new[name] = _without_arrays(value)
    return new


def _filled(empty: nn.Module, arrays: Iterator[mx.array]) -> Any:
    """A copy of a tree of modules with arrays in their places, in the order of `Anatomy`."""
    new = copy(empty)
    for name, value in empty.items():
        if value is PLACE:
            new[name] = next(arrays)
        elif isinstance(value, nn.Module):
            new[name] = _filled(value, arrays)
    return new


def _without_buffers(cache: LayerKV) -> LayerKV:
    new = copy(cache)
    new.arrays = (None,) * len(new.names)
    new.fresh, new.stages = (), []
    if isinstance(new, QuantizedKV):
        del new.unpack  # it holds a layer's arrays
    return new
