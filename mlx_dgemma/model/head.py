"""The streaming head: what a denoising step asks of the vocabulary, a chunk of it at a time.

The vocabulary is dealt into about 4,096 tiles. A chunk's logits become a few numbers per tile (its maximum
and where that is, sums of exponentials) and are dropped; argmax, entropy, the sample and the likely tokens
are reductions over tiles. No [canvas, vocabulary] array is made, and no result depends on the chunk's size.

B is the batch, C the canvas length, V the vocabulary, H the hidden size. `sampler.entropy`, `sampler.sample`
and `DiffusionGemma.condition` compute the same from whole logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import rng
from .device import fused, on_cpu

if TYPE_CHECKING:
    from .diffusion_gemma import DiffusionGemma


TILES = 4096  # about so many: more cost memory, fewer let likely tokens meet in one tile
STRIDE = 64  # tokens between two of a tile: neighbours such as the digits are likely together
CHUNK_BYTES = 16 << 20  # of float32 logits at once
LIKELY = 32  # tokens a position whose embeddings make its conditioning where they suffice
TAIL = 1e-4  # probability that conditioning may leave out
NOWHERE = -1e9  # logit of what pads the last tiles: finite, since 0 * -inf is not a number


class Reading(NamedTuple):
    """A step's processed logits (softcapped, over temperature), read chunk by chunk. Positions are [B, C]."""

    argmax: mx.array  # int32, the most probable token
    confidence: mx.array  # float32, its probability
    entropy: mx.array  # float32, nats
    drawn: mx.array  # int32, a sample
    likely: mx.array  # [B, C, K] int32, the best tokens of the K best tiles
    probability: mx.array  # [B, C, K] float32, theirs; of logits rounded to the model's dtype, as conditioning is
    log_mass: mx.array  # float32, log-sum-exp of the logits so rounded
    hidden: mx.array  # [B, C, H], what was read
    t: mx.array  # float32, the temperature: of all, or [B, 1, 1]
    stages: tuple[mx.array, ...]  # evaluated one after the other they take the memory of one chunk
    expected_embedding: mx.array | None = None  # [B, C, H] float32, the expected embedding under the whole vocabulary

    @property
    def carried(self) -> list[mx.array]:
        """What the next step is made of, to be evaluated with this one."""
        return [one for one in self if isinstance(one, mx.array)]

    @property
    def needs_full_vocab(self) -> mx.array:
        """[B, C] bool, where the likely tokens leave out more than `TAIL`."""
        return 1 - self.probability.sum(axis=-1) > TAIL

    def fix(self, tokens: mx.array, where: mx.array) -> Reading:
        """The same, but certain of these tokens [B, C] at some positions [B, C]."""
        first = mx.arange(self.likely.shape[-1]) == 0
        return self._replace(
            argmax=mx.where(where, tokens, self.argmax),
            confidence=mx.where(where, 1.0, self.confidence),
            entropy=mx.where(where, 0.0, self.entropy),
            drawn=mx.where(where, tokens, self.drawn),
            likely=mx.where(where[..., None], tokens[..., None], self.likely),
            probability=mx.where(where[..., None], first.astype(mx.float32), self.probability),
        )

    def map(self, function: Callable[..., mx.array], *others: Reading) -> Reading:
        """The same with every array changed, together with the arrays of others."""
        changed: dict[str, Any] = {"expected_embedding": None, "stages": () if others else self.stages}
        for name in self._fields:
            arrays = [getattr(one, name) for one in (self, *others)]
            if name != "stages" and all(array is not None for array in arrays):
                changed[name] = function(*arrays)
        return Reading(**changed)

    def log_p(self, model: DiffusionGemma, tokens: mx.array) -> mx.array:
        """[B, C, N] float32 log-probabilities of N tokens at every position."""
        rows = model.model.decoder.embed_tokens(tokens).astype(model.dtype)
        cap = mx.array(model.config.text.final_logit_softcapping, mx.float32)
        return _process(self.hidden @ rows.T, cap, self.t) - self.log_mass[..., None]

    def condition(self, model: DiffusionGemma, dense: int, nbytes: int = CHUNK_BYTES) -> mx.array:
        """The expected embedding under these logits, for the next step.

        Where the likely tokens carry all but `TAIL` of the probability, their embeddings make it; what is left
        out moves it by at most `TAIL` times the largest embedding. Other positions take the whole vocabulary,
        from the reading's own pass or in a second one that is for them alone.

        Args:
            model: the one that was read.
            dense: positions of the batch that a second pass has room for, at least as many as are diffuse.
            nbytes: of float32 logits at once.

        Returns:
            [B, C, H] as `DiffusionGemma.condition`.
        """
        table, dtype = model.model.decoder.embed_tokens, model.dtype
        weights = self.probability.astype(dtype)[..., None, :]
        expected = (weights @ table(self.likely).astype(dtype))[..., 0, :]
        if self.expected_embedding is not None:
            expected = mx.where(self.needs_full_vocab[..., None], self.expected_embedding.astype(dtype), expected)
        elif dense:
            flat = expected.reshape(-1, expected.shape[-1])
            diffuse = self.needs_full_vocab.flatten()
            index = mx.argsort(mx.where(diffuse, 0, 1))[:dense]  # Metal sorts integers, but no bools
            states, log_mass = self.hidden.reshape(flat.shape)[index], self.log_mass.flatten()[index, None]
            t = mx.broadcast_to(self.t, (*self.log_mass.shape, 1)).reshape(-1, 1)[index]
            whole = mx.zeros(states.shape, mx.float32)
            for start, end in chunks(model.config.text.vocab_size, dense, nbytes):
                z = _round(processed(model, states, t, start, end), dtype)
                whole = whole + part(table, mx.exp(z - log_mass).astype(dtype), start, end, transpose=False)
                states = mx.depends(states, [whole])  # one chunk in memory at a time
            flat[index] = mx.where(diffuse[index, None], whole.astype(dtype), flat[index])
            expected = flat.reshape(expected.shape)
        return expected * model.embed_scale()


