"""Decisions, edits and templates over HTTP are what the engine itself says."""

import httpx
import pytest
from support import engine_of

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import Settings

from serving import Script, post  # isort: skip

CAPITAL = "What is the capital of France?"
LARGER = "Which is larger, 23 or 51?"
CITY = {"type": "choice", "name": "city", "instructions": CAPITAL, "choices": [{"value": "Paris"}, {"value": "Rome"}]}
BOTH = {"type": "number", "name": "one", "instructions": LARGER, "min": 23, "max": 51, "step": 28}


@pytest.fixture(scope="module")
def engine():
    return engine_of(DEMO)


@pytest.fixture(scope="module")
def ask(url):
    with httpx.Client(base_url=url, timeout=120) as client:

        def asked(path, **body):
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        yield asked


def close(found, wanted):
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_questions_get_the_probabilities_of_the_engine(ask, engine):
    told = ask("/v1/decisions", input="", questions=[CITY, BOTH], list_choices=False)
    city, number = told["answers"]
    paris, rome = (one["probability"] for one in city["probabilities"])
    close([paris, rome], list(engine.choose(CAPITAL, ["Paris", "Rome"]).values()))
    assert (city["type"], city["name"], city["choice"]) == ("choice", "city", "Paris")
    close(city["confidence"], paris * city["mass"])
    assert 0.5 < city["mass"] <= 1.001
    numbers = engine.choose(LARGER, range(23, 52, 28))
    assert [one["value"] for one in number["probabilities"]] == [23, 51]
    close([one["probability"] for one in number["probabilities"]], list(numbers.values()))
    assert number["number"] == 51
    close(number["mean"], sum(value * p for value, p in numbers.items()))
    usage = told["usage"]
    assert usage["input_tokens"] == usage["total_tokens"] > 0 == usage["output_tokens"]
    assert len(told["stats"]) == 2 and told["object"] == "decision"


def test_a_template_answers_together_and_calibration_divides(ask, engine):
    """The name of a question is a slot; both are read from one prompt."""
    template = "The capital of France is {city}."
    levels = {
        "type": "score",
        "name": "city",
        "instructions": CAPITAL,
        "levels": [{"label": "Rome"}, {"label": "Paris"}],
    }
    asked = {"questions": [levels], "list_choices": False, "answer": template, "calibrate": True, "seed": 3}
    (told,) = ask("/v1/decisions", input="", **asked)["answers"]
    labels = {"city": ["Rome", "Paris"]}
    wanted = engine.choose(CAPITAL, labels, answer=template, calibrate=True, seed=3)["city"]
    close([one["probability"] for one in told["probabilities"]], list(wanted.values()))
    close(told["score"], wanted["Paris"])
    assert [one["label"] for one in told["probabilities"]] == ["Rome", "Paris"]


def test_what_may_be_chosen_is_told_to_the_model(ask, engine):
    described = [{"value": "Paris", "description": "a city"}, {"value": True}]
    predicate = {"type": "predicate", "instructions": CAPITAL}
    choice = {"type": "choice", "instructions": CAPITAL, "choices": described}
    yes, city = ask("/v1/decisions", input="Hi.", questions=[predicate, choice])["answers"]
    asked = f"Hi.\n\n{CAPITAL}\n\nAnswer yes or no."
    close(yes["probability"], engine.choose(asked, bool)[True])
    asked = f"Hi.\n\n{CAPITAL}\n\nAnswer with one of these:\n- Paris: a city\n- true"
    close(city["probabilities"][0]["probability"], engine.choose(asked, ["Paris", "true"])["Paris"])
    assert city["probabilities"][1]["value"] is True


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"questions": []}, "questions", "questions is a list of 0; "),
        ({"questions": [{**BOTH, "max": 1}]}, "questions[0].max", "questions[0].max is 1; but min is 23"),
        ({"questions": [{**BOTH, "max": 10**6, "step": 1}]}, "questions[0].max", "questions[0].max is 1000000; which"),
        ({"questions": [{**CITY, "choices": [{"value": "a"}, {"value": "a "}]}]}, "questions[0].choices[1]",
         "questions[0].choices[1] is 'a '; it stands twice"),
        ({"questions": [CITY, CITY], "answer": "{city}"}, "questions[1].name", "questions[1].name is 'city'; it"),
        ({"questions": [CITY], "answer": "Paris"}, "answer", "The answer template 'Paris' has 0 slots {city}; give it"),
        ({"questions": [CITY], "stream": True}, "stream", "stream is true; choices come together: leave it out."),
        ({"questions": [CITY], "input": [{"role": "assistant", "content": "a"}]}, "input[0].role",
         "input[0].role is 'assistant'; the last message should be a user's"),
    ],
)  # fmt: skip
def test_a_decision_that_cannot_be_is_refused_in_a_sentence(url, body, param, sentence):
    answer = httpx.post(f"{url}/v1/decisions", json={"input": "", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(sentence)


def test_edits_and_templates_are_the_engines(ask, engine):
    text, once = "the cat  \r\n", {"max_denoising_steps": 1, "seed": 2}
    told = ask("/v1/edits", input=text, instruction="Write in uppercase", strength=0.2, **once)
    same = engine.edit(text, "Write in uppercase", strength=0.2, **once)
    assert told["choices"] == [{"index": 0, "text": same.text, "finish_reason": same.finish_reason}]
    assert told["object"] == "edit"
    holes = {"city": ["Oslo", "Rome"]}
    told = ask("/v1/fill", template="I like {city}.", holes=holes, **once)
    same = engine.fill("I like {city}.", holes, **once)
    assert (told["choices"][0]["text"], told["choices"][0]["holes"]) == (same.text, same.holes)


@pytest.mark.parametrize(
    ("path", "body", "param", "sentence"),
    [
        ("/v1/edits", {"input": " ", "instruction": "a"}, "input", "input is ' '; it should be a text that is not"),
        ("/v1/fill", {"template": "{a", "holes": {}}, "template", "The template '{a' is broken"),
        ("/v1/fill", {"template": "{a}", "holes": {"a": "("}}, "holes", "The pattern '(' is not a regular expression"),
    ],
)
def test_a_task_that_cannot_be_is_refused_in_a_sentence(url, path, body, param, sentence):
    error = httpx.post(url + path, json=body).json()["error"]
    assert error["param"] == param and error["message"].startswith(sentence)


def test_a_task_is_streamed_as_drafts_and_a_whole_text(url):
    body = {"input": "the cat", "instruction": "Write in uppercase", "seed": 2, "max_denoising_steps": 2}
    with httpx.stream("POST", f"{url}/v1/edits", json={**body, "stream": True, "drafts": True}, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    events = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in lines[:-1]]
    assert lines[-1] == "data: [DONE]"
    assert any("draft" in event for event in events)
    texts = [event["choices"][0]["text"] for event in events if event["choices"]]
    assert texts[:-1] == [""] and texts[-1]
    assert events[-1]["choices"][0]["finish_reason"] and events[-1]["stats"]["denoising_steps"] > 0


def test_too_many_pictures_are_refused():
    part = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
    body = {"input": [{"role": "user", "content": [part, part]}], "questions": [CITY]}
    status, answer = post(create_app(Script(), Settings(pictures=1)), "/v1/decisions", body)
    assert (status, answer["error"]["message"]) == (400, "There are more than 1 pictures; send fewer.")
