"""Trees of arrays over a group, such as gradients. Small arrays share a message, since each message has its latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from .group import Group

MESSAGE_BYTES = 2**25


def sum_tree(group: Group, tree: Any) -> Any:
    """The sum of the ranks' trees, which have the same shapes and dtypes; the same bits on every rank, and lazy."""
    if group.size == 1:
        return tree
    pairs: Any = tree_flatten(tree)
    summed: dict[str, mx.array] = {}
    for message in _messages(pairs):
        flat = group.sum_together(*(array.reshape(-1) for _, array in message))
        summed |= {path: one for (path, _), one in zip(message, flat)}
    return tree_map_with_path(lambda path, array: summed[path].reshape(array.shape), tree)


def share_tree(group: Group, tree: Any) -> Any:
    """Rank 0's tree on every rank, bit for bit; the others' must have the same shapes and dtypes. It is evaluated."""
    if group.size == 1:
        return tree
    # As bytes: a sum of floats would lose the sign of zeros, and not every backend sums every dtype.
    sent = tree_map(lambda a: a.reshape(-1).view(mx.uint8) if group.rank == 0 else mx.zeros(a.nbytes, mx.uint8), tree)
    shared = tree_map(lambda a, own: a.view(own.dtype).reshape(own.shape), sum_tree(group, sent), tree)
    mx.eval(shared)
    return shared


def _messages(pairs: Sequence[tuple[str, mx.array]]) -> Iterator[list[tuple[str, mx.array]]]:
    """Runs of arrays of one dtype and of at most `MESSAGE_BYTES`, unless one alone has more."""
    message: list[tuple[str, mx.array]] = []
    held = 0
    for path, array in pairs:
        if message and (array.dtype != message[0][1].dtype or held + array.nbytes > MESSAGE_BYTES):
            yield message
            message, held = [], 0
        message.append((path, array))
        held += array.nbytes
    if message:
        yield message