class WholeReading(NamedTuple):
    """The same from whole logits, [B, C, V] float32, in the reference's own way."""

    logits: mx.array
    argmax: mx.array
    confidence: mx.array
    entropy: mx.array
    drawn: mx.array
    stages: tuple[mx.array, ...] = ()

    def map(self, function: Callable[..., mx.array], *others: WholeReading) -> WholeReading:
        """The same with every array changed, together with the arrays of others."""
        arrays = [function(*some) for some in zip(self[:-1], *(one[:-1] for one in others))]
        return WholeReading(*arrays)  # type: ignore[arg-type]

    @property
    def carried(self) -> list[mx.array]:
        """Nothing: what the next step takes stays lazy, and after the last one nobody pays for it."""
        return []

    @property
    def needs_full_vocab(self) -> mx.array:
        """[B, C] bool; no position needs a second pass."""
        return mx.zeros(self.argmax.shape, mx.bool_)

    def condition(self, model: DiffusionGemma, dense: int) -> mx.array:
        """[B, C, H], from all of the vocabulary at every position."""
        return model.condition(self.logits)


def read_whole(model: DiffusionGemma, hidden: mx.array, t: mx.array | float, keys: mx.array) -> WholeReading:
    """As `read` with `whole`, but a sample takes a random number for every token of the vocabulary."""
    logits = model.logits(hidden) / t
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    confidence = mx.exp(logits.max(axis=-1) - mx.logsumexp(logits, axis=-1))
    return WholeReading(logits, best, confidence, rng.entropy(logits), rng.sample(logits, keys))


def blank(like: Reading | WholeReading, rows: int) -> Reading | WholeReading:
    """A reading of so many rows that is certain everywhere of the first token, to stand beside another."""
    empty = like.map(lambda a: mx.zeros((rows, *a.shape[1:]), a.dtype) if a.ndim else a)
    if isinstance(empty, WholeReading):
        return empty
    certain = mx.ones((*empty.entropy.shape, 1))
    return empty._replace(
        probability=mx.concatenate([certain, empty.probability[..., 1:]], axis=-1), t=empty.t + 1, stages=()
    )


class _Tiles(NamedTuple):
    """What is kept of a chunk; arrays are [B, C, tiles]."""

    top: mx.array  # the largest logit
    where: mx.array  # its token
    mass: mx.array  # sum of exp(logit - top)
    depth: mx.array  # sum of exp(logit - top) * (logit - top)
    rounded: mx.array  # as `mass`, of logits rounded to the model's dtype


