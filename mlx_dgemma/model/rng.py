"""Random draws for each row of a batch from a key of its own: samples, Gumbel noise, random tokens, corruption.

What a row draws depends on its key alone, not on the rows beside it.
B is the batch, C the canvas length, V the vocabulary.
"""

from __future__ import annotations

import mlx.core as mx


def sample(logits: mx.array, keys: mx.array) -> mx.array:
    """One token per position by the Gumbel-max trick: [B, C, V] and keys [B, 2] -> [B, C] int32."""
    return mx.argmax(logits + gumbel(logits.shape[1:], keys), axis=-1).astype(mx.int32)


def gumbel(shape: tuple[int, ...], keys: mx.array) -> mx.array:
    """Standard Gumbel noise: keys [B, 2] -> [B, *shape] float32."""
    return mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(keys)


def noise(length: int, vocab_size: int, keys: mx.array) -> mx.array:
    """Uniform random tokens: keys [B, 2] -> [B, length] int32."""
    return mx.vmap(lambda key: mx.random.randint(0, vocab_size, (length,), key=key))(keys)


def corrupt(tokens: mx.array, shares: mx.array, vocab_size: int, keys: mx.array) -> mx.array:
    """Replace some tokens by uniform random ones: the noise that training learns to undo.

    Args:
        tokens: [B, C] int32.
        shares: [B] float32, the probability with which a token of the row is replaced; the new token may be the same.
        vocab_size: V.
        keys: [B, 2].

    Returns:
        [B, C] int32.
    """
    first, second = split(keys, 2)
    drawn = mx.vmap(lambda key: mx.random.uniform(shape=tokens.shape[1:], key=key))(first)
    return mx.where(drawn < shares[:, None], noise(tokens.shape[1], vocab_size, second), tokens)


def split(keys: mx.array, count: int) -> mx.array:
    """Independent random keys for each row: [B, 2] -> [count, B, 2] uint32."""
    return mx.vmap(lambda key: mx.random.split(key, count))(keys).swapaxes(0, 1)
