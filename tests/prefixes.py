"""Requests run as a scheduler runs them, with a prefix cache, and the same requests without one."""

from functools import cache as cache_of_calls

from loop import tiny_engine, tiny_request
from support import random_tokens

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.loop import Loop

PLENTY = 2**30
ONCE = {"max_tokens": 64, "max_denoising_steps": 1}


def run(engine, cache, request):
    """Generate a request as a scheduler does; returns its result."""
    loop, result = Loop(engine.model), None
    loop.add(request, *cache.find(request.prompt.cache_key))
    while loop.requests:
        for _, event in loop.step():
            assert not isinstance(event, Exception), event
            result = event.result if isinstance(event, Finished) else result
    for session in (request.session.take_snapshot(), request.session):
        if session is not None:
            cache.put(session)
    return result


def ask(engine, cache, tokens, blocks=1):
    """(tokens reused, answer's tokens) of a tiny request; that the answer is the one without a cache."""
    result = run(engine, cache, tiny_request(tokens, blocks))
    assert (result.tokens, result.stats.denoising_steps) == alone(tuple(tokens), blocks)
    return result.stats.reused_tokens, result.tokens


@cache_of_calls
def alone(tokens, blocks=1):
    """(tokens, steps) of the same without a cache."""
    (*_, finished) = tiny_engine().run(tiny_request(tokens, blocks))
    return finished.result.tokens, finished.result.stats.denoising_steps


def some(seed, length):
    return random_tokens(seed, length).tolist()


def same(engine, cache, prompt, **options):
    expected = engine.generate(prompt, seed=0, **options)
    result = run(engine, cache, engine.prepare(prompt, seed=0, **options))
    assert (result.tokens, result.stats.denoising_steps) == (expected.tokens, expected.stats.denoising_steps)
    return result
