"""Completions as editors ask for them: recorded bodies arrive as holes, and their answers are what the editors read."""

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.server.endpoints.completions import CompletionExchange, StopCutter
from mlx_dgemma.server.endpoints.infill import LlamaCompletionExchange, LlamaInfillExchange, MistralFillExchange
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.schemas.fields import parse_body
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.tasks.markers import Parts, parts_of_prompt

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "editors.json").read_text(encoding="utf-8"))
KINDS = {
    "/v1/completions": CompletionExchange,
    "/v1/fim/completions": MistralFillExchange,
    "/infill": LlamaInfillExchange,
    "/completion": LlamaCompletionExchange,
}
ENGINE = SimpleNamespace(options=GenerationOptions())
SIGN = RECORDED["cases"]["sign"]


def body_of(recorded):
    """A recorded body with its case's texts in their places."""
    case = RECORDED["cases"][recorded["case"]]

    def put(value):
        if isinstance(value, str):
            return value.replace("{{PREFIX}}", case["prefix"]).replace("{{SUFFIX}}", case["suffix"])
        if isinstance(value, dict):
            return {name: put(one) for name, one in value.items()}
        return [put(one) for one in value] if isinstance(value, list) else value

    return put(recorded["body"])


def exchange(path, **body):
    kind = KINDS[path]
    return kind(parse_body(kind.BODY, json.dumps(body).encode()), ENGINE, Settings())


@pytest.mark.parametrize("recorded", RECORDED["bodies"], ids=lambda one: one["client"])
def test_bodies_of_editors_arrive_as_holes(recorded):
    case = RECORDED["cases"][recorded["case"]]
    found = exchange(recorded["path"], **body_of(recorded))
    assert found.parts[:2] == (case["prefix"], case["suffix"])
    assert len(found.parts.files) == recorded.get("context", 0)
    asked = recorded["body"]
    limit = asked.get("n_predict") or asked.get("max_tokens") or asked.get("options", {}).get("num_predict")
    assert found.arguments.get("max_tokens") == limit
    sampling = {"top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"} & set(asked)
    assert sampling <= set(found.ignored.get("x_ignored", ()))


def test_at_least_thirty_are_recorded():
    assert len(RECORDED["bodies"]) >= 30


PROMPTS = [
    ("<|fim_suffix|>b<|fim_prefix|>a<|fim_middle|>", Parts("a", "b")),
    ("<fim_prefix><fim_suffix>b<fim_middle>a", Parts("a", "b")),  # the prefix stands behind the middle
    ("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>+", Parts("a+", "b")),  # the answer has begun
    ("<PRE>  a  <SUF> b  <MID>", Parts(" a ", " b ")),  # one blank belongs to each marker
    ("<PRE> <SUF>b <MID> a", Parts("a", "b")),
    ("<|fim_prefix|>a<|fim_suffix|><|fim_middle|>", Parts("a", "")),
    ("<|repo_name|>r\n<|file_sep|>x.py\n1\n<|file_sep|>y.py\n  a\n", Parts("  a\n", "", ("x.py\n1",))),
    ("<|fim_prefix|>'<|fim_prefix|>' + p + '<|fim_suffix|>' + s + '<|fim_middle|>'<|fim_suffix|>b<|fim_middle|>",
     Parts("'<|fim_prefix|>' + p + '<|fim_suffix|>' + s + '<|fim_middle|>'", "b")),
    ("<fim_prefix>a<fim_suffix>'<fim_prefix>p<fim_suffix>s<fim_middle>'<fim_middle>",
     Parts("a", "'<fim_prefix>p<fim_suffix>s<fim_middle>'")),
    ("[SUFFIX]b[PREFIX]+++++ x.py\n1\n+++++ y.py\na", Parts("a", "b", ("x.py\n1",))),
]  # fmt: skip
TEXTS = ["<|fim_prefix|>a<|fim_suffix|>b", "<|fim_prefix|>a<|fim_middle|>", "<|fim_middle|>a<|fim_suffix|>b", "<PRE> a",
         "[PREFIX]a[SUFFIX]b", "a <file_sep> b", "<|fim_prefix|>a<fim_suffix>b<|fim_middle|>", ""]  # fmt: skip


@pytest.mark.parametrize(("prompt", "parts"), PROMPTS)
def test_markers_are_read(prompt, parts):
    assert parts_of_prompt(prompt) == parts


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_which_markers_are_missing_stays_one(text):
    assert parts_of_prompt(text) is None
    assert exchange("/v1/completions", prompt=text).parts == (text, "", ())


