"""Text token by token: against Transformers, against a loop without a cache, alone and in company, drafted or not."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from loop import Reader, request_of
from naive import Naive
from support import DATA, RED, engine_of, prompt_of, random_tokens, refusal, small_model, square

from mlx_dgemma.decoding.events import Block, Finished
from mlx_dgemma.decoding.loop import Loop
from mlx_dgemma.decoding.options import GenerationOptions, Sampling
from mlx_dgemma.decoding.sampler import draw, lowest_kept
from mlx_dgemma.decoding.session import Session
from mlx_dgemma.errors import OptionError, RangeError
from mlx_dgemma.model.kv_cache import LayerKV

GREEDY = GenerationOptions(mode="causal", temperature=0, end_tokens=(39,))
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.2)
PROMPTS = [random_tokens(seed, n).tolist() for seed, n in ((1, 9), (2, 1), (3, 17))]  # the window is 5


@pytest.fixture(scope="module")
def model():
    return small_model(3, scale=0.2)


class Counting(Reader):
    """Takes so many tokens, one block or many."""

    @property
    def finish_reason(self):
        return "length" if len(self.tokens) >= self.blocks else self.reason

    @property
    def left(self):
        return self.blocks - len(self.tokens)

    def feed(self, tokens, log_probs):
        self.taken.append(tokens)
        self.log_probs += log_probs
        return self.finish_reason


def generate(model, asked, late=()):
    """Tokens and log-probabilities of (prompt, count, seed, options) each, together; those in `late` join later."""
    made = [request_of(model, prompt, Counting(count), seed, options) for prompt, count, seed, options in asked]
    loop, waiting, blocks = Loop(model), dict(late), [[] for _ in asked]
    steps = 0
    while len(waiting) + len(loop.requests) or not steps:
        for row, one in enumerate(made):
            if waiting.get(row, 0) == steps:
                waiting.pop(row, None)
                loop.add(*one)
        for request, event in loop.step():
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Block):
                blocks[[one for one, _ in made].index(request)].append(event)
        steps += 1
    for (request, session), told in zip(made, blocks):
        tokens = [token for block in told for token in block.tokens]
        assert request.reader.tokens == tokens and session.prefix.offset == len(session.cache_key)
        assert (request.prompt.tokens + tokens)[: session.prefix.offset] == session.cache_key
    return [(request.reader.tokens, request.reader.log_probs) for request, _ in made]


def plainly(model, prompt, count, seed, options):
    """The same with a pass over the whole text for every token, by the float64 oracle; keys as they are told."""
    naive, tokens, log_probs = Naive(model), list(prompt), []
    root, keys = mx.random.key(seed), []
    for place in range(count):
        hidden, _ = naive.encode(tokens)
        logits = naive.logits(hidden[-1])
        log_p = logits - np.logaddexp.reduce(logits)
        if options.temperature == 0:
            token = int(logits.argmax())
        else:
            if place % 64 == 0:
                root, key = mx.random.split(root, 2)
                keys += list(mx.random.split(key, 64))
            seen = sorted(set(tokens))
            penalty = np.where(logits[seen] > 0, 1 / options.repetition_penalty, options.repetition_penalty)
            scores = logits.copy()
            scores[seen] *= penalty
            scores /= options.temperature
            kept = np.argsort(-scores)[: options.top_k]
            p = np.exp(scores[kept] - np.logaddexp.reduce(scores[kept]))
            kept = kept[np.cumsum(p) - p < options.top_p]
            kept = kept[np.exp(scores[kept] - scores.max()) >= options.min_p]
            noise = np.array(mx.random.gumbel((len(logits),), key=keys[place]))
            token = int(kept[(scores + noise)[kept].argmax()])
        tokens.append(token)
        log_probs.append(log_p[token])
    return tokens[len(prompt) :], log_probs


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_tokens_equal_a_loop_without_a_cache_alone_and_in_company(model, options):
    """Beyond the window and around the ring; rows of several lengths join late and leave early."""
    asked = [(prompt, count, 7 + i, options) for i, (prompt, count) in enumerate(zip(PROMPTS, (16, 9, 6)))]
    plain = [plainly(model, *one) for one in asked]
    for found in (generate(model, asked, late={1: 4, 2: 2}), [generate(model, [one])[0] for one in asked[:2]]):
        for (tokens, log_probs), (right, right_log_probs) in zip(found, plain):
            assert tokens == right
            assert np.abs(np.array(log_probs) - right_log_probs).max() < 1e-3
    if options is DRAWN:
        greedy = [(prompt, count, seed, GREEDY) for prompt, count, seed, _ in asked]
        assert [one[0] for one in generate(model, greedy)] != [one[0] for one in plain]


def test_greedy_tokens_are_those_of_transformers(demo):
    """And drafts change nothing. Cases of every kind: tools, thinking, several turns, long ones."""
    engine = engine_of(demo)
    for case in json.loads((DATA / "causal.json").read_text())[::4]:
        told = {}
        for mode in ("causal", "speculative"):
            options = engine.options.override(mode=mode, temperature=0, max_tokens=400)
            request, session = request_of(engine.model, case["prompt_ids"], Counting(len(case["tokens"])), 0, options)
            loop = Loop(engine.model)
            loop.add(request, session)
            while loop.requests:
                for _, event in loop.step():
                    told[mode] = event
            assert isinstance(told[mode], Finished), told[mode]
            assert told[mode].result.tokens == case["tokens"], (mode, case["task"])
            assert abs(sum(told[mode].result.log_probs) - case["log_prob"]) < 1e-3
        stats = told["speculative"].result.stats
        assert stats.mode == "speculative" and stats.accepted_tokens <= stats.drafted_tokens
        assert stats.causal_passes <= told["causal"].result.stats.causal_passes


def test_what_is_cut_is_never_drawn():
    scores = mx.log(mx.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))

    def kept(**options):
        return (scores >= lowest_kept(scores, Sampling(**options)) - 1e-6).sum(axis=-1).tolist()

    assert kept() == [4, 4]
    assert kept(top_k=2) == [2, 2]
    assert kept(top_p=0.6) == [2, 2]
    assert kept(top_p=0.01) == kept(top_k=1) == [1, 1]
    assert kept(top_k=3, top_p=0.8) == [2, 3]  # 0.5 and 0.25 of 0.9; 0.4, 0.3 and 0.2 of 0.9
    assert kept(min_p=0.45) == [2, 3]
    allowed = mx.array([[False, False, True, True]])
    tokens, log_probs = draw(scores, Sampling(temperature=0), None, allowed=allowed)
    assert tokens.tolist() == [2, 3]
    assert np.allclose(np.exp(np.array(log_probs)), [0.15, 0.4])  # by the model's own distribution


def test_a_session_goes_on_in_another_mode(demo):
    """Each turn encodes only what is new, the window (96) passed by; the answers are those without a session."""
    engine = engine_of(demo)
    session, messages = engine.session(), []
    for mode, words in (("causal", 40), ("diffusion", 4), ("speculative", 4)):
        messages = [*messages, {"role": "user", "content": "Sort these numbers: " + "42 7 19 " * (words // 4)}]
        token_options = {} if mode == "diffusion" else {"temperature": 0.7}
        options = {"mode": mode, "seed": 1, "max_tokens": 4, **token_options}
        held = session.prefix.offset
        inside = engine.generate(messages, session=session, **options)
        assert inside.stats.reused_tokens >= held - 30  # what the template leaves out of an answer is encoded again
        assert inside.tokens == engine.generate(messages, **options).tokens
        assert session.prefix.offset == len(session.cache_key)
        messages = [*messages, {"role": "assistant", "content": inside.text}]


def test_pictures_are_seen(demo):
    engine = engine_of(demo)
    asked = {"images": [square(RED)], "image_tokens": 70}
    found = engine.generate("What color is the shape?", mode="causal", temperature=0, max_tokens=2, **asked)
    prompt, session, tokens = prompt_of(engine, "What color is the shape?", **asked), Session(engine.model), []
    for _ in range(2):
        features, session = session.features, Session(engine.model)
        session.features = features
        key = [*prompt.cache_key, *tokens]
        session.encode_all(replace(prompt, tokens=prompt.tokens + tokens, cache_key=key).without_last())
        last = engine.model.encode(mx.array([(prompt.tokens + tokens)[-1:]]), session.prefix)
        tokens.append(int(mx.argmax(engine.model.logits(last)).item()))
    assert found.tokens == tokens


def test_streams_and_stop_strings(demo):
    engine, options = engine_of(demo), {"mode": "causal", "temperature": 0}
    *blocks, last = engine.stream("Spell the word frog.", **options)
    whole = last.result
    assert whole.text == "f r o g" == "".join(block.text for block in blocks)
    assert len(blocks) == len(whole.tokens) + 1  # the end token's, too
    stopped = engine.generate("Spell the word frog.", **options, stop=["o"])
    assert (stopped.text, stopped.finish_reason) == ("f r ", "stop")
    short = engine.generate("Spell the word frog.", **options, max_tokens=2)
    assert short.finish_reason == "length" and short.tokens == whole.tokens[:2]


def test_a_text_ends_where_the_context_does():
    model = small_model(3, scale=0.2, max_position_embeddings=24)
    for mode in ("causal", "speculative"):
        ((tokens, _),) = generate(model, [(PROMPTS[0], 100, 0, replace(GREEDY, mode=mode))])
        assert len(tokens) == 24 - len(PROMPTS[0])


@pytest.mark.parametrize("mode", ["causal", "speculative"])
def test_an_interrupt_leaves_a_session_that_goes_on(model, monkeypatch, mode):
    """In the middle of a pass's acceptance, when some rings have the new token and some have not."""
    options = replace(GREEDY, mode=mode)
    ((right, _),) = generate(model, [(PROMPTS[2], 9, 0, options)])
    request, session = request_of(model, PROMPTS[2], Counting(9), 0, options)
    accept, calls = LayerKV.accept, []

    def interrupted(layer, *arguments):
        calls.append(layer)
        if len(calls) == 8:
            raise KeyboardInterrupt
        accept(layer, *arguments)

    monkeypatch.setattr(LayerKV, "accept", interrupted)
    loop = Loop(model)
    loop.add(request, session)
    with pytest.raises(KeyboardInterrupt):
        while True:
            list(loop.step())
    loop.close()
    assert session.prefix.offset == len(session.cache_key) == len(PROMPTS[2]) - 1  # where the prompt ended
    request, _ = request_of(model, PROMPTS[2], Counting(9), 0, options)
    loop.add(request, session)
    while loop.requests:
        list(loop.step())
    assert request.reader.tokens == right and session.reused_tokens == len(PROMPTS[2]) - 1


