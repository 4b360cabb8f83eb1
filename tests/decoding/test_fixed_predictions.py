"""Predictions with fixed positions, and log-probabilities of given tokens, against whole logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import FULL, gap, random_tokens, small_model


def keys_of(*seeds):
    return mx.stack([mx.random.key(seed) for seed in seeds])


def reading_of(kind):
    """(model, reading, its whole logits): a random vocabulary of 1000."""
    model = small_model(2, layers=(FULL,), vocab_size=1000, hidden_size=64)
    if kind != "float32":
        how = {"8bit": {"bits": 8, "group_size": 64}, "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}[kind]
        nn.quantize(model, class_predicate=lambda _, module: isinstance(module, nn.Embedding), **how)
    hidden = mx.random.normal((2, 4, 64), key=mx.random.key(1)) * mx.array([0.05, 0.3, 1, 2])[:, None]
    return model, model.head.predict(hidden, 0.7, keys_of(3, 4)), model.logits(hidden) / 0.7


@pytest.mark.parametrize("kind", ["float32", "8bit", "mxfp4"])
def test_log_probabilities_are_those_of_whole_logits(kind):
    model, reading, logits = reading_of(kind)
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tokens = mx.array([0, 999, 5, 5, 640, 17])
    assert gap(reading.log_probs(model.head, tokens), log_p[..., tokens]) < (1e-5 if kind == "float32" else 1e-3)
    assert reading.log_probs(model.head, tokens[:1]).shape == (2, 4, 1)
    every = reading.log_probs(model.head, mx.arange(1000))
    assert np.allclose(np.exp(np.array(every, np.float64)).sum(-1), 1, atol=1e-3)


@pytest.mark.parametrize("kind", ["float32", "8bit", "mxfp4"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_pinned_reading_is_certain_there_and_the_same_elsewhere(kind, whole):
    model, reading, _ = reading_of(kind)
    if whole:
        reading = model.head.predict(reading.hidden, 0.7, keys_of(3, 4), True)
    tokens = random_tokens(1, 2, 4, vocab=1000)
    where = mx.array([[True, False, True, False], [False, False, True, True]])
    pinned = reading.fix(tokens, where)
    at, plain = np.array(where), reading.condition(model.head, 8)
    for name, value in (("argmax", tokens), ("sample", tokens), ("confidence", 1), ("entropy", 0)):
        got, before = np.array(getattr(pinned, name)), np.array(getattr(reading, name))
        assert (got == np.where(at, np.array(value), before)).all(), name
        assert got.dtype == before.dtype, name
    assert not np.array(pinned.needs_full_vocab)[at].any()
    assert (np.array(pinned.needs_full_vocab)[~at] == np.array(reading.needs_full_vocab)[~at]).all()
    one_hot = np.array(model.model.decoder.embed_tokens(tokens).astype(mx.float32)) * 8
    for dense in (0, 5, 8) if whole else (8,):
        got = np.array(pinned.condition(model.head, dense))
        assert np.abs(got - one_hot)[at].max() < 1e-4
        assert np.abs(got - np.array(plain))[~at].max() < 1e-3
    assert gap(reading.fix(tokens, mx.zeros((2, 4), mx.bool_)).condition(model.head, 8), plain) == 0
