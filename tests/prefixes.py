"""Jobs run as a scheduler runs them, with a prefix cache, and the same jobs without one."""

from functools import cache as cache_of_calls

from loop import tiny_engine, tiny_job
from support import random_tokens

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.loop import Loop

PLENTY = 2**30
ONCE = {"max_tokens": 64, "max_denoising_steps": 1}


def run(engine, cache, job):
    """Generate a job as a scheduler does; returns its result."""
    loop, result = Loop(engine.model), None
    engine.start(loop, job, *cache.find(job.row.cache_key))
    while loop.jobs:
        for _, event in engine.advance(loop):
            assert not isinstance(event, Exception), event
            result = event.result if isinstance(event, Finished) else result
    for session in (job.branch, job.session):
        if session is not None:
            cache.put(session)
    return result


def ask(engine, cache, tokens, blocks=1):
    """(tokens reused, answer's tokens) of a tiny job; that the answer is the one without a cache."""
    result = run(engine, cache, tiny_job(tokens, blocks))
    assert (result.tokens, result.stats.denoising_steps) == alone(tuple(tokens), blocks)
    return result.stats.reused_tokens, result.tokens


@cache_of_calls
def alone(tokens, blocks=1):
    """(tokens, steps) of the same without a cache."""
    (*_, finished) = tiny_engine().run(tiny_job(tokens, blocks))
    return finished.result.tokens, finished.result.stats.denoising_steps


def some(seed, length):
    return random_tokens(seed, length).tolist()


def same(engine, cache, prompt, **options):
    expected = engine.generate(prompt, seed=0, **options)
    result = run(engine, cache, engine.prepare(prompt, seed=0, **options))
    assert (result.tokens, result.stats.denoising_steps) == (expected.tokens, expected.stats.denoising_steps)
    return result