def test_inf_ends_one_request_and_its_session_is_empty(model):
    broken = small_model(3, scale=0.2)
    broken.model.decoder.norm.weight = broken.model.decoder.norm.weight * mx.inf
    for mode in ("causal", "speculative"):
        request, session = request_of(broken, PROMPTS[0], Counting(4), 0, replace(GREEDY, mode=mode))
        loop = Loop(broken)
        loop.add(request, session)
        told = []
        while loop.requests:
            told += [event for _, event in loop.step()]
        assert [type(event) for event in told] == [RangeError] and session.cache_key == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"mode": "causal", "exact": True}, "exact is True"),
        ({"temperature": 0.5}, "temperature is 0.5, but the mode is diffusion"),
        ({"top_k": 4}, "top_k is 4, but the mode is diffusion"),
        ({"mode": "causal", "top_p": 0}, "top_p is 0"),
        ({"mode": "causal", "min_p": 2}, "min_p is 2"),
        ({"mode": "causal", "repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"mode": "causal", "temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_options_of_another_mode_are_refused(options, words):
    assert words in refusal(OptionError, GenerationOptions().override, **options)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"t_min": 0.5}, "mode is 'causal' and t_min is 0.5, which is of canvases alone: leave one out."),
        ({"patience": 0}, "mode is 'causal' and patience is 0, which is of canvases alone: leave one out."),
    ],
)
def test_what_is_of_canvases_alone_is_refused(asked, message):
    with pytest.raises(OptionError) as caught:
        GenerationOptions(t_min=0.3, patience=3).override(mode="causal", **asked)
    assert str(caught.value) == message
