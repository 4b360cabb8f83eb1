"""What the linear maps of a layer see, and how the result depends on what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


@dataclass(frozen=True)
class Seen:
    """One call of a linear map.

    Attributes:
        x: its input, [..., in]; of experts one row for each expert that was chosen.
        indices: of experts, the expert of each row; None for other maps.
        shape: of its output, [..., out].
    """

    x: mx.array
    indices: mx.array | None
    shape: tuple[int, ...]


class Tap(nn.Module):
    """A linear map that notes what it is called with, and adds to its output what is given.

    Args:
        linear: the map; a `SwitchLinear` is called with the experts of its rows.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self._seen: list[Seen] = []
        self._added: list[mx.array] = []

    @property
    def num_experts(self) -> int:
        """Of a `SwitchLinear`."""
        return self.linear.num_experts

    def __call__(self, x: mx.array, indices: mx.array | None = None, sorted_indices: bool = False) -> mx.array:
        """As the map itself."""
        y = self.linear(x) if indices is None else self.linear(x, indices, sorted_indices=sorted_indices)
        if self._added:
            return y + self._added.pop(0)
        self._seen.append(Seen(x, indices, y.shape))
        return y


@contextmanager
def tapped(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tap]]:
    """Put taps in front of these maps of a module, by their paths in it; they are gone at the end."""
    inner = dict(module.named_modules())
    taps = {name: Tap(inner[name]) for name in names}
    module.update_modules(tree_unflatten(list(taps.items())))
    try:
        yield taps
    finally:
        module.update_modules(tree_unflatten([(name, tap.linear) for name, tap in taps.items()]))


def calls(taps: dict[str, Tap], function: Callable[[], object]) -> dict[str, list[Seen]]:
    """What each map is called with while a function runs, evaluated with its result."""
    result = function()
    found = {name: list(tap._seen) for name, tap in taps.items()}
    mx.eval(result, [[one.x, one.indices] for seen in found.values() for one in seen if one.indices is not None])
    mx.eval([one.x for seen in found.values() for one in seen])
    for tap in taps.values():
        tap._seen.clear()
    return found


def pulled_back(
    taps: dict[str, Tap],
    seen: dict[str, list[Seen]],
    function: Callable[..., tuple[mx.array, ...]],
    primals: Sequence[mx.array],
    cotangents: Sequence[mx.array],
) -> tuple[dict[str, list[mx.array]], list[mx.array]]:
    """Gradients with respect to what the maps give and to a function's inputs.

    Args:
        taps, seen: the maps, and their calls during the function, from `calls`.
        function: of the primals.
        primals: its inputs.
        cotangents: of its outputs.

    Returns:
        For each map one gradient a call, in the shape of its output; and the gradients of the inputs.
    """
    places = [(name, i) for name, some in seen.items() for i in range(len(some))]
    zeros = [mx.zeros(seen[name][i].shape, seen[name][i].x.dtype) for name, i in places]

    def added(*arrays: mx.array) -> list[mx.array]:
        for (name, _), extra in zip(places, arrays):
            taps[name]._added.append(extra)
        return list(function(*arrays[len(places) :]))

    _, found = mx.vjp(added, [*zeros, *primals], list(cotangents))
    mx.eval(found)
    gradients: dict[str, list[mx.array]] = {name: [] for name in seen}
    for (name, _), one in zip(places, found):
        gradients[name].append(one)
    return gradients, found[len(places) :]
