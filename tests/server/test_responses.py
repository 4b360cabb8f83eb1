"""POST /v1/responses with OpenAI's own client against a server with the demo, and /openapi.json."""

import base64
import io
import json

import jsonschema
import openai
import pytest
from openai.types.responses import Response
from serving import Script, ask, post, serving
from support import RED, engine_of, square

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.events import Block
from mlx_dgemma.model.patches import BUDGETS
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.schemas.openapi import openapi_document
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.scheduler import Failed, Scheduler

PATH = "/v1/responses"
JSON_PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}},
        "required": ["city"],
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def url():
    with serving(Scheduler(mlx_dgemma.load(DEMO, dtype="float32"), rows=4, waiting=8), model="demo") as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def respond(client, given, seed=0, extra=None, **options):
    return client.responses.create(model="demo", input=given, extra_body={"seed": seed, **(extra or {})}, **options)


def expected(prompt, **options):
    return engine_of(DEMO).generate(prompt, seed=0, **options)


def data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_an_answer_is_the_engines(client):
    response, result = respond(client, JSON_PROMPT), expected(JSON_PROMPT)
    Response.model_validate(response.model_dump())
    assert (response.output_text, response.status, response.model) == (result.text, "completed", "demo")
    assert response.usage.input_tokens == result.stats.prompt_tokens
    assert response.usage.output_tokens == len(result.tokens)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.stats["seed"] == 0
    assert response.store is True


def test_instructions_reach_the_model(client):
    prompt = "What is the capital of Italy?"
    answer = respond(client, prompt, instructions="Answer in uppercase.").output_text
    assert answer == expected(prompt, system="Answer in uppercase.").text == "THE CAPITAL OF ITALY IS ROME."


def test_what_was_asked_is_repeated(client):
    options = {"max_output_tokens": 99, "metadata": {"a": "b"}, "tools": [WEATHER], "tool_choice": "none"}
    response = respond(client, "Spell the word cat.", reasoning={"effort": "none"}, **options)
    assert response.output_text == "c a t"
    assert (response.max_output_tokens, response.metadata, response.tool_choice) == (99, {"a": "b"}, "none")
    assert response.reasoning.effort == "none"
    assert response.text.format.type == "text"


