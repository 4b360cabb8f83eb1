"""Log-probabilities belong to tokens, whatever is asked of the canvases, alone and in a batch.

The reported number of each token is held against the logits of the step in which its canvas ended.
"""

import mlx.core as mx
import numpy as np
import pytest
from support import engine_of

from mlx_dgemma.decoding.canvas import CanvasBatch
from mlx_dgemma.decoding.events import Block, Draft, Finished, ScoredToken
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.model.head import Prediction
from mlx_dgemma.tasks.edit import edit
from mlx_dgemma.tasks.infill import infill

STEPS = 2
CUT = "infill", "open infill", "thought"
FEW = {"max_denoising_steps": STEPS, "seed": 1}


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture
def last_logits(engine, monkeypatch):
    """{id of a row's prefix: its newest step's logits by the whole vocabulary, [C, V] log-probabilities}."""
    found, honest = {}, CanvasBatch.advance_to

    def advance_to(batch, forward, *arguments):
        known = forward.prediction
        if isinstance(known, Prediction):
            logits = engine.model.logits(known.hidden) / known.temperature
        else:
            logits = known.logits
        log_p = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if len(batch.prefixes) == len(log_p):
            found.update({id(prefix): row for prefix, row in zip(batch.prefixes, log_p)})
        return honest(batch, forward, *arguments)

    monkeypatch.setattr(CanvasBatch, "advance_to", advance_to)
    return found


def requests_of(engine):
    """One request of every kind; those of one canvas length and the same options are denoised together."""
    builder = engine.builder
    return {
        "plain": engine.prepare("Count from 1 to 25.", max_tokens=100, **FEW),
        "together": engine.prepare("Spell the word frog.", **FEW),
        "stop": engine.prepare("Count from 1 to 25.", stop=[", 4"], **FEW),
        "fast": engine.prepare("Sort these numbers: 42, 7, 19", fast=True, **FEW),
        "exact": engine.prepare("Sort these numbers: 42, 7, 19", exact=True, **FEW),
        "regex": engine.prepare("Say hello", regex="[xyz]{6}", **FEW),
        "fast regex": engine.prepare("Say hello", regex="[xyz]{6}", fast=True, **FEW),
        "thought": engine.prepare("Say hello", regex="[xyz]{6}", thinking=True, max_tokens=90, **FEW),
        "infill": infill(builder, "The capital of France is", " and it lies on the Seine.", length=3, **FEW),
        "open infill": infill(builder, "The capital of Fra", "", length=4, **FEW),
        "edit": edit(builder, "The cat sat on the mat.", "Write in capitals", **FEW),
    }


def test_each_log_probability_is_of_its_token_in_the_step_that_ended_its_canvas(engine, last_logits):
    requests, builder, special = requests_of(engine), engine.builder, set(engine.tokenizer.all_special_ids)
    names, loop = {request: name for name, request in requests.items()}, Loop(engine.model)
    for number, request in enumerate(requests.values()):
        request.drafts = number % 2 == 0
        loop.add(request)
    told, results = {name: [] for name in requests}, {}
    while loop.requests:
        for request, event in loop.step():
            name = names[request]
            assert not isinstance(event, Exception), (name, event)
            if isinstance(event, Block):
                log_p = last_logits[id(request.session.prefix)]
                expected = log_p[np.arange(len(event.tokens)), list(event.tokens)]
                told[name] += zip(event.tokens, expected.tolist())
                if name != "infill":  # what stands around a hole is fixed, so it is certain
                    assert np.abs(np.array(event.log_probs) - expected).max() < 1e-3, name
            elif isinstance(event, Finished):
                results[name] = event.result
            else:
                assert isinstance(event, Draft)
    assert results.keys() == requests.keys()
    for name, result in results.items():
        stream = told[name]
        if name == "infill":
            start = [token for token, _ in stream].index(result.tokens[0])
            stream = stream[start : start + 3]
        assert result.tokens == [token for token, _ in stream[: len(result.tokens)]], name
        assert len(result.log_probs) == len(result.tokens) > 0, name
        expected = [one for _, one in stream[: len(result.tokens)]]
        assert np.abs(np.array(result.log_probs) - expected).max() < 1e-3, name
        assert [(one.token, one.log_prob) for one in result.scored] == list(zip(result.tokens, result.log_probs))
        text = builder.token_bytes.to_bytes([one for one in result.tokens if one not in special]).decode()
        if name == "stop":
            assert text.startswith(result.text + ", 4")
        else:  # the piece of a word before a hole belongs to the hole's tokens, and a thought stands before its text
            assert text.endswith(result.text) if name in CUT else text == result.text, name
    # Numbers that would be equal by chance prove nothing: what a language chose is not what the model expected.
    assert max(results["regex"].log_probs) < -0.5
    assert min(min(results[name].log_probs) for name in ("plain", "fast", "edit")) < -0.01


def test_a_token_without_its_score_is_refused():
    """Two lists that do not belong together never leave the loop."""
    assert Block(0, 1, (3, 4), log_probs=(-1.0, -2.0)).scored == (ScoredToken(3, -1.0), ScoredToken(4, -2.0))
    with pytest.raises(ValueError, match="shorter"):
        Block(0, 1, (3, 4), log_probs=(-1.0,))
