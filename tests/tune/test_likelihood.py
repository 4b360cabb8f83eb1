"""The likelihood bound where the truth is known."""

import mlx.core as mx
import numpy as np
import pytest
from support import gap, refusal

from mlx_dgemma.errors import DataError
from mlx_dgemma.tune.likelihood import bound, cost


def expected_cost(prior, posterior_of, t):
    """The expectation of the integrand over clean and noisy tokens, of each of the times t."""
    vocab = len(prior)
    clean, noisy = np.divmod(np.arange(vocab**2), vocab)
    weight = prior[clean] * ((1 - t[:, None]) * (clean == noisy) + t[:, None] / vocab)
    log_p = np.log([[posterior_of(token, one) for token in noisy] for one in t]).astype(np.float32)
    given = (mx.array(np.tile(tokens, len(t))) for tokens in (clean, noisy))
    costs = cost(mx.array(log_p.reshape(-1, vocab)), *given, mx.array(np.repeat(t, vocab**2).astype(np.float32)))
    return (weight * np.array(costs).reshape(weight.shape)).sum(axis=1)


def posterior(prior):
    def of(noisy, t):
        likelihood = np.full(len(prior), t / len(prior))
        likelihood[noisy] += 1 - t
        found = prior * likelihood
        return found / found.sum()

    return of


TIMES = (np.arange(400) + 0.5) / 400


@pytest.mark.parametrize("prior", [[0.7, 0.2, 0.05, 0.05], [0.25] * 4, [0.97, 0.01, 0.01, 0.01]])
def test_with_the_true_posterior_the_bound_is_the_entropy(prior):
    prior = np.array(prior)
    found = expected_cost(prior, posterior(prior), TIMES).mean()
    assert found == pytest.approx(-(prior * np.log(prior)).sum(), abs=0.01)


def test_with_another_prior_the_bound_is_the_cross_entropy():
    """For a model with another prior, the bound is the cross entropy instead of the entropy."""
    prior, believed = np.array([0.7, 0.2, 0.05, 0.05]), np.array([0.1, 0.2, 0.3, 0.4])
    found = expected_cost(prior, posterior(believed), TIMES).mean()
    assert found == pytest.approx(-(prior * np.log(believed)).sum(), abs=0.02)


@pytest.mark.parametrize("t", [1e-4, 1e-3, 0.005, 0.5, 0.999])
def test_a_large_vocabulary_costs_nothing_where_the_model_is_right(t):
    """A model that is certain, with the release's vocabulary size: no cancellation and no infinity."""
    vocab = 262144
    for sure in (0.0, -1e-7, -1e-4):
        other = np.log(-np.expm1(sure) / (vocab - 1)) if sure else -np.inf
        log_p = mx.full((2, vocab), float(other))
        log_p[:, 5] = sure
        found = np.array(cost(log_p, mx.array([5, 5]), mx.array([5, 9]), mx.array([t, t])))
        assert np.isfinite(found).all() and (found >= 0).all()
        assert sure or found.max() <= 1e-6


def test_a_cost_is_never_negative_and_zero_for_the_true_rates():
    random = np.random.default_rng(0)
    log_p = mx.array(random.normal(size=(200, 9)).astype(np.float32))
    log_p = log_p - mx.logsumexp(log_p, axis=-1, keepdims=True)
    clean, noisy = (mx.array(random.integers(0, 9, 200).astype(np.int32)) for _ in range(2))
    t = mx.array(random.uniform(0.01, 0.99, 200).astype(np.float32))
    assert cost(log_p, clean, noisy, t).min().item() >= 0
    sure = mx.log(mx.maximum(mx.arange(9) == clean[:, None], 1e-30).astype(mx.float32))
    assert gap(cost(sure, clean, noisy, t), mx.zeros((200,))) < 1e-2


def test_without_examples_there_is_no_bound():
    assert refusal(DataError, bound, None, [], 0) == "There are no examples; give at least one."
