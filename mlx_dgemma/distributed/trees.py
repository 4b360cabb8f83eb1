"""Trees of arrays over a group, such as gradients. Small arrays share a message, since each message has its latency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from .group import Group

MESSAGE_BYTES = 2**25


def sum_tree(group: Group, tree: Any) -> Any:
    """The sum of the ranks' trees, which have the same shapes and dtypes; the same bits on every rank, and lazy."""
    if group.size == 1:
        return tree
    summed: dict[str, mx.array] = {}
    for message in _messages(tree):
        flat = group.sum_together(*(array.reshape(-1) for _, array in message))
        summed |= {path: one for (path, _), one in zip(message, flat)}
    return tree_map_with_path(lambda path, array: summed[path].reshape(array.shape), tree)


def share_tree(group: Group, tree: Any) -> Any:
    """Rank 0's tree on every rank, bit for bit; the others' must have the same shapes and dtypes. It is evaluated."""
    if group.size == 1:
        return tree
    shared: dict[str, mx.array] = {}
    for message in _messages(tree):
        sent = [np.asarray(array.reshape(-1).view(mx.uint8)) for _, array in message]  # sums would lose -0.0
        received = group.share_array(np.concatenate(sent))
        cuts = np.split(received, np.cumsum([len(one) for one in sent])[:-1])
        shared |= {path: mx.array(cut).view(array.dtype) for (path, array), cut in zip(message, cuts)}
    shaped = tree_map_with_path(lambda path, array: shared[path].reshape(array.shape), tree)
    mx.eval(shaped)
    return shaped


def _messages(tree: Any) -> Iterator[list[tuple[str, mx.array]]]:
    """Runs of arrays of one dtype, with their paths, and of at most `MESSAGE_BYTES` unless one alone has more.

    They are in the order of their paths: that of a tree's keys may differ between ranks.
    """
    pairs: Any = sorted(tree_flatten(tree), key=lambda pair: pair[0])
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
