"""The head: what a denoising step asks of the vocabulary, computed a chunk of the vocabulary at a time.

The vocabulary is dealt into about 4,096 tiles. The logits of a chunk are reduced to a few numbers per tile (the
largest logit, its token, sums of exponentials) and dropped. Argmax, entropy, the sample and the top tokens are
reductions over tiles. No [canvas, vocabulary] array is made, and no result depends on the size of the chunks.

B is the batch, C the canvas length, V the vocabulary, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..distributed.dealing import Span, largest
from ..distributed.group import ALONE, Group
from . import rng, tiling
from .device import fused, on_cpu
from .functions import entropy
from .masks import Narrow

CHUNK_BYTES = 16 << 20  # of float32 logits at once, of which some six arrays are made
KERNEL_CHUNK_BYTES = 32 << 20  # of products at once, in the dtype of the model, where a kernel reduces them
TAIL = 1e-4  # probability that the conditioning may leave out
SHARES = 256.0  # sum of the shares of a float16 product: what they underflow to is far below TAIL, nothing overflows


class Prediction(NamedTuple):
    """What the model predicts at every position, from logits that are softcapped and divided by the temperature.

    Arrays are [B, C] unless a shape is given.
    """

    argmax: mx.array  # int32, the most probable token
    confidence: mx.array  # float32, its probability
    entropy: mx.array  # float32, nats
    sample: mx.array  # int32, a token drawn from the distribution
    top_tokens: mx.array  # [B, C, K] int32, the best token of each of the K best tiles
    top_probs: mx.array  # [B, C, K] float32, their probabilities under the logits rounded to the model's dtype
    logsumexp: mx.array  # float32, of the logits rounded to the model's dtype
    hidden: mx.array  # [B, C, H], the states that the logits were computed from
    temperature: mx.array  # float32, a scalar or [B, 1, 1]
    stages: tuple[mx.array, ...]  # when they are evaluated in order, one chunk is in memory at a time
    expected_embedding: mx.array | None = None  # [B, C, H] float32, under this rank's vocabulary, before scaling

    @property
    def carried(self) -> list[mx.array]:
        """The arrays that the next step is computed from; they are evaluated with this step."""
        return [one for one in self if isinstance(one, mx.array)]

    @property
    def needs_full_vocab(self) -> mx.array:
        """[B, C] bool, true where the top tokens leave out more probability than `TAIL`."""
        return 1 - self.top_probs.sum(axis=-1) > TAIL

    def fix(self, tokens: mx.array, where: mx.array) -> Prediction:
        """The same prediction with probability 1 for `tokens` [B, C] at the positions of `where` [B, C] bool."""
        first = mx.arange(self.top_tokens.shape[-1]) == 0
        return self._replace(
            argmax=mx.where(where, tokens, self.argmax),
            confidence=mx.where(where, 1.0, self.confidence),
            entropy=mx.where(where, 0.0, self.entropy),
            sample=mx.where(where, tokens, self.sample),
            top_tokens=mx.where(where[..., None], tokens[..., None], self.top_tokens),
            top_probs=mx.where(where[..., None], first.astype(mx.float32), self.top_probs),
        )

    def map(self, function: Callable[..., mx.array], *others: Prediction) -> Prediction:
        """Apply a function to every array, or to every array and the same arrays of `others`."""
        changed: dict[str, Any] = {"expected_embedding": None, "stages": () if others else self.stages}
        for name in self._fields:
            arrays = [getattr(one, name) for one in (self, *others)]
            if name != "stages" and all(array is not None for array in arrays):
                changed[name] = function(*arrays)
        return Prediction(**changed)

    def log_probs(self, head: Head, tokens: mx.array) -> mx.array:
        """Log-probabilities of the N given tokens at every position, [B, C, N] float32."""
        products = head.group.sum(self.hidden @ head.rows(tokens).T)
        return tiling.scaled_softcap(products, head.cap, self.temperature) - self.logsumexp[..., None]

    def log_prob_of(self, head: Head, tokens: mx.array) -> mx.array:
        """Log-probability of one token at every position: tokens [B, C] int32 -> [B, C] float32."""
        products = head.group.sum((self.hidden[..., None, :] @ head.rows(tokens)[..., None])[..., 0])
        return tiling.scaled_softcap(products, head.cap, self.temperature)[..., 0] - self.logsumexp

    def condition(self, head: Head, full_positions: int, nbytes: int | None = None) -> mx.array:
        """The expected embedding, which conditions the next step.

        Where the top tokens hold all but `TAIL` of the probability, the embedding is theirs. What is left out changes
        it by at most `TAIL` times the largest embedding. The other positions use the whole vocabulary, either from
        `expected_embedding` or in a second pass over these positions alone.

        Args:
            head: the one that made this prediction.
            full_positions: how many positions of the batch the second pass computes; at least as many as need it.
            nbytes: as in `Head.predict`.

        Returns:
            [B, C, H] as `Head.condition`.
        """
        dtype = head.dtype
        weights = self.top_probs.astype(dtype)[..., None, :]
        expected = (weights @ head.rows(self.top_tokens))[..., 0, :]
        if self.expected_embedding is not None:
            expected = mx.where(self.needs_full_vocab[..., None], self.expected_embedding.astype(dtype), expected)
        elif full_positions:
            flat = expected.reshape(-1, expected.shape[-1])
            needed = self.needs_full_vocab.flatten()
            index = mx.argsort(mx.where(needed, 0, 1))[:full_positions]  # Metal sorts integers, but no bools
            states, logsumexp = self.hidden.reshape(flat.shape)[index], self.logsumexp.flatten()[index, None]
            t = mx.broadcast_to(self.temperature, (*self.logsumexp.shape, 1)).reshape(-1, 1)[index]
            total = mx.zeros(states.shape, mx.float32)
            for start, end in head.chunks(full_positions, nbytes):
                products = head.matmul(states, start, end)
                p = _shares(products, head.cap, t, logsumexp, mx.zeros((1,), dtype))
                total = total + head.matmul(p, start, end, transpose=False)
                states = mx.depends(states, [total])  # one chunk in memory at a time
            flat[index] = mx.where(needed[index, None], total.astype(dtype), flat[index])
            expected = flat.reshape(expected.shape)
        return head.group.sum(expected) * head.embed_scale


class FullPrediction(NamedTuple):
    """A prediction that keeps its logits, computed with the operations of the reference implementation (exact mode).

    Arrays are [B, C] unless a shape is given; the fields mean what they mean in `Prediction`.
    """

    logits: mx.array  # [B, C, V] float32, softcapped and divided by the temperature
    argmax: mx.array
    confidence: mx.array
    entropy: mx.array
    sample: mx.array
    stages: tuple[mx.array, ...] = ()

    def map(self, function: Callable[..., mx.array], *others: FullPrediction) -> FullPrediction:
        """Apply a function to every array, or to every array and the same arrays of `others`."""
        arrays = [function(*some) for some in zip(self[:-1], *(one[:-1] for one in others))]
        return FullPrediction(*arrays)  # type: ignore[arg-type]

    @property
    def carried(self) -> list[mx.array]:
        """Nothing: the conditioning stays lazy, so that after the last step it is never computed."""
        return []

    @property
    def needs_full_vocab(self) -> mx.array:
        """[B, C] bool, false everywhere: no position needs a second pass."""
        return mx.zeros(self.argmax.shape, mx.bool_)

    def condition(self, head: Head, full_positions: int) -> mx.array:
        """[B, C, H] as `Head.condition`, from the whole vocabulary at every position."""
        return head.condition(self.logits)


def placeholder_rows(like: Prediction | FullPrediction, rows: int) -> Prediction | FullPrediction:
    """Rows for canvases that have not taken a step yet, to be concatenated with the rows of `like`.

    They predict token 0 with probability 1 everywhere, so no position needs the full vocabulary.
    """
    empty = like.map(lambda a: mx.zeros((rows, *a.shape[1:]), a.dtype) if a.ndim else a)
    if isinstance(empty, FullPrediction):
        return empty
    certain = mx.ones((*empty.entropy.shape, 1))
    return empty._replace(
        top_probs=mx.concatenate([certain, empty.top_probs[..., 1:]], axis=-1),
        temperature=empty.temperature + 1,
        stages=(),
    )


@fused
def _shares(x: mx.array, cap: mx.array, temperature: mx.array, level: mx.array, like: mx.array) -> mx.array:
    """exp(logit - level) of products x, with logits and shares rounded to the dtype of `like`."""
    z = (cap * mx.tanh(x.astype(mx.float32) / cap) / temperature).astype(like.dtype)
    return mx.exp(z.astype(mx.float32) - level).astype(like.dtype)


def matmul_slice(table: nn.Module, x: mx.array, start: int, end: int, transpose: bool = True) -> mx.array:
    """x @ table[start:end].T, or x @ table[start:end] without `transpose`, for plain and quantized embeddings.

    A table with a `compute_dtype` computes in that. Without `transpose` x holds shares of a probability, at least 0.
    """
    dtype = getattr(table, "compute_dtype", x.dtype)
    if dtype == x.dtype or transpose:
        return _matmul_slice(table, x.astype(dtype), start, end, transpose)
    total = mx.maximum(x.sum(axis=-1, keepdims=True).astype(mx.float32), 1e-30) / SHARES
    return (_matmul_slice(table, _float16_shares(x, total), start, end, False) * total).astype(x.dtype)


@fused
def _float16_shares(x: mx.array, total: mx.array) -> mx.array:
    return (x.astype(mx.float32) / total).astype(mx.float16)


def _matmul_slice(table: nn.Module, x: mx.array, start: int, end: int, transpose: bool) -> mx.array:
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
    if on_cpu():  # the BLAS of the CPU wheels takes less than half the time for columns
        flat = x.reshape(-1, x.shape[-1])
        return (weight @ mx.contiguous(flat.T)).T.reshape(*x.shape[:-1], end - start)
    return x @ weight.T


@dataclass(frozen=True)
class Head:
    """The embedding table as output projection (the two are tied), with softcap and self-conditioning.

    Tokens are numbers of the whole vocabulary. A rank of a group holds and reduces a span of it.

    Attributes:
        table: [V, H], plain or quantized; of a rank its span's rows.
        vocab_size: V.
        softcap: logits are softcap * tanh(x / softcap).
        scale: factor of embeddings, sqrt(H).
        dtype: of activations.
        uses_kernels: reduce tiles by a custom kernel.
        group: the ranks that hold the vocabulary together.
    """

    table: nn.Module
    vocab_size: int
    softcap: float
    scale: float
    dtype: mx.Dtype
    uses_kernels: bool = False
    group: Group = ALONE

    @property
    def span(self) -> Span:
        """The tokens that this rank holds."""
        return tiling.vocab_spans(self.vocab_size, self.group.size)[self.group.rank]

    def rows(self, tokens: mx.array) -> mx.array:
        """Embeddings [..., H] of tokens [...], unscaled; zeros of those that other ranks hold."""
        if self.group.size == 1:
            return self.table(tokens).astype(self.dtype)
        start, end = self.span
        here = (tokens >= start) & (tokens < end)
        return mx.where(here[..., None], self.table(mx.where(here, tokens - start, 0)).astype(self.dtype), 0)

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings [..., H] of tokens [...]."""
        return self.group.sum(self.rows(tokens)) * self.embed_scale

    def matmul(self, x: mx.array, start: int, end: int, transpose: bool = True) -> mx.array:
        """`matmul_slice` of tokens start..end, which this rank holds."""
        first = self.span.start
        return matmul_slice(self.table, x, start - first, end - first, transpose)

    @property
    def cap(self) -> mx.array:
        """`softcap` as a float32 array."""
        return mx.array(self.softcap, mx.float32)

    @property
    def embed_scale(self) -> mx.array:
        """`scale` rounded to the dtype of activations, as the reference rounds it."""
        return mx.array(self.scale, self.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, C, H] -> [B, C, V] float32, softcapped, before temperature."""
        products = self.table.as_linear(hidden)
        if self.group.size > 1:
            spans = tiling.vocab_spans(self.vocab_size, self.group.size)
            width = largest(spans)
            padded = mx.pad(products, [(0, 0)] * (products.ndim - 1) + [(0, width - products.shape[-1])])
            parts = mx.split(self.group.gather(padded, axis=-1), len(spans), axis=-1)
            products = mx.concatenate([part[..., : span.size] for part, span in zip(parts, spans)], axis=-1)
        return tiling.softcap(products, self.cap)

    def logits_slice(self, hidden: mx.array, temperature: mx.array, start: int, end: int) -> mx.array:
        """Logits of the tokens start..end, softcapped, divided by the temperature: [..., H] -> [..., end - start]."""
        if self.group.size == 1:
            products = self.matmul(hidden, start, end)
        else:
            first, last = max(start, self.span.start), min(end, self.span.end)
            products = mx.zeros((*hidden.shape[:-1], end - start), hidden.dtype)
            if first < last:
                products[..., first - start : last - start] = self.matmul(hidden, first, last)
            products = self.group.sum(products)
        return tiling.scaled_softcap(products, self.cap, temperature)

    def condition(self, processed_logits: mx.array) -> mx.array:
        """The expected embedding under logits [B, C, V] after temperature, for the next step.

        Returns:
            [B, C, H]: softmax(logits rounded to `dtype`) @ table * sqrt(H).
        """
        p = mx.softmax(processed_logits.astype(self.dtype), axis=-1, precise=True)
        start, end = self.span
        return self.group.sum(self.matmul(p[..., start:end], start, end, transpose=False)) * self.embed_scale

    def predict(
        self,
        hidden: mx.array,
        temperature: mx.array | float,
        keys: mx.array,
        expected_embedding: bool = False,
        nbytes: int | None = None,
        narrow: Narrow | None = None,
    ) -> Prediction:
        """Argmax, entropy, a sample and the top tokens of every position, in one pass over the vocabulary.

        The sample is Gumbel-max in two levels, first over the masses of the tiles, then within the tile that won. It
        is a draw from the softmax that takes TILES + V / TILES random numbers a position instead of V.

        Args:
            hidden: [B, C, H] from `DiffusionGemma.denoise`.
            temperature: a scalar or [B, 1, 1].
            keys: [B, 2], one random key per row of the batch.
            expected_embedding: compute the expected embedding in the same pass, for all positions. It takes half the
                time of a second pass over as many positions, so it pays where most of them need the full vocabulary.
            nbytes: bytes of logits at once; no result depends on it.
            narrow: what is computed of each canvas: then `hidden` is [1, T, H], the temperature a scalar or [1, T, 1],
                and arrays of the prediction are [1, T]. Random numbers are drawn for whole canvases. None: all.
        """
        t, shape, tall = mx.array(temperature, mx.float32), hidden.shape[:2], tiling.tile_size(self.vocab_size)
        block = tall * tiling.STRIDE
        tile_keys, token_keys = rng.split(keys, 2)
        length = narrow.length if narrow else shape[1]
        noise = rng.gumbel((length, -(-self.vocab_size // block) * tiling.STRIDE), tile_keys)
        token_noise = rng.gumbel((length, tall), token_keys)
        if narrow is not None:
            noise, token_noise = narrow.take(noise), narrow.take(token_noise)
        reduce = tiling.reduce_by_kernel if self.uses_kernels else tiling.reduce_plainly
        kept: list[tiling.Tiles] = []
        # Of the tile that leads so far: its score, its logits and its first token.
        lead = [mx.full((*shape, 1), -mx.inf), mx.zeros((*shape, tall)), mx.zeros((*shape, 1), mx.int32)]
        level, total = mx.full((*shape, 1), tiling.PAD_LOGIT), mx.zeros(hidden.shape)  # the sum is total * exp(level)
        stages = [hidden]
        for start, end in self.chunks(shape[0] * shape[1], nbytes):
            products = self.matmul(stages[-1], start, end)
            tiles, logits_of = reduce(products, self.vocab_size, self.cap, t, self.dtype)
            tile = start // block * tiling.STRIDE
            scores = tiling.scores_of(tiles.top, tiles.mass, noise[..., tile : tile + tiles.top.shape[-1]])
            lead = tiling.leading_tile(lead, scores, logits_of, tall, start)
            kept.append(tiles._replace(token=tiles.token + start))
            if expected_embedding:
                higher = mx.maximum(level, tiling.rounded_to(tiles.top, self.dtype).max(axis=-1, keepdims=True))
                p = _shares(products, self.cap, t, higher, mx.zeros((1,), self.dtype))
                total = total * mx.exp(level - higher) + self.matmul(p, start, end, transpose=False)
                level = higher
            stages.append(mx.depends(stages[-1], [*tiles, *lead, total]))  # the next chunk waits for this one
        score, inside, begin = lead
        sample = mx.argmax(inside + token_noise, axis=-1, keepdims=True)
        sample = begin + sample.astype(mx.int32) * tiling.STRIDE
        all_tiles = tiling.join_tiles(kept)
        likely = tiling.likely_of(all_tiles.top, all_tiles.token)
        if self.group.size > 1:
            one = tiling.as_one_tile(all_tiles, self.dtype)
            all_tiles, likely, sample = tiling.of_all_ranks(self.group, one, likely, score, sample)
        reduced = tiling.reduce_tiles(all_tiles, likely, self.dtype)
        made = Prediction(sample=sample[..., 0], hidden=hidden, temperature=t, stages=tuple(stages), **reduced)
        if not expected_embedding:
            return made
        return made._replace(expected_embedding=total * mx.exp(level - made.logsumexp[..., None]))

    def chunks(self, positions: int, nbytes: int | None = None) -> Iterator[tuple[int, int]]:
        """As `tiling.vocab_chunks`, of `nbytes` or as many bytes as suit the way of reducing them."""
        wide = mx.float32.size, CHUNK_BYTES
        itemsize, usual = (self.dtype.size, KERNEL_CHUNK_BYTES) if self.uses_kernels else wide
        return tiling.vocab_chunks(self.vocab_size, positions, usual if nbytes is None else nbytes, itemsize, self.span)

    def predict_full(self, hidden: mx.array, temperature: mx.array | float, keys: mx.array) -> FullPrediction:
        """As `predict`, from [B, C, V] logits at once; the sample takes a random number for every token."""
        logits = self.logits(hidden) / temperature
        argmax = mx.argmax(logits, axis=-1).astype(mx.int32)
        confidence = mx.exp(logits.max(axis=-1) - mx.logsumexp(logits, axis=-1))
        return FullPrediction(logits, argmax, confidence, entropy(logits), rng.sample(logits, keys))
