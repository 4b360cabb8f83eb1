"""The pass over one token, traced once for many lengths of the prefix.

Building the graph of a pass takes the host as long as a GPU needs for it, or longer: a thousand operations, and the
source of every custom kernel put together anew. A trace is replayed without that. What is computed is the same.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..config import TextConfig
from ..functions import finite
from ..kv_cache import BUFFER_STEP, LayerKV, Prefix
from .prefix import Slots, TracedKV, TracedMask, TracedPrefix

KEPT = 4  # traces; a longer prefix or larger buffers need new ones
BEFORE = 4  # tokens behind which the first trace is compared
PARTS = 8  # slots of a trace are a multiple of the largest power of two in so many parts of them

Run = Callable[[mx.array, list[Any], list[Any]], mx.array]  # (tokens [1, 1], prefixes, masks by layer type) -> states


class TokenPass:
    """Encodes one token of one row behind a prefix, by a trace.

    Before the first, a pass is computed both ways; if they differ, or a trace cannot be made, there are none from then
    on.

    Args:
        run: a bound method of the model, which is not kept alive.
        config: the text stack's sizes.

    Attributes:
        usable: whether traces are made.
        trusted: whether one was compared with the pass that it was made of.
    """

    def __init__(self, run: Run, config: TextConfig):
        self._run, self._config = weakref.WeakMethod(run), config
        self._traces: dict[Any, Callable[..., Any]] = {}
        self.usable, self.trusted = True, False

    def __call__(self, tokens: mx.array, prefixes: Sequence[Prefix]) -> mx.array | None:
        """Hidden states [1, 1, H], and keys and values in the prefix's free slots; None: there is no trace for this.

        Args:
            tokens: [B, L] int32.
            prefixes: as `DiffusionGemma.encode_ahead` takes them.
        """
        slots = self._slots(prefixes[0]) if self.usable and tokens.size == 1 else None
        if slots is None:
            return None
        return (self._replay if self.trusted else self._first)(tokens, prefixes[0], slots)

    def forget(self) -> None:
        """Drop the traces, which hold the weights that they were made with."""
        self._traces.clear()

    def _slots(self, prefix: Prefix) -> dict[str, Slots] | None:
        """What is known of the slots by layer type; None: this pass cannot be traced, or buffers must grow first."""
        if prefix.padding is not None or any(type(layer) is not LayerKV for layer in prefix.layers):
            return None
        found: dict[str, Slots] = {}
        for layer, kind in zip(prefix.layers, self._config.layer_types):
            used, have = layer.used(prefix.offset), 0 if layer.keys is None else layer.keys.shape[2]
            if used >= have or have % BUFFER_STEP:
                return None
            full = used == layer.window_slots
            found[kind] = Slots(used + 1 if full else min(rounded(used + 1), have), full)
        return found

    def _replay(self, tokens: mx.array, prefix: Prefix, slots: dict[str, Slots]) -> mx.array:
        buffers = [(layer.keys, layer.values) for layer in prefix.layers]
        shapes = tuple(keys.shape[2] for keys, _ in buffers if keys is not None)
        key = tuple(sorted(slots.items())), shapes
        if key not in self._traces:
            while len(self._traces) >= KEPT:
                del self._traces[next(iter(self._traces))]
            self._traces[key] = mx.compile(self._traced(slots, [layer.window_slots for layer in prefix.layers]))
        hidden, written = self._traces[key](tokens, mx.array([prefix.offset], mx.int32), buffers)
        for layer, (arrays, fresh) in zip(prefix.layers, written):
            layer.arrays, layer.fresh, layer.stages = arrays, fresh, []
        return hidden

    def _traced(self, slots: dict[str, Slots], windows: list[int | None]) -> Callable[..., Any]:
        run, types = self._run, self._config.layer_types

        def token_pass(tokens: mx.array, offset: mx.array, buffers: list[tuple[mx.array, mx.array]]) -> Any:
            layers = [
                TracedKV(keys, values, offset, slots[kind], window)
                for (keys, values), kind, window in zip(buffers, types, windows)
            ]
            masks = {kind: TracedMask(offset, one) for kind, one in slots.items()}
            bound = run()
            assert bound is not None
            hidden = bound(tokens, [TracedPrefix(layers, offset)], [masks])
            return hidden, [(layer.arrays, layer.fresh) for layer in layers]

        return token_pass

    def _first(self, tokens: mx.array, prefix: Prefix, slots: dict[str, Slots]) -> mx.array:
        """Both ways of a pass, behind a prefix of their own: a request's buffers would be held twice."""
        run, own = self._run(), Prefix(self._config, capacity=BUFFER_STEP)
        assert run is not None
        run(mx.zeros((1, BEFORE), tokens.dtype), [own], [own.encode_masks(BEFORE)])
        own.accept(BEFORE)
        expected = run(tokens, [own], [own.encode_masks(1)])
        mx.eval(expected, own.state)
        try:
            found = self._replay(tokens, own, self._slots(own) or slots)
            mx.eval(found)
            self.trusted = agree(expected, found)
            reason = "they compute something else here"
            numbers = self.trusted or finite(expected).all()  # what is not finite tells nothing
        except (RuntimeError, ValueError) as error:
            reason, numbers = str(error).strip().partition("\n")[0], True
        self.forget()
        if self.trusted:
            return self._replay(tokens, prefix, slots)
        if numbers:
            self.usable = False
            said = f"Traced passes are not used, which costs speed token by token ({reason}); please report it."
            warnings.warn(said, stacklevel=2)
        return run(tokens, [prefix], [prefix.encode_masks(1)])


def rounded(count: int) -> int:
    """Slots of a trace for so many: at most an eighth more than are needed, and no fewer than buffers grow by."""
    unit = max(BUFFER_STEP, 1 << max(count // PARTS, 1).bit_length() - 1)
    return -(-count // unit) * unit


def agree(expected: mx.array, found: mx.array) -> bool:
    """Whether hidden states are equal up to roundings, which grow from layer to layer."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    a, b = (one.astype(mx.float32) for one in (expected, found))
    tolerance = 1e-2 if expected.dtype == mx.float32 else 0.5
    return bool((mx.linalg.norm(a - b) <= tolerance * mx.linalg.norm(a)).item())
