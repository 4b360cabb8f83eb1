"""The model for lm-evaluation-harness, beside an interface that is no more than the model uses."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

import mlx_dgemma
from mlx_dgemma import OptionError

NAME = "mlx_dgemma.plugins.lm_eval"
FROG = [{"role": "user", "content": "Spell the word frog."}]


class FakeLM:
    def __init__(self):
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda kind, asked, told: self.kept.append((kind, asked, told)))


@pytest.fixture(scope="module")
def harness():
    """The module, with its model registered in a dict."""
    registered = {}
    fakes = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")}
    fakes["lm_eval.api.model"].LM = FakeLM
    fakes["lm_eval.api.registry"].register_model = lambda name: lambda kind: registered.setdefault(name, kind)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fakes.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, NAME, raising=False)
        module = importlib.import_module(NAME)
        patch.delitem(sys.modules, NAME)
        engine = mlx_dgemma.load()
        patch.setattr(module, "load", lambda *_, **__: engine)
        yield SimpleNamespace(module=module, model=registered["mlx-dgemma"], engine=engine)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def test_texts(harness):
    lm = harness.model(max_gen_toks=16, batch_size="auto", seed=0)
    context = lm.apply_chat_template(FROG)
    assert lm._encode(context) == harness.engine.builder.prompt_tokens(FROG).tokens
    texts = lm.generate_until([asked(context, {"until": ["o"], "do_sample": False}), asked(context, {})])
    assert texts == ["f r ", "f r o g"]
    assert [kind for kind, *_ in lm.kept] == ["generate_until"] * 2
    causal = harness.model(mode="causal", max_gen_toks=16)
    assert causal.generate_until([asked(context, {"do_sample": False})]) == ["f r o g"]
    with pytest.raises(OptionError, match="warmth is not an option"):
        harness.model(warmth=2)


def test_the_likelihood_is_that_of_the_causal_mode(harness):
    lm = harness.model()
    context = lm.apply_chat_template(FROG)
    result = harness.engine.generate(FROG, mode="causal", temperature=0, seed=0)
    (best, worse, bare, ended) = lm.loglikelihood(
        [asked(context, result.text), asked(context, "g o r f"), asked("", "Paris"), asked("The capital ", "of")]
    )
    assert best[0] == pytest.approx(sum(result.log_probs[: len(result.tokens)]), abs=1e-4)
    assert (best[1], worse[1]) == (True, False)
    assert worse[0] < best[0] and bare[0] < 0 and ended[0] < 0
    text = "The capital of France is Paris."
    (whole,) = lm.loglikelihood_rolling([asked(text)])
    assert whole == pytest.approx(lm.loglikelihood([asked("", text)])[0][0], abs=1e-4)


def test_a_long_text_is_scored_in_pieces_and_each_token_once(harness, monkeypatch):
    lm, scored = harness.model(), []
    monkeypatch.setattr(type(lm), "max_length", 4)
    monkeypatch.setattr(lm, "_encode", lambda text: list(range(10)))
    monkeypatch.setattr(lm, "score", lambda tokens, start: scored.append((tokens, start)) or (1.0, True))
    assert lm.loglikelihood_rolling([asked("")]) == [3.0]
    assert scored == [([0, 1, 2, 3], 1), ([3, 4, 5, 6], 1), ([6, 7, 8, 9], 1)]
    assert lm._pair("", "") == ([6, 7, 8, 9], 3)


def test_the_bound(harness, monkeypatch):
    monkeypatch.setattr(harness.module, "infer_fill_token", lambda *_: 0)
    lm = harness.model(likelihood="bound", draws=1)
    context = lm.apply_chat_template(FROG)
    ((right, _), (wrong, greedy)) = lm.loglikelihood([asked(context, "f r o g"), asked(context, "Paris in May")])
    assert wrong < right < 0 and greedy is False
    with pytest.raises(OptionError, match="likelihood is 'exact'; it should be causal or bound"):
        harness.model(likelihood="exact")