@fused
def _process(x: mx.array, cap: mx.array, t: mx.array) -> mx.array:
    return cap * mx.tanh(x.astype(mx.float32) / cap) / t


@fused
def _masses(z: mx.array, top: mx.array, like: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """exp(z - top), its product with z - top, and the first again of numbers rounded to the dtype of `like`."""
    mass = mx.exp(z - top)
    if like.dtype == mx.float32:
        return mass, mass * (z - top), mass
    low, low_top = (one.astype(like.dtype).astype(mx.float32) for one in (z, top))
    return mass, mass * (z - top), mx.exp(low - low_top)


def _round(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype).astype(mx.float32)


def tile_size(vocab_size: int) -> int:
    """Tokens of a tile; the sample depends on it, so it depends on the vocabulary alone."""
    return max(vocab_size // TILES, 1)


def part(table: nn.Module, x: mx.array, start: int, end: int, transpose: bool = True) -> mx.array:
    """x @ table[start:end].T, or without the transposition, for plain and quantized embeddings."""
    if isinstance(table, nn.QuantizedEmbedding):
        biases = table.get("biases")
        return mx.quantized_matmul(
            x,
            table.weight[start:end],
            table.scales[start:end],
            None if biases is None else biases[start:end],
            transpose=transpose,
            group_size=table.group_size,
            bits=table.bits,
            mode=table.mode,
        )
    weight = table.weight[start:end]
    if not transpose:
        return x @ weight
    if on_cpu():  # the CPU wheels' BLAS takes less than half the time for columns
        flat = x.reshape(-1, x.shape[-1])
        return (weight @ mx.contiguous(flat.T)).T.reshape(*x.shape[:-1], end - start)
    return x @ weight.T


def chunks(vocab_size: int, positions: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the chunks whose float32 logits at so many positions take `nbytes`, or of single blocks."""
    block = tile_size(vocab_size) * STRIDE
    size = max(nbytes // (4 * block * positions), 1) * block
    for start in range(0, vocab_size, size):
        yield start, min(start + size, vocab_size)


def processed(model: DiffusionGemma, hidden: mx.array, t: mx.array, start: int, end: int) -> mx.array:
    """Logits of a part of the vocabulary, softcapped and over the temperature: [..., H] -> [..., end - start]."""
    cap = mx.array(model.config.text.final_logit_softcapping, mx.float32)
    return _process(part(model.model.decoder.embed_tokens, hidden, start, end), cap, t)


def read(
    model: DiffusionGemma,
    hidden: mx.array,
    t: mx.array | float,
    keys: mx.array,
    whole: bool = False,
    nbytes: int = CHUNK_BYTES,
) -> Reading:
    """Argmax, entropy, a sample and the likely tokens of every position, in one pass over the vocabulary.

    The sample is Gumbel-max in two levels, over the tiles' masses and then within the tile that won: a draw
    from the softmax that takes TILES + V / TILES random numbers a position instead of V.

    Args:
        hidden: [B, C, H] from `denoise`.
        t: the temperature, of all or [B, 1, 1].
        keys: [B, 2], one random key per row of the batch.
        whole: sum up the expected embedding on the way, for all positions: half the work of a second pass over
            as many, so it pays where most are diffuse.
        nbytes: of float32 logits at once; no result depends on it.
    """
    table = model.model.decoder.embed_tokens
    temperature, vocab, dtype = mx.array(t, mx.float32), model.config.text.vocab_size, model.dtype
    shape, tall = hidden.shape[:2], tile_size(vocab)
    block = tall * STRIDE
    tile_keys, token_keys = rng.split(keys, 2)
    noise = rng.gumbel((shape[1], -(-vocab // block) * STRIDE), tile_keys)
    kept: list[_Tiles] = []
    # Of the tile that leads so far: its score, its logits and its first token.
    lead = [mx.full((*shape, 1), -mx.inf), mx.zeros((*shape, tall)), mx.zeros((*shape, 1), mx.int32)]
    level, total = mx.full((*shape, 1), NOWHERE), mx.zeros(hidden.shape)  # the sum is total * exp(level)
    stages = [hidden]
    for start, end in chunks(vocab, shape[0] * shape[1], nbytes):
        z, blocks = processed(model, stages[-1], temperature, start, end), -(-(end - start) // block)
        if padding := blocks * block - (end - start):
            z = mx.pad(z, [(0, 0), (0, 0), (0, padding)], constant_values=NOWHERE)
        first = mx.arange(blocks * STRIDE, dtype=mx.int32)  # token of each tile, from the chunk's first
        first = first + first // STRIDE * (block - STRIDE)
        tiles, shares = _summarise(z.reshape(*shape, blocks, tall, STRIDE), start + first, dtype)
        scores = tiles.top + mx.log(tiles.mass) + noise[..., start // tall : start // tall + blocks * STRIDE]
        tile = mx.argmax(scores, axis=-1, keepdims=True)
        tokens = first[tile] + mx.arange(tall, dtype=mx.int32) * STRIDE
        found = mx.take_along_axis(scores, tile, axis=-1), mx.take_along_axis(z, tokens, axis=-1), start + first[tile]
        better = found[0] > lead[0]
        lead = [mx.where(better, new, old) for new, old in zip(found, lead)]
        kept.append(tiles)
        if whole:
            low = _round(tiles.top, dtype)
            higher = mx.maximum(level, low.max(axis=-1, keepdims=True))
            shares = shares * mx.exp(low - higher).reshape(*shape, blocks, 1, STRIDE)
            p = shares.reshape(*shape, -1)[..., : end - start].astype(dtype)
            total = total * mx.exp(level - higher) + part(table, p, start, end, transpose=False)
            level = higher
        stages.append(mx.depends(stages[-1], [*tiles, *lead, total]))  # the next chunk waits for this one
    _, inside, begin = lead
    drawn = mx.argmax(inside + rng.gumbel((shape[1], tall), token_keys), axis=-1, keepdims=True)
    drawn = (begin + drawn.astype(mx.int32) * STRIDE)[..., 0]
    tiles = _Tiles(*(mx.concatenate(list(parts), axis=-1) for parts in zip(*kept)))
    reading = Reading(drawn=drawn, hidden=hidden, t=temperature, stages=tuple(stages), **_reduce(tiles, dtype))
    if not whole:
        return reading
    return reading._replace(expected_embedding=total * mx.exp(level - reading.log_mass[..., None]))


def _summarise(tiled: mx.array, first: mx.array, dtype: mx.Dtype) -> tuple[_Tiles, mx.array]:
    """Numbers of each tile, and exp(logit - its tile's largest) of the logits rounded to the model's dtype.

    Args:
        tiled: [B, C, blocks, tile, STRIDE] logits.
        first: the tokens that the tiles begin with.
    """
    shape = (*tiled.shape[:2], -1)
    top = tiled.max(axis=-2, keepdims=True)
    where = mx.argmax(tiled, axis=-2).astype(mx.int32)
    masses, depths, shares = _masses(tiled, top, mx.zeros((1,), dtype))
    mass, depth = masses.sum(axis=-2), depths.sum(axis=-2)
    rounded = mass if dtype == mx.float32 else shares.sum(axis=-2)
    where = first + where.reshape(shape) * STRIDE
    kept = top.reshape(shape), where, mass.reshape(shape), depth.reshape(shape), rounded.reshape(shape)
    return _Tiles(*kept), shares


def _reduce(tiles: _Tiles, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The fields of a `Reading` that are reductions over tiles."""
    best = mx.argmax(tiles.top, axis=-1, keepdims=True)
    peak = mx.take_along_axis(tiles.top, best, axis=-1)
    below = tiles.top - peak
    share = mx.exp(below)
    mass = (share * tiles.mass).sum(axis=-1)
    depth = (share * (tiles.depth + below * tiles.mass)).sum(axis=-1)
    low, low_peak = _round(tiles.top, dtype), _round(peak, dtype)
    log_mass = low_peak + mx.log((mx.exp(low - low_peak) * tiles.rounded).sum(axis=-1, keepdims=True))
    count = min(LIKELY, low.shape[-1])
    likely = mx.argpartition(tiles.top, kth=-count, axis=-1)[..., -count:]
    return {
        "argmax": mx.take_along_axis(tiles.where, best, axis=-1)[..., 0],
        "confidence": 1 / mass,
        "entropy": mx.log(mass) - depth / mass,
        "likely": mx.take_along_axis(tiles.where, likely, axis=-1),
        "probability": mx.exp(mx.take_along_axis(low, likely, axis=-1) - log_mass),
        "log_mass": log_mass[..., 0],
    }
