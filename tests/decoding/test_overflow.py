"""States that hold inf or NaN end their request, and no other."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from loop import OPTIONS, Reader, request_of, run
from support import random_tokens, refusal, small_model
from test_modes import BASE

from mlx_dgemma.decoding.events import Finished
from mlx_dgemma.decoding.lookahead import denoise_block
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.errors import RangeError
from mlx_dgemma.model.functions import finite

MODES = {"default": BASE, "exact": OPTIONS, "fast": replace(BASE, fast=True)}
PROMPTS = [random_tokens(seed, 6).tolist() for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def model():
    return small_model(3, scale=0.2)


def break_keys(prefix):
    for layer in prefix.layers:
        layer.keys = layer.keys * mx.nan


def test_finite_rows():
    x = np.ones((5, 2, 3), np.float32)
    x[1, 1, 2], x[2, 0, 0], x[3, 0, 1] = np.nan, np.inf, -np.inf
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        assert finite(mx.array(x).astype(dtype)).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", [1, 2])
def test_the_others_of_a_batch_go_on(model, mode, when):
    """The middle one breaks after its prompt, or after its first step."""
    options = replace(MODES[mode], max_denoising_steps=4)
    _, alone = run(model, PROMPTS, [2, 2, 2], [0, 1, 2], options)
    readers = [Reader(2) for _ in PROMPTS]
    requests = [request_of(model, *one, options) for one in zip(PROMPTS, readers, (0, 1, 2))]
    loop, failed, finished, steps = Loop(model), [], [], 0
    for request in requests:
        loop.add(*request)
    while loop.requests:
        for request, event in loop.step():
            if isinstance(event, Exception):
                failed.append((request, event))
            if isinstance(event, Finished):
                finished.append(request)
        steps += 1
        if steps == len(PROMPTS) - 1 + when:
            break_keys(requests[1][1].prefix)
    ((request, error),) = failed
    assert request is requests[1][0] and isinstance(error, RangeError)
    assert "its weights are broken" in str(error)
    assert {id(one) for one in finished} == {id(requests[0][0]), id(requests[2][0])}
    assert [readers[i].taken for i in (0, 2)] == [alone[i].taken for i in (0, 2)]
    assert requests[1][1].cache_key == [] and requests[1][1].prefix.offset == 0  # nothing broken is used again


def test_a_block_alone_fails(model):
    prefix = model.new_prefix()
    model.encode(mx.array([PROMPTS[0]]), prefix)
    mx.eval(prefix.state)
    break_keys(prefix)
    steps = denoise_block(model, prefix, BASE, mx.random.key(0)[None])
    assert "inf or NaN" in refusal(RangeError, lambda: list(steps))


def test_the_error_says_what_to_do(model, monkeypatch):
    assert str(model.range_error()) == (
        "The model computed inf or NaN, so there is no answer; its weights are broken, convert them again."
    )
    monkeypatch.setattr(model, "_dtype", mx.float16)
    assert str(model.range_error()).endswith('load it without --dtype float16 (dtype="float16").')
