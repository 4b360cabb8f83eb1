"""Custom kernels for GPUs: each does in one launch what takes MLX several. The plain way is their fallback and oracle.

A step of the release launches some 2,300 of MLX's kernels, most of them short. These nine take the place of half of
them. They have no gradient. `check` compares them with the plain way on the device, before a model uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from ..device import on_metal
from . import sources

THREADS = 256  # of a group
ROW_THREADS = 512  # of a group that takes a whole row
LAYOUT_THREADS = 512  # of the one group that lays out rows; a model with more experts takes the plain way
MAX_TOP_K = 32  # lanes of a wave


@cache
def _compiled(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], constants: tuple[tuple[str, float], ...]):
    """A kernel by the name of its source. MLX compiles it anew for every set of integers and dtypes."""
    body = getattr(sources, name)
    given = "".join(f"#define {key} ({value!r}f)\n" for key, value in constants)
    make: Callable[..., Any]
    if on_metal():
        header, place, make = sources.METAL_PRELUDE, sources.METAL_PLACE, mx.fast.metal_kernel
    else:
        header, place, make = sources.CUDA_PRELUDE, sources.CUDA_PLACE, mx.fast.cuda_kernel
    return make(
        name=name.lower(),
        input_names=list(inputs),
        output_names=list(outputs),
        source=place + body,
        header=given + header,
    )


def _launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    groups: int,
    threads: int,
    integers: dict[str, Any],
    **constants: float,
) -> list[mx.array]:
    """Run a kernel with `groups` groups of `threads` threads; outputs by name with (shape, dtype)."""
    kernel = _compiled(name, tuple(inputs), tuple(outputs), tuple(constants.items()))
    return kernel(
        inputs=list(inputs.values()),
        template=list(integers.items()),
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )


LOWEST = -3.4028234663852886e38  # the least float32


def add_and_norm(
    x: mx.array,
    y: mx.array,
    norm: mx.array,
    dense_norm: mx.array,
    experts_norm: mx.array,
    router_scale: mx.array,
    eps: float,
) -> list[mx.array]:
    """x + norm(y), and what the dense branch, the experts and the router take of it: four arrays like x [B, L, H]."""
    size = x.shape[-1]
    of_row = x.shape, x.dtype
    return _launch(
        "ADD_AND_NORM",
        {
            "x": x, "y": y, "norm": norm, "dense_norm": dense_norm, "experts_norm": experts_norm,
            "router_scale": router_scale,
        },
        {"total": of_row, "for_dense": of_row, "for_experts": of_row, "for_router": of_row},
        x.size // size, ROW_THREADS, {"T": x.dtype, "H": size, "THREADS": ROW_THREADS}, EPS=eps, ROOT=size**-0.5,
    )  # fmt: skip


def combine(
    x: mx.array,
    dense: mx.array,
    experts: mx.array,
    slots: mx.array,
    shares: mx.array,
    norms: tuple[mx.array, mx.array, mx.array],
    scalar: mx.array,
    eps: float,
) -> mx.array:
    """(x + norm(norm(dense) + norm(sum of the experts' rows))) * scalar, [B, L, H].

    Args:
        x: [B, L, H].
        dense: [B, L, H], the dense branch.
        experts: [S, H], a row for every slot.
        slots: [N, K] int32, the slots of each position.
        shares: [N, K], their weights.
        norms: weights [H] of the norms of the dense branch, of the experts and of both.
        scalar: [1].
        eps: of the norms.
    """
    size, top_k = x.shape[-1], shares.shape[-1]
    dense_norm, experts_norm, norm = norms
    return _launch(
        "COMBINE",
        {
            "x": x, "dense": dense, "experts": experts, "slots": slots, "shares": shares, "dense_norm": dense_norm,
            "experts_norm": experts_norm, "norm": norm, "scalar": scalar,
        },
        {"out": (x.shape, x.dtype)},
        x.size // size, ROW_THREADS, {"T": x.dtype, "H": size, "K": top_k, "THREADS": ROW_THREADS}, EPS=eps,
    )[0]  # fmt: skip


def split_heads(
    q: mx.array, k: mx.array, v: mx.array, norms: tuple[mx.array, mx.array], turn: tuple[mx.array, mx.array], eps: float
) -> list[mx.array]:
    """Queries, keys and values by head, normed, the first two rotated.

    Args:
        q: [B, L, heads * D].
        k: [B, L, kv_heads * D].
        v: [B, L, kv_heads * D].
        norms: weights [D] of queries and keys.
        turn: cosines and sines of RoPE's angles, [1 or B, L, D / 2] float32.
        eps: of the norms.

    Returns:
        [B, heads, L, D], and twice [B, kv_heads, L, D].
    """
    batch, length, width = q.shape
    dim = norms[0].size
    heads, kv_heads = width // dim, k.shape[-1] // dim
    of_kv = (batch, kv_heads, length, dim), q.dtype
    return _launch(
        "SPLIT_HEADS",
        {"q": q, "k": k, "v": v, "q_norm": norms[0], "k_norm": norms[1], "cosines": turn[0], "sines": turn[1]},
        {"queries": ((batch, heads, length, dim), q.dtype), "keys": of_kv, "values": of_kv},
        batch * length * (heads + 2 * kv_heads), 32, {"T": q.dtype, "D": dim, "HEADS": heads, "KV_HEADS": kv_heads},
        EPS=eps,
    )  # fmt: skip


def unpack(
    packed: tuple[mx.array, mx.array, mx.array],
    group_size: int,
    slots: tuple[int, int],
    position: int | mx.array,
    weight: mx.array,
    frequencies: mx.array,
) -> list[mx.array]:
    """Keys and values [B, heads, N, D] of quantized values: the keys are the values times a weight, rotated.

    Args:
        packed: what `mx.quantize` makes of values [B, heads, slots, D].
        group_size: numbers that share a scale.
        slots: the first of the N and the one behind the last.
        position: of the first slot, [B] where it differs by row.
        weight: [D].
        frequencies: [D / 2] float32, radians a position.
    """
    codes, scales, biases = packed
    (batch, heads, _, words), (first, last), dim = codes.shape, slots, weight.size
    positions = position if isinstance(position, mx.array) else mx.array([position] * batch)
    numbers = mx.concatenate([mx.array([last - first, first]), positions]).astype(mx.int32)
    of_head = (batch, heads, last - first, dim), scales.dtype
    return _launch(
        "UNPACK",
        {
            "codes": codes, "scales": scales, "biases": biases, "numbers": numbers, "weight": weight,
            "frequencies": frequencies,
        },
        {"keys": of_head, "values": of_head},
        -(-batch * heads * (last - first) * words // 2 // THREADS), THREADS,
        {"T": scales.dtype, "D": dim, "BITS": 32 * words // dim, "SIZE": group_size, "THREADS": THREADS},
    )  # fmt: skip


def route(scores: mx.array, scales: mx.array, top_k: int) -> list[mx.array]:
    """The best `top_k` experts of each row, [N, K] uint32 in descending order, and their weights [N, K].

    Args:
        scores: [N, experts].
        scales: [experts], factors of the weights.
        top_k: K.
    """
    rows, experts = scores.shape
    return _launch(
        "ROUTE",
        {"scores": scores, "scales": scales},
        {"chosen": ((rows, top_k), mx.uint32), "shares": ((rows, top_k), scores.dtype)},
        rows, 32, {"T": scores.dtype, "EXPERTS": experts, "K": top_k}, LOWEST=LOWEST,
    )  # fmt: skip


class Runs(NamedTuple):
    """Rows in order of their experts, in runs of equal length that hold rows of one expert each."""

    slots: mx.array  # [N, K] int32, where each row lies
    source: mx.array  # [runs * length] int32, the row that lies there; padding repeats row 0
    owners: mx.array  # [runs] uint32, the expert of each run


def lay_out(chosen: mx.array, experts: int, length: int, least: int = 0) -> Runs:
    """Lay rows out in runs.

    Args:
        chosen: [N, K] uint32, the experts of each row.
        experts: how many there are.
        length: slots of a run; 1 for rows that are only sorted.
        least: runs of length 1 at least; the surplus belongs to the last expert.
    """
    runs = chosen.size // length + min(experts, chosen.size) if length > 1 else max(chosen.size, least)
    slots, source, owners = _launch(
        "LAY_OUT",
        {"chosen": chosen},
        {"slots": (chosen.shape, mx.int32), "source": ((runs * length,), mx.int32), "owners": ((runs,), mx.uint32)},
        1, LAYOUT_THREADS, {"EXPERTS": experts, "LENGTH": length, "LEAST": least, "THREADS": LAYOUT_THREADS},
    )  # fmt: skip
    return Runs(slots, source, owners)


def take_rows(x: mx.array, source: mx.array, length: int) -> mx.array:
    """x[source] in runs: [S / length, length, H] of x [N, H] and source [S]."""
    size = x.shape[-1]
    return _launch(
        "TAKE_ROWS", {"x": x, "source": source}, {"rows": ((source.size // length, length, size), x.dtype)},
        source.size, THREADS, {"H": size, "THREADS": THREADS},
    )[0]  # fmt: skip


def softmax(scores: mx.array, count: int | mx.array, step: int = 0, length: int = 1) -> mx.array:
    """The softmax over the first scores of each row, and zeros behind them; takes what `softmax_with_sums` takes."""
    return softmax_with_sums(scores, count, step, length)[0]


def softmax_with_sums(
    scores: mx.array, count: int | mx.array, step: int = 0, length: int = 1
) -> tuple[mx.array, mx.array]:
    """The softmax over the first scores of each row, zeros behind them, and the logarithm of the sum of their exp().

    Args:
        scores: [..., P], where P is a multiple of four.
        count: scores of the first row; or all three numbers as an array, [3] int32.
        step: how many more the next row has, from the first of `length` rows to the last; then it begins anew.
        length: see `step`.

    Returns:
        [..., P] in the dtype of the scores, and [..., 1] float32.
    """
    width = scores.shape[-1]
    flat, shape = scores.reshape(-1, width), count
    if not isinstance(shape, mx.array):
        shape = mx.array([count, step, length], mx.int32)
    shares, sums = _launch(
        "SOFTMAX", {"scores": flat, "shape": shape},
        {"shares": (flat.shape, flat.dtype), "sums": ((flat.shape[0], 2), mx.float32)}, flat.shape[0], THREADS,
        {"T": scores.dtype, "THREADS": THREADS, "SHORT": width <= 8 * THREADS}, LOWEST=LOWEST,
    )  # fmt: skip
    level = sums[:, :1] + mx.log(sums[:, 1:])  # the highest score, and what is left of the sum without it
    return shares.reshape(scores.shape), level.reshape(*scores.shape[:-1], 1)


def geglu(gate: mx.array, up: mx.array | None = None) -> mx.array:
    """tanh-approximated GELU of `gate` [..., S] times `up` [..., S]; without `up` both are in `gate` [..., 2 * S]."""
    size = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    shape = (*gate.shape[:-1], size)
    gate = gate.reshape(-1, gate.shape[-1])
    return _launch(
        "GEGLU", {"gate": gate, "up": gate if up is None else up}, {"out": (shape, gate.dtype)},
        -(-gate.shape[0] * size // THREADS), THREADS,
        {"T": gate.dtype, "S": size, "PACKED": up is None, "THREADS": THREADS},
    )[0]  # fmt: skip


def tiles(
    products: mx.array, cap: mx.array, temperature: mx.array, height: int, stride: int, pad: float
) -> list[mx.array]:
    """The tiles of a chunk of the vocabulary: [N, tiles] each, as `head` describes them.

    Args:
        products: [N, tokens] of hidden states and embeddings.
        cap: [1] float32, of the softcap.
        temperature: [1] or [R] float32, where N is a multiple of R.
        height: tokens of a tile.
        stride: their distance.
        pad: largest logit of a tile without tokens.

    Returns:
        The largest logit, its token from the chunk's first on (int32), and the sums `mass`, `depth` and `rounded`.
    """
    rows, tokens = products.shape
    count = -(-tokens // (height * stride)) * stride
    of_tile = (rows, count), mx.float32
    return _launch(
        "TILES",
        {"products": products, "cap": cap, "temperature": temperature},
        {"top": of_tile, "token": ((rows, count), mx.int32), "masses": of_tile, "depths": of_tile, "roundeds": of_tile},
        rows * -(-count // THREADS), THREADS,
        {"T": products.dtype, "HEIGHT": height, "STRIDE": stride, "THREADS": THREADS}, LOWEST=LOWEST, PAD=pad,
    )  # fmt: skip