def test_a_stream_is_the_same_in_pieces(client):
    prompt = "Count from 1 to 25."
    whole = respond(client, prompt, max_output_tokens=90)
    events = [*respond(client, prompt, max_output_tokens=90, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) == 2
    assert "".join(deltas) == whole.output_text == expected(prompt, max_tokens=90).text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert (last.status, last.usage.output_tokens) == (whole.status, whole.usage.output_tokens)


def test_cut_text_is_incomplete(client):
    response = respond(client, "Count from 1 to 25.", max_output_tokens=20)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 20


def test_the_clients_own_helper_follows(client):
    extra = {"seed": 0, "drafts": True}
    with client.responses.stream(
        model="demo", input="What is 23 + 45?", reasoning={"effort": "low"}, extra_body=extra
    ) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    result = expected("What is 23 + 45?", thinking=True)
    assert final.output_text == result.text
    assert final.output[0].content[0].text == result.thinking != ""
    assert 0 < final.usage.output_tokens_details.reasoning_tokens < final.usage.output_tokens
    drafts = [event.draft for event in seen if event.type == "response.draft"]
    assert len(drafts) == result.stats.denoising_steps
    assert {"index", "block", "step", "tokens"} == set(drafts[0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_a_tool(client, stream):
    asked = [{"role": "user", "content": "What is the weather in Oslo?"}]
    if stream:
        first = [*respond(client, asked, tools=[WEATHER], stream=True)][-1].response
    else:
        first = respond(client, asked, tools=[WEATHER])
    (made,) = first.output
    assert (made.name, json.loads(made.arguments), first.status) == ("get_weather", {"city": "Oslo"}, "completed")
    answered = {"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}
    second = respond(client, [*asked, *first.output, answered], tools=[WEATHER])
    assert second.output_text == "The weather in Oslo is sunny."
    dumped = [item.model_dump() for item in first.output]
    assert respond(client, [*asked, *dumped, answered], tools=[WEATHER]).output_text == second.output_text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_that_must_be(client, choice):
    response = respond(client, "Hello!", tools=[WEATHER], tool_choice=choice)
    (made,) = response.output
    jsonschema.validate(json.loads(made.arguments), WEATHER["parameters"])
    assert made.type == "function_call"


def test_a_json_schema(client):
    form = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    response = respond(client, JSON_PROMPT, text={"format": form, "verbosity": "medium"})
    assert response.output_text == expected(JSON_PROMPT, schema=PERSON).text
    assert response.text.format.name == "person"
    jsonschema.validate(json.loads(response.output_text), PERSON)


def test_a_picture(client):
    parts = [
        {"type": "input_image", "image_url": data_url(square(RED)), "detail": "auto"},
        {"type": "input_text", "text": "What color is the shape?"},
    ]
    answer = respond(client, [{"role": "user", "content": parts}]).output_text
    assert answer == expected("What color is the shape?", images=[square(RED)]).text
    assert answer.endswith(" is red.")


REFUSED = [
    ({"input": "Hi", "messages": []}, "messages", "messages is not supported here; leave it out."),
    ({"input": "Hi", "n": 2}, "n", "n is not supported here; leave it out."),
    ({"input": " "}, "input", "Message 0 is empty; say what you want."),
    ({"input": []}, "input", "input is a list of 0; it should be a string or a list that is not empty."),
    (
        {"input": "Hi", "background": True},
        "background",
        "background is true; an answer cannot be asked for later: leave it out.",
    ),
    (
        {"input": "Hi", "max_output_tokens": 0},
        "max_output_tokens",
        "max_output_tokens is 0; it should be a whole number, at least 1.",
    ),
    (
        {"input": "Hi", "reasoning": {"effort": "low"}, "thinking": False},
        "reasoning.effort",
        "reasoning.effort is 'low'; but thinking says the contrary: leave one out.",
    ),
    (
        {"input": "Hi", "tools": [{"type": "function", "name": "get weather"}]},
        "tools[0].name",
        "tools[0].name is 'get weather'; it should be 1 to 128 letters, digits, _, -, ., : or /.",
    ),
    (
        {"input": "Hi", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "messages"}},
        "tool_choice.name",
        "tool_choice.name is 'messages'; no tool has this name.",
    ),
    (
        {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x"}}},
        "text.format.schema",
        "text.format.schema is missing; give it.",
    ),
    (
        {"input": "Hi", "text": {"format": {"type": "json_schema", "schema": {"type": "foo"}}}},
        "text.format",
        "The schema at # has type 'foo'; it should be one or a list of object, array, string, number, integer, "
        "boolean, null.",
    ),
    (
        {"input": "Hi", "text": {"format": {"type": "grammar"}}},
        "text.format.type",
        'text.format.type is \'grammar\'; it should be "text" or "json_object" or "json_schema".',
    ),
    ({"input": "Hi", "metadata": {"a": 1}}, "metadata.a", "metadata.a is 1; it should be a string."),
    (
        {"input": "Hi", "metadata": {str(n): "" for n in range(17)}},
        "metadata",
        "metadata is an object of 17; it should have at most 16: send fewer.",
    ),
    (
        {"input": "Hi", "regex": "a+", "text": {"format": {"type": "json_object"}}},
        "regex",
        "regex is 'a+'; and text.format asks for a form of its own: leave one out.",
    ),
    (
        {"input": "Hi", "drafts": True},
        "drafts",
        "drafts is true; drafts are streamed: give stream true, or leave them out.",
    ),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(client, body, param, message):
    for stream in ({}, {"stream": True} if "drafts" not in body else {}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/responses", body={**body, **stream}, cast_to=object)
        assert (caught.value.body["message"], caught.value.param) == (message, param)


def test_another_model():
    status, answer = post(create_app(Script(), Settings()), PATH, {"input": "Hi", "model": "gpt"})
    assert (status, answer["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("error", [ApiError("It is late.", status=503), RuntimeError("secret")])
def test_a_failure_behind_the_first_event_is_an_event(error):
    app = create_app(Script(Block(block=0, steps=1, tokens=(5,), text="a"), Failed(error)), Settings())
    body = json.dumps({"input": "Hi", "stream": True}).encode()
    status, headers, answer = ask(app, "POST", PATH, chunks=(body, b""))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *_, last = answer.decode().strip().split("\n\n")
    name, data = last.split("\n")
    message = "It is late." if isinstance(error, ApiError) else "The server failed; its log says why."
    assert name == "event: response.failed"
    response = json.loads(data.removeprefix("data: "))["response"]
    assert response["error"] == {"code": "server_error", "message": message}
    assert response["output"][0]["content"][0]["text"] == "a"
    assert b"secret" not in answer


# the description


def test_every_route_is_described():
    app = create_app(Script(), Settings())
    routes = {
        (route.path.replace(":path", ""), method)
        for route in app.routes
        for method in route.methods
        if not route.path.startswith(("/page/", "/local"))  # /local is of the same version alone, over its socket
    }
    paths = openapi_document(Settings())["paths"]
    described = {(path, method.upper()) for path, one in paths.items() for method in one}
    assert {one for one in routes if one[1] != "HEAD"} | {("/", "GET")} == {
        one for one in described if one[1] != "PARAMETERS"
    }


def test_the_description_is_served():
    status, _, answer = ask(create_app(Script(), Settings(model="demo")), "GET", "/openapi.json")
    assert (status, json.loads(answer)) == (200, openapi_document(Settings(model="demo")))
    assert "security" not in openapi_document(Settings())
    assert openapi_document(Settings(api_key="k"))["security"] == [{"key": []}]


def described(name):
    components = openapi_document(Settings(model="demo"))["components"]
    return {"$ref": f"#/components/schemas/{name}", "components": components}


def test_bodies_are_as_described():
    schema = described("Response")
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    items = [{"role": "user", "content": "Go"}, thought, call]
    items.append({"type": "function_call_output", "call_id": "a", "output": "1"})
    for body in (
        {"input": "Hi", "temperature": None},
        {"input": items, "tools": [WEATHER], "seed": 3, "model": "demo"},
    ):
        jsonschema.validate(body, schema)
    unfit = [body for body, *_ in REFUSED if not jsonschema.Draft202012Validator(schema).is_valid(body)]
    contradicting = [body for body, *_ in REFUSED if body not in unfit]
    assert len(unfit) >= 11, contradicting  # the rest contradict themselves, which no schema tells


LIMITS = {
    "max_denoising_steps": (1, 1000),
    "stability_threshold": (0, 2**31 - 1),
    "patience": (0, 2**31 - 1),
    "image_tokens": (1, 2**31 - 1),
    "entropy_bound": (0, 1e9),
    "t_min": (0, 1e9),
    "t_max": (0.001, 1e9),
    "confidence_threshold": (0, 1e9),
    "certainty_threshold": (0, 1e9),
}
ASKED = {
    "Chat": {"messages": [{"role": "user", "content": "a"}]},
    "Completion": {"prompt": "a"},
    "Response": {"input": "a"},
}


@pytest.mark.parametrize("name", ASKED)
def test_the_models_own_options_are_described_within_their_limits(name):
    one, validator = ASKED[name], jsonschema.Draft202012Validator(described(name))
    for option, (low, high) in LIMITS.items():
        least, most = (min(BUDGETS), max(BUDGETS)) if option == "image_tokens" else (low, high)
        assert [validator.is_valid({**one, option: value}) for value in (least, most)] == [True, True], option
        assert not any(validator.is_valid({**one, option: value}) for value in (low - 1, high + 1)), option
    assert all(validator.is_valid({**one, "canvas": value}) for value in ("auto", "full", 1))
    assert not any(validator.is_valid({**one, "canvas": value}) for value in ("wide", 0, 1.5, True))


def test_answers_are_as_described(client):
    response = client.responses.with_raw_response.create(model="demo", input="Spell the word cat.")
    jsonschema.validate(json.loads(response.text), described("ResponseAnswer"))
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, "Hi", extra={"echo": 1})
    jsonschema.validate(caught.value.response.json(), described("Error"))


def test_the_models_own_options_are_taken(client):
    own = {"max_denoising_steps": 1, "entropy_bound": 0.2, "t_min": 0.3, "t_max": 0.7, "stability_threshold": 2,
           "confidence_threshold": 0.01, "certainty_threshold": 0.2, "patience": 3, "canvas": 32,
           "image_tokens": 70}  # fmt: skip
    answer = respond(client, "Count from 3 to 30.", extra=own)
    assert answer.output_text == expected("Count from 3 to 30.", **own).text
    assert answer.stats["denoising_steps"] == answer.stats["blocks"]
