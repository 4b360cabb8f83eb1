"""Chunks of the vocabulary in tiles: a few numbers for every tile, and what a step asks for from these numbers.

A tile holds every `STRIDE`th token of a block. B is the batch, C the canvas length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..distributed.dealing import Span, deal
from ..distributed.group import Group
from .device import fused
from .kernels import launch as kernels

TILES = 4096  # about so many: more take more memory, fewer let likely tokens fall into the same tile
STRIDE = 64  # distance of a tile's tokens: neighbouring tokens such as the digits are often likely together
TOP_TOKENS = 32  # per position; their embeddings are the conditioning where their probability suffices
PAD_LOGIT = -6e4  # logit of the padding of the last tiles; finite in float16 too, because 0 * -inf is not a number

LogitsOf = Callable[[mx.array], mx.array]  # tokens [B, C, N], counted from a chunk's first one -> their logits


class Tiles(NamedTuple):
    """What is kept of a chunk's logits; arrays are [B, C, tiles]."""

    top: mx.array  # the largest logit
    token: mx.array  # its token
    mass: mx.array  # sum of exp(logit - top)
    depth: mx.array  # sum of exp(logit - top) * (logit - top)
    rounded: mx.array  # as `mass`, of logits rounded to the model's dtype


def tile_size(vocab_size: int) -> int:
    """Tokens of a tile. The sample depends on it, so it depends on nothing but the vocabulary."""
    return max(vocab_size // TILES, 1)


def vocab_spans(vocab_size: int, ranks: int) -> list[Span]:
    """The tokens whose embeddings each rank of a group holds: whole blocks of tiles, so that tiles stay the same."""
    return deal(vocab_size, ranks, tile_size(vocab_size) * STRIDE)


def vocab_chunks(
    vocab_size: int, positions: int, nbytes: int, itemsize: int = mx.float32.size, span: Span | None = None
) -> Iterator[tuple[int, int]]:
    """(start, end) of the chunks of the vocabulary, or of a span of `vocab_spans`.

    A chunk is a multiple of `tile_size` * `STRIDE` tokens, at least one, whose logits of `itemsize` bytes at
    `positions` positions take at most `nbytes`.
    """
    block = tile_size(vocab_size) * STRIDE
    size = max(nbytes // (itemsize * block * positions), 1) * block
    first, last = span or (0, vocab_size)
    for start in range(first, last, size):
        yield start, min(start + size, last)


@fused
def softcap(x: mx.array, cap: mx.array) -> mx.array:
    """cap * tanh(x / cap) in float32."""
    return cap * mx.tanh(x.astype(mx.float32) / cap)


@fused
def scaled_softcap(x: mx.array, cap: mx.array, temperature: mx.array) -> mx.array:
    """`softcap`, divided by the temperature."""
    return cap * mx.tanh(x.astype(mx.float32) / cap) / temperature


@fused
def scores_of(top: mx.array, mass: mx.array, noise: mx.array) -> mx.array:
    """The log of a tile's sum of exponentials, plus noise."""
    return top + mx.log(mass) + noise


@fused
def _masses(z: mx.array, top: mx.array, like: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """exp(z - top), its product with z - top, and exp(z - top) of numbers rounded to the dtype of `like`."""
    mass = mx.exp(z - top)
    if like.dtype == mx.float32:
        return mass, mass * (z - top), mass
    low, low_top = (one.astype(like.dtype).astype(mx.float32) for one in (z, top))
    return mass, mass * (z - top), mx.exp(low - low_top)


def rounded_to(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """x as float32, rounded to `dtype`."""
    return x.astype(dtype).astype(mx.float32)


def reduce_plainly(
    products: mx.array, vocab_size: int, cap: mx.array, t: mx.array, dtype: mx.Dtype
) -> tuple[Tiles, LogitsOf]:
    """The tiles of a chunk, tokens counted from its first, and a function that gives the logits of tokens.

    Args:
        products: [B, C, tokens] of hidden states and embeddings.
        vocab_size: of the whole vocabulary.
        cap: of the softcap, a scalar.
        t: temperature, a scalar or [B, 1, 1].
        dtype: of activations.
    """
    z, tall = scaled_softcap(products, cap, t), tile_size(vocab_size)
    blocks = -(-z.shape[-1] // (tall * STRIDE))
    if padding := blocks * tall * STRIDE - z.shape[-1]:
        z = mx.pad(z, [(0, 0), (0, 0), (0, padding)], constant_values=PAD_LOGIT)
    tiled, shape = z.reshape(*z.shape[:2], blocks, tall, STRIDE), (*z.shape[:2], -1)
    top = tiled.max(axis=-2, keepdims=True)
    tile = mx.arange(blocks * STRIDE, dtype=mx.int32)
    token = tile // STRIDE * (tall * STRIDE) + tile % STRIDE
    token = token + mx.argmax(tiled, axis=-2).astype(mx.int32).reshape(shape) * STRIDE
    masses, depths, shares = _masses(tiled, top, mx.zeros((1,), dtype))
    mass, depth = masses.sum(axis=-2), depths.sum(axis=-2)
    rounded = mass if dtype == mx.float32 else shares.sum(axis=-2)
    tiles = Tiles(top.reshape(shape), token, *(one.reshape(shape) for one in (mass, depth, rounded)))
    return tiles, lambda tokens: mx.take_along_axis(z, tokens, axis=-1)


def reduce_by_kernel(
    products: mx.array, vocab_size: int, cap: mx.array, t: mx.array, dtype: mx.Dtype
) -> tuple[Tiles, LogitsOf]:
    """As `reduce_plainly`, in one pass and without float32 arrays of the vocabulary's size."""
    batch, length, count = products.shape
    made = kernels.tiles(
        products.reshape(-1, count),
        cap.reshape(1),
        t.reshape(-1),
        tile_size(vocab_size),
        STRIDE,
        PAD_LOGIT,
    )

    def logits_of(tokens: mx.array) -> mx.array:
        z = mx.take_along_axis(products, mx.minimum(tokens, count - 1), axis=-1)
        return mx.where(tokens < count, scaled_softcap(z, cap, t), PAD_LOGIT)

    return Tiles(*(one.reshape(batch, length, -1) for one in made)), logits_of


def leading_tile(lead: list[mx.array], scores: mx.array, logits_of: LogitsOf, tall: int, start: int) -> list[mx.array]:
    """The tile with the highest score so far: [its score, its logits, its first token].

    Args:
        lead: the leading tile of earlier chunks.
        scores: [B, C, tiles] of this chunk, Gumbel noise included.
        logits_of: gives the logits of tokens [B, C, tall], counted from the first of this chunk.
        tall: tokens of a tile.
        start: first token of this chunk.
    """
    tile = mx.argmax(scores, axis=-1, keepdims=True).astype(mx.int32)
    first = tile // STRIDE * (tall * STRIDE) + tile % STRIDE
    tokens = first + mx.arange(tall, dtype=mx.int32) * STRIDE
    found = mx.take_along_axis(scores, tile, axis=-1), logits_of(tokens), start + first
    better = found[0] > lead[0]
    return [mx.where(better, new, old) for new, old in zip(found, lead)]


class Likely(NamedTuple):
    """The best tokens of the best tiles; arrays are [B, C, K]."""

    top: mx.array  # float32, their logits
    tokens: mx.array  # int32


def join_tiles(chunks: Sequence[Tiles]) -> Tiles:
    """The tiles of several chunks as those of one."""
    if len(chunks) == 1:
        return chunks[0]
    return Tiles(*(mx.concatenate(list(parts), axis=-1) for parts in zip(*chunks)))


def likely_of(top: mx.array, tokens: mx.array) -> Likely:
    """The `TOP_TOKENS` largest of some logits [B, C, N] and their tokens [B, C, N]."""
    count = min(TOP_TOKENS, top.shape[-1])
    index = mx.argpartition(top, kth=-count, axis=-1)[..., -count:]
    return Likely(mx.take_along_axis(top, index, axis=-1), mx.take_along_axis(tokens, index, axis=-1))


class _Sums(NamedTuple):
    """Sums over tiles, relative to the largest logit `peak`; arrays are [B, C], the first three [B, C, 1]."""

    best: mx.array  # the tile of the largest logit
    peak: mx.array
    rounded: mx.array
    mass: mx.array
    depth: mx.array


def _sums(tiles: Tiles, dtype: mx.Dtype) -> _Sums:
    best = mx.argmax(tiles.top, axis=-1, keepdims=True)
    peak = mx.take_along_axis(tiles.top, best, axis=-1)
    below = tiles.top - peak
    share = mx.exp(below)
    mass = (share * tiles.mass).sum(axis=-1)
    depth = (share * (tiles.depth + below * tiles.mass)).sum(axis=-1)
    low, low_peak = rounded_to(tiles.top, dtype), rounded_to(peak, dtype)
    rounded = (mx.exp(low - low_peak) * tiles.rounded).sum(axis=-1, keepdims=True)
    return _Sums(best, peak, rounded, mass, depth)


def as_one_tile(tiles: Tiles, dtype: mx.Dtype) -> Tiles:
    """What `reduce_tiles` needs of many tiles, as one tile: [B, C, 1] each."""
    best, peak, rounded, mass, depth = _sums(tiles, dtype)
    return Tiles(peak, mx.take_along_axis(tiles.token, best, axis=-1), mass[..., None], depth[..., None], rounded)


def reduce_tiles(tiles: Tiles, likely: Likely, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The fields of a `Prediction` that are reductions over all tiles of the vocabulary, and its likely tokens."""
    best, peak, rounded, mass, depth = _sums(tiles, dtype)
    logsumexp = rounded_to(peak, dtype) + mx.log(rounded)
    return {
        "argmax": mx.take_along_axis(tiles.token, best, axis=-1)[..., 0],
        "confidence": 1 / mass,
        "entropy": mx.log(mass) - depth / mass,
        "top_tokens": likely.tokens,
        "top_probs": mx.exp(rounded_to(likely.top, dtype) - logsumexp),
        "logsumexp": logsumexp[..., 0],
    }


def of_all_ranks(
    group: Group, tiles: Tiles, likely: Likely, score: mx.array, sample: mx.array
) -> tuple[Tiles, Likely, mx.array]:
    """Put together what the ranks of a group have made of their spans, in one message of some 70 numbers a position.

    Args:
        group: the ranks, in the order of their spans.
        tiles: of one tile, from `as_one_tile`.
        likely: of a rank's span.
        score: [B, C, 1] float32 of the rank's leading tile.
        sample: [B, C, 1] int32, the token drawn from it.

    Returns:
        A tile for each rank, the likely tokens of all, and the sample [B, C, 1].
    """
    floats = [tiles.top, tiles.mass, tiles.depth, tiles.rounded, score, likely.top]
    tokens = mx.concatenate([tiles.token, sample, likely.tokens], axis=-1)
    packed = mx.concatenate([*floats, tokens.view(mx.float32)], axis=-1)
    every = group.gather(packed[:, :, None], axis=2)  # [B, C, ranks, numbers]
    top, mass, depth, rounded, scores = (every[..., i] for i in range(5))
    count = likely.top.shape[-1]
    numbers = every[..., 5 + count :].view(mx.int32)
    flat = (*packed.shape[:2], -1)
    found = likely_of(every[..., 5 : 5 + count].reshape(flat), numbers[..., 2:].reshape(flat))
    winner = mx.argmax(scores, axis=-1, keepdims=True)
    drawn = mx.take_along_axis(numbers[..., 1], winner, axis=-1)
    return Tiles(top, numbers[..., 0], mass, depth, rounded), found, drawn
