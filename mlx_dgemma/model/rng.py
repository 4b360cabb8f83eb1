"""The checkpoint's sampler as pure functions of arrays: temperature, acceptance, noise, stop rule.

B is the batch, C the canvas length, V the vocabulary. Formulas: the entropy-bound sampler of
arXiv 2505.24857 as Transformers' diffusion_gemma computes it.
"""

from __future__ import annotations

import mlx.core as mx


def entropy(logits: mx.array) -> mx.array:
    """[B, C, V] float32 -> Shannon entropy [B, C] in nats."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(log_p) * log_p).sum(axis=-1)


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
    """Uniform-noise corruption, which training learns to undo: some tokens become uniform random ones.

    Args:
        tokens: [B, C] int32.
        shares: [B] float32, probability with which a token of the row is replaced, perhaps by itself.
        vocab_size: V.
        keys: [B, 2]; a row's draws depend on its own alone.

    Returns:
        [B, C] int32.
    """
    first, second = split(keys, 2)
    drawn = mx.vmap(lambda key: mx.random.uniform(shape=tokens.shape[1:], key=key))(first)
    return mx.where(drawn < shares[:, None], noise(tokens.shape[1], vocab_size, second), tokens)


def split(keys: mx.array, count: int) -> mx.array:
    """Independent random keys for each row: [B, 2] -> [count, B, 2] uint32."""
    return mx.vmap(lambda key: mx.random.split(key, count))(keys).swapaxes(0, 1)