def test_a_suffix_of_its_own_leaves_the_prompt_as_it_is():
    prompt = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert exchange("/v1/completions", prompt=prompt, suffix="c").parts == (prompt, "c", ())


def test_key_strokes_have_a_seed_and_cold_temperatures_are_none():
    marked = "<fim_prefix>a<fim_suffix>b<fim_middle>"
    assert exchange("/v1/completions", prompt=marked).arguments["seed"] == 0
    assert exchange("/infill", input_prefix="a", seed=7, temperature=0.1).arguments == {"seed": 7}
    assert "t_max" in exchange("/v1/fim/completions", prompt="a", temperature=0.7).arguments
    cold = exchange("/v1/completions", prompt="a", suffix="b", options={"temperature": 0.2, "num_ctx": 8, "stop": "x"})
    assert cold.arguments == {"seed": 0} and cold.ignored == {"x_ignored": ["options.num_ctx"]}
    assert exchange("/v1/completions", prompt="a", max_tokens=-1, model="").arguments.keys() == {"seed"}


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens is 0; it should be a whole number"),
        ("/v1/completions", {"prompt": "a", "mode": "causal", "presence_penalty": 1}, "presence_penalty is 1"),
        ("/v1/completions", {"prompt": "a", "stop": ["x"] * 65}, "stop is a list of 65; it should be a string that"),
        ("/infill", {}, "input_prefix is missing; give it."),
        ("/infill", {"input_prefix": "a", "lora": [{"id": 0}]}, "lora is a list of 1; an adapter is chosen when"),
        ("/completion", {"input_prefix": "a"}, "input_prefix is given, but it belongs to /infill; put the text into"),
        ("/v1/fim/completions", {"prompt": "a", "min_tokens": 3}, "min_tokens is 3; a hole is as long as its text"),
    ],
)  # fmt: skip
def test_what_editors_cannot_have_is_refused_in_a_sentence(path, body, sentence):
    with pytest.raises(ApiError) as caught:
        exchange(path, **body)
    assert str(caught.value).startswith(sentence)


def test_a_line_that_is_indented_too_little_ends_a_text():
    cutter = StopCutter([], indent=4)
    assert cutter.add("x\n    y\n\n    z\n") == "x\n    y\n\n    z\n"
    assert cutter.add("  w", last=True) == "" and cutter.stopped
    assert cutter.text == "x\n    y\n\n    z"


def events_of(answer):
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_answers_are_what_editors_read(url):
    """One fill for each shape; of a few tokens, so that one pass finds the length."""
    with httpx.Client(base_url=url, timeout=60) as client:

        def ask(path, **body):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer

        fill, sides = SIGN["fill"], {"input_prefix": SIGN["prefix"], "input_suffix": SIGN["suffix"]}
        marked = f"<PRE> {SIGN['prefix']} <SUF>{SIGN['suffix']} <MID>"
        told = ask("/v1/completions", prompt=marked, max_tokens=4, top_p=0.9, stop=["<PRE>"] * 9).json()
        assert told["choices"] == [{"text": fill, "index": 0, "logprobs": None, "finish_reason": "stop"}]
        assert told["x_ignored"] == ["top_p"] and told["stats"]["generated_tokens"] <= 4
        both = ask("/infill", **sides, n_predict=4, n_cmpl=2, response_fields=["content", "timings/predicted_n"]).json()
        assert both[0] == {"content": fill, "timings/predicted_n": 2} and len(both) == 2
        pieces = events_of(ask("/completion", prompt=marked, n_predict=4, stream=True))
        assert "".join(one["content"] for one in pieces) == fill
        assert [one["stop"] for one in pieces][-1] and not any(one["stop"] for one in pieces[:-1])
        assert pieces[-1]["timings"]["predicted_n"] == 2 and pieces[-1]["stop_type"] == "eos"
        fim = {"prompt": SIGN["prefix"], "suffix": SIGN["suffix"], "max_tokens": 4}
        answer = ask("/v1/fim/completions", **fim, stream=True)
        assert "".join(one["choices"][0]["delta"]["content"] for one in events_of(answer)) == fill
        assert answer.text.rstrip().endswith("data: [DONE]")
        warm = ask("/infill", input_prefix="", input_suffix="", n_predict=0, response_fields=[""], stream=True)
        assert warm.json() == {}
