"""The OpenAI-compatible endpoints, with OpenAI's own client against a server with the demo."""

import base64
import io
import json
import math
import re
import socket
import time
from contextlib import contextmanager

import jsonschema
import openai
import pytest
from serving import Script, ask, post, serving
from support import BLUE, RED, engine_of, square

import mlx_dgemma
from mlx_dgemma import Draft, OptionError, PromptError
from mlx_dgemma.checkpoint import DEMO
from mlx_dgemma.generate import Block
from mlx_dgemma.schedule import Busy, Failed, Scheduler, Stopping
from mlx_dgemma.schema import to_regex
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.chat import any_object
from mlx_dgemma.server.settings import Settings

MODEL = "demo"
JSON_PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."
COUNT = "Count from 1 to 30."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    description = "Get the weather of a city." if name == "get_weather" else "Do it."
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", city={"type": "string", "description": "The city."})
TIME = tool("get_time", city={"enum": ["Oslo", "Paris"]})


@pytest.fixture(scope="module")
def scheduler():
    return Scheduler(mlx_dgemma.load(DEMO, dtype="float32"), rows=4, waiting=8)


@pytest.fixture(scope="module")
def url(scheduler):
    with serving(scheduler, model=MODEL) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def said(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]


def chat(client, prompt, **options):
    messages = said(prompt) if isinstance(prompt, str) else prompt
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def expected(prompt, **options):
    return engine_of(DEMO).generate(prompt, **options)


# chat


def test_an_answer_is_the_engines(client):
    same = expected(JSON_PROMPT, seed=0)
    answer = chat(client, JSON_PROMPT, seed=0)
    choice = answer.choices[0]
    assert choice.message.content == same.text == '{"name": "Anna", "age": 31, "city": "Oslo"}'
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    usage, stats = answer.usage, answer.stats
    assert usage.prompt_tokens == same.stats.prompt_tokens
    assert usage.completion_tokens == len(same.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == stats["reused_tokens"]
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert set(stats) == set(type(same.stats).__dataclass_fields__)
    assert (stats["seed"], stats["denoising_steps"]) == (0, same.stats.denoising_steps)


def test_a_seed_that_was_drawn_repeats_the_answer(client):
    story = "Tell a story about a cat named Mia."
    answer = chat(client, story, max_tokens=40)
    again = chat(client, story, max_completion_tokens=40, seed=answer.stats["seed"])
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert {answer.choices[0].finish_reason, again.choices[0].finish_reason} <= {"stop", "length"}


def test_several_choices_are_several_seeds(client):
    story = "Tell a story about a cat named Mia."
    texts = [expected(story, seed=seed, max_tokens=24).text for seed in (5, 6, 7)]
    answer = chat(client, story, seed=5, n=3, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == texts
    assert len(set(texts)) > 1
    assert [one["seed"] for one in answer.stats] == [5, 6, 7]
    assert answer.usage.completion_tokens == sum(one["generated_tokens"] for one in answer.stats)
    assert answer.usage.prompt_tokens == answer.stats[0]["prompt_tokens"]


def test_a_stream_is_the_same_in_pieces(client):
    texts = [expected(COUNT, seed=seed).text for seed in (0, 1)]
    chunks = list(chat(client, COUNT, seed=0, n=2, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert last.choices == [] and last.usage.completion_tokens > 100
    assert all(part.usage is None for part in parts)
    assert len({part.id for part in chunks}) == 1
    for i, text in enumerate(texts):
        mine = [part for part in parts if part.choices[0].index == i]
        assert mine[0].choices[0].delta.role == "assistant"
        pieces = [part.choices[0].delta.content or "" for part in mine]
        assert "".join(pieces) == text
        assert len([piece for piece in pieces if piece]) > 1
        assert [part.choices[0].finish_reason for part in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1].stats["seed"] == i
    order = [part.choices[0].index for part in parts]
    assert order != sorted(order)  # both run at once


def test_without_being_asked_a_stream_tells_no_usage(client):
    assert all(part.usage is None and part.choices for part in chat(client, "Spell the word cat.", seed=0, stream=True))


def test_drafts_are_the_engines(client):
    events = list(engine_of(DEMO).stream(COUNT, seed=3))
    drafts = [event for event in events if isinstance(event, Draft)]
    parts = chat(client, COUNT, seed=3, stream=True, extra_body={"drafts": True})
    told = [part.draft for part in parts if getattr(part, "draft", None)]
    assert [(one["index"], one["block"], one["step"]) for one in told] == [(0, d.block, d.step) for d in drafts]
    ends = engine_of(DEMO).options.end_tokens
    for one, draft in zip(told, drafts):
        assert "".join(token["text"] for token in one["tokens"]) == draft.text
        ids = draft.tokens.tolist()
        count = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        assert [token["accepted"] for token in one["tokens"]] == draft.accepted.tolist()[:count]
        for token, nats in zip(one["tokens"], draft.entropy.tolist()):
            assert token["confidence"] == pytest.approx(math.exp(-nats), abs=6e-4)


def test_stop_and_length(client):
    answer = chat(client, COUNT, seed=0, stop=["5,", "zebra"])
    assert answer.choices[0].message.content == "1, 2, 3, 4, "
    assert answer.choices[0].finish_reason == "stop"
    answer = chat(client, COUNT, seed=0, stop="5,", stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in answer) == "1, 2, 3, 4, "
    answer = chat(client, COUNT, seed=0, max_completion_tokens=5)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def test_temperature(client):
    own = engine_of(DEMO).options
    story = "Tell a story about a fox named Leo."
    for given, schedule in (
        ({"temperature": 1, "seed": 4}, {"seed": 4}),
        ({"temperature": 0}, {"seed": 0}),
        ({"temperature": 0, "seed": 4}, {"seed": 4}),
        ({"temperature": 1.5, "seed": 4}, {"seed": 4, "t_min": own.t_min * 1.5, "t_max": own.t_max * 1.5}),
        ({"temperature": 2, "seed": 4}, {"seed": 4, "t_min": own.t_min * 2, "t_max": own.t_max * 2}),
    ):
        told = chat(client, story, max_tokens=24, **given)
        same = expected(story, max_tokens=24, **schedule)
        assert told.choices[0].message.content == same.text
        assert told.stats["denoising_steps"] == same.stats.denoising_steps


def test_options_of_this_model(client):
    options = {"max_denoising_steps": 3, "entropy_bound": 0.5, "t_min": 0.2, "t_max": 0.9, "patience": 1}
    told = chat(client, COUNT, seed=2, extra_body=options)
    same = expected(COUNT, seed=2, **options)
    assert told.choices[0].message.content == same.text
    assert told.stats["denoising_steps"] == same.stats.denoising_steps


@pytest.mark.parametrize(
    "asked", [{"reasoning_effort": "low"}, {"thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}]
)
def test_thinking(client, asked):
    same = expected("What is 23 + 45?", seed=1, thinking=True)
    answer = chat(client, "What is 23 + 45?", seed=1, extra_body=asked)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("23 + 45 = 68.", same.thinking)
    assert same.thinking.startswith("Ones: 3 + 5 = 8.")
    text = len(engine_of(DEMO).tokenizer.encode(same.text, add_special_tokens=False))
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(same.tokens) - text
    parts = list(chat(client, "What is 23 + 45?", seed=1, stream=True, extra_body=asked))
    deltas = [part.choices[0].delta for part in parts]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == same.thinking
    assert "".join(delta.content or "" for delta in deltas) == same.text


def test_not_thinking(client):
    for asked in ({"reasoning_effort": "none"}, {"thinking": False}, {}):
        message = chat(client, "What is 23 + 45?", seed=1, extra_body=asked).choices[0].message
        assert not hasattr(message, "reasoning_content")


def test_log_probabilities(client):
    for prompt, options in (("Spell the word frog.", {}), ("What is 23 + 45?", {"thinking": True})):
        same = expected(prompt, seed=1, **options)
        answer = chat(client, prompt, seed=1, logprobs=True, extra_body=options)
        content = answer.choices[0].logprobs.content
        assert "".join(one.token for one in content) == same.text
        assert b"".join(bytes(one.bytes) for one in content) == same.text.encode()
        assert [one.logprob for one in content] == pytest.approx(same.log_probs[-len(content) :], abs=1e-4)
    *_, last = chat(client, "Spell the word frog.", seed=1, logprobs=True, stream=True)
    assert "".join(one.token for one in last.choices[0].logprobs.content) == "f r o g"


# answers of a form


def test_a_json_schema(client):
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    schema["required"] = ["name", "age"]
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    answer = chat(client, JSON_PROMPT, seed=0, response_format=form)
    assert answer.choices[0].message.content == expected(JSON_PROMPT, seed=0, schema=schema).text
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_a_json_object(client):
    for prompt in (JSON_PROMPT, "Spell the word cat."):
        answer = chat(client, prompt, seed=0, response_format={"type": "json_object"})
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    pattern = re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: re.escape(chr(int(m[1], 16))), to_regex(any_object())))
    for fits in ({}, {"a": [1, "b", None, True, {"c": {"d": 1.5}}]}, {"a": {"b": {"c": {}}}}):
        assert pattern.fullmatch(json.dumps(fits))
    for other in ([], 1, {"a": {"b": {"c": {"d": {}}}}}):
        assert not pattern.fullmatch(json.dumps(other))


def test_a_regular_expression(client):
    answer = chat(client, "What is 23 + 45?", seed=0, extra_body={"regex": r"\d{1,3}"})
    assert re.fullmatch(r"\d{1,3}", answer.choices[0].message.content)


# tools


def test_a_conversation_with_a_tool(client):
    messages = said("What is the weather in Oslo?")
    answer = chat(client, messages, seed=1, tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "rainy"}]
    answer = chat(client, messages, seed=1, tools=[WEATHER])
    assert answer.choices[0].message.content == "The weather in Oslo is rainy."
    assert answer.choices[0].finish_reason == "stop"
    messages[-1]["content"] = [{"type": "text", "text": "rainy"}]
    again = chat(client, messages, seed=1, tools=[WEATHER])
    assert again.usage.prompt_tokens == answer.usage.prompt_tokens


def test_a_streamed_call_is_whole(client):
    parts = list(chat(client, "What is the weather in Oslo?", seed=1, tools=[WEATHER], stream=True))
    calls = [part.choices[0].delta.tool_calls for part in parts if part.choices[0].delta.tool_calls]
    assert len(calls) == 1 and parts[-2].choices[0].delta.tool_calls == calls[0]
    assert (calls[0][0].index, calls[0][0].function.name) == (0, "get_weather")
    assert json.loads(calls[0][0].function.arguments) == {"city": "Oslo"}
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    assert not any(part.choices[0].delta.content for part in parts)


@pytest.mark.parametrize("prompt", ["What is the weather in Oslo?", "Spell the word cat."])
def test_a_function_that_is_named_is_called(client, prompt):
    named = {"type": "function", "function": {"name": "get_time"}}
    for stream in (False, True):
        answer = chat(client, prompt, seed=0, tools=[WEATHER, TIME], tool_choice=named, stream=stream)
        if stream:
            parts = list(answer)
            assert not any(part.choices[0].delta.content for part in parts)
            call, reason = parts[-2].choices[0].delta.tool_calls[0], parts[-1].choices[0].finish_reason
        else:
            (call,) = answer.choices[0].message.tool_calls
            assert answer.choices[0].message.content is None
            reason = answer.choices[0].finish_reason
        assert (reason, call.function.name) == ("tool_calls", "get_time")
        jsonschema.validate(json.loads(call.function.arguments), TIME["function"]["parameters"])


def test_some_function_is_called_where_one_must_be(client):
    answer = chat(client, "Spell the word cat.", seed=0, tools=[WEATHER, TIME], tool_choice="required",
                  parallel_tool_calls=False)  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    declared = {one["function"]["name"]: one["function"]["parameters"] for one in (WEATHER, TIME)}
    jsonschema.validate(json.loads(call.function.arguments), declared[call.function.name])


def test_tools_that_are_not_to_be_called_are_not_shown(client):
    for options in ({"tools": [WEATHER], "tool_choice": "none"}, {}):
        answer = chat(client, "Spell the word cat.", seed=0, **options)
        assert answer.usage.prompt_tokens == expected("Spell the word cat.", seed=0).stats.prompt_tokens


# pictures


def data_of(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_picture(client):
    for color, name in ((RED, "red"), (BLUE, "blue")):
        picture = square(color)
        parts = [{"type": "image_url", "image_url": {"url": data_of(picture), "detail": "auto"}}]
        parts.append({"type": "text", "text": "What color is the shape?"})
        answer = chat(client, [{"role": "user", "content": parts}], seed=0, extra_body={"image_tokens": 70})
        same = expected("What color is the shape?", images=[picture], seed=0, image_tokens=70)
        assert answer.choices[0].message.content == same.text == f"The square is {name}."
        assert answer.usage.prompt_tokens == same.stats.prompt_tokens


def test_a_bomb_of_pixels_is_not_decoded(client):
    from test_server_safety import bomb, data_of

    parts = [{"type": "image_url", "image_url": {"url": data_of(bomb(10_000))}}]
    began = time.perf_counter()
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": parts}])
    assert time.perf_counter() - began < 5
    assert caught.value.param == "messages"
    assert caught.value.body["message"].endswith(
        "has 10000 x 10000 pixels; at most 50 million are read, so make it smaller."
    )


# refusals

REFUSED = [
    ({"messages": None}, "messages", "messages is missing; give it."),
    ({"messages": []}, "messages", "The prompt is []; give a text or a list of messages."),
    ({"messages": "hi"}, "messages", "messages is 'hi'; it should be a list."),
    ({"messages": [1]}, "messages[0]", "messages[0] is 1; it should be a JSON object."),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role",
     'messages[0].role is \'function\'; it should be "system" or "developer" or "user" or "assistant" or "tool".'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing; give it."),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "Message 0 is empty; say what you want."),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content",
     "messages[0].content is 5; it should be a string or a list of parts."),
    ({"messages": [{"role": "user", "content": "x", "name": "Anna"}]}, "messages[0].name",
     "messages[0].name is not supported here; leave it out."),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,x"}}]}]},
     "messages[0].content[0].type",
     "messages[0].content[0].type is 'video_url'; videos are not taken here: send some of their frames as image_url "
     "parts."),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
     "messages[0].content[0].type", "messages[0].content[0].type is 'image'; it should be text or image_url."),
    ({"messages": [{"role": "user", "content": "<|image|>"}]}, "messages",
     "The prompt has 1 <|image|> placeholders, but 0 sources are given for them; they must agree."),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages",
     "The prompt has 10012 tokens, but the context leaves room for 4032 beside a canvas of 64; shorten it."),
    ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages[0].tool_call_id",
     "messages[0].tool_call_id is 'a'; it should be the id of a call in an earlier assistant message."),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}]},
     "messages[0].tool_calls[0].function.arguments",
     "messages[0].tool_calls[0].function.arguments is '[]'; it should be a JSON object, written as a string."),
    ({"seed": -1}, "seed", "seed is -1; it should be a whole number, from 0 to 18446744073709551615."),
    ({"seed": 2**64 - 1, "n": 2}, "seed",
     "seed is 18446744073709551615; it should be a whole number, from 0 to 18446744073709551614."),
    ({"n": 9}, "n", "n is 9; it should be a whole number, from 1 to 8."),
    ({"stop": ["a"] * 5}, "stop",
     "stop is a list of 5; it should be a string that is not empty, or a list of up to 4."),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens",
     "max_tokens is 5; but max_completion_tokens is 6: leave one out."),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it should be a whole number, at least 1."),
    ({"temperature": 2.1}, "temperature", "temperature is 2.1; it should be a number from 0 to 2."),
    ({"temperature": 0.5, "t_max": 0.9}, "temperature",
     "temperature is 0.5; and t_max is 0.9, which it would multiply: leave one out."),
    ({"top_p": 0.9}, "top_p", "top_p is 0.9; nucleus sampling is unknown to this model: leave it out, or give 1."),
    ({"presence_penalty": 1}, "presence_penalty",
     "presence_penalty is 1; penalties are unknown to this model: leave it out, or give 0."),
    ({"frequency_penalty": True}, "frequency_penalty",
     "frequency_penalty is true; penalties are unknown to this model: leave it out, or give 0."),
    ({"logit_bias": {"1": 1}}, "logit_bias",
     "logit_bias is an object of 1; biases are unknown to this model: leave it out."),
    ({"top_logprobs": 3, "logprobs": True}, "top_logprobs",
     "top_logprobs is 3; only the chosen tokens' are known: leave it out, or give 0."),
    ({"logprobs": True, "response_format": {"type": "json_object"}}, "logprobs",
     "logprobs is true; but response_format chooses among texts, not by them: leave one out."),
    ({"response_format": {"type": "xml"}}, "response_format.type",
     'response_format.type is \'xml\'; it should be "text" or "json_object" or "json_schema".'),
    ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "response_format",
     "response_format is an object of 1; but tools are given, and a call of one would have another form: leave one "
     "out."),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "not": {}}}}},
     "response_format", None),
    ({"regex": "("}, "regex", None),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex",
     "regex is 'a'; but response_format asks for JSON: leave one out."),
    ({"tool_choice": "required"}, "tool_choice",
     "tool_choice is 'required'; but there are no tools: give some, or leave it out."),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name",
     "tool_choice.function.name is 'f'; no tool has this name."),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice",
     "tool_choice is 'any'; it should be auto, none, required, or name a function."),
    ({"tools": [WEATHER], "tool_choice": "required", "stop": "a"}, "tool_choice",
     "tool_choice is 'required'; and stop is given; they cannot be together: leave one out."),
    ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls",
     "parallel_tool_calls is false; that holds only where tool_choice is required or names a function."),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name",
     "tools[1].function.name is 'get_weather'; it stands twice: give every function a name of its own."),
    ({"tools": [{"type": "web_search"}]}, "tools[0].function", "tools[0].function is missing; give it."),
    ({"reasoning_effort": "none", "thinking": True}, "reasoning_effort",
     "reasoning_effort is 'none'; but thinking says the contrary: leave one out."),
    ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs.other",
     "chat_template_kwargs.other is not supported here; leave it out."),
    ({"drafts": True}, "drafts", "drafts is true; drafts are streamed: give stream true, or leave them out."),
    ({"stream_options": {"include_usage": True}}, "stream_options",
     "stream_options is an object of 1; there is no stream: give stream true, or leave it out."),
    ({"store": True}, "store", "store is true; nothing is stored here: leave it out, or give false."),
    ({"service_tier": "flex"}, "service_tier",
     "service_tier is 'flex'; there are no tiers here: leave it out."),
    ({"exact": True, "fast": True}, "exact",
     "exact is True and fast is True; the reference knows no such thing: leave one out."),
    ({"image_tokens": 71}, "image_tokens",
     "image_tokens is 71; it should be one of 70, 140, 280, 560, 1120."),
    ({"t_min": "hot"}, "t_min", "t_min is 'hot'; it should be a number from 0 to 1e+09."),
    ({"best_of": 2}, "best_of", "best_of is not supported here; leave it out."),
]  # fmt: skip


@pytest.mark.parametrize("changes, param, message", REFUSED, ids=[f"{one[1]}-{i}" for i, one in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused(client, changes, param, message):
    for stream in (False, True) if "stream_options" not in changes and "drafts" not in changes else (False,):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post(
                "/chat/completions", cast_to=object, body={"messages": said("Hello."), "stream": stream, **changes}
            )
        told = caught.value.body
        assert (told["param"], told["type"]) == (param, "invalid_request_error")
        assert told["message"] == (message or told["message"])
        assert (told["code"] == "context_length_exceeded") == ("context leaves room" in told["message"])


def test_what_changes_nothing_is_accepted(client):
    nothing = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "top_p": 1, "n": 1}
    nothing |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False, "unknown": None}
    nothing |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "tool_choice": "auto", "stop": []}
    answer = chat(client, "Spell the word cat.", seed=0, extra_body=nothing)
    assert answer.choices[0].message.content == "c a t"


BODIES = [
    (b"", "The body is not JSON (Expecting value: line 1 column 1 (char 0)); send a JSON object."),
    (b"[]", "The body is a list of 0; it should be a JSON object."),
    (b'{"seed": NaN}', "The body is not JSON (NaN is no JSON number); send a JSON object."),
    (b'{"seed": 1e999}', "The body is not JSON (1e999 is too large); send a JSON object."),
    (b'{"seed": ' + b"9" * 5000 + b"}", "The body is not JSON (a number has 5000 digits); send a JSON object."),
    (b'{"seed": 1, "seed": 2}', "The body is not JSON (a key stands twice in an object); send a JSON object."),
    (b"[" * 100_000, "The body is nested too deeply; send JSON with fewer levels."),
    (b'{"user": "\\ud800"}', "The body has half of a surrogate pair, which is no character; send whole characters."),
    (b'{"user": "\xff"}', "The body is not UTF-8 (byte 10); send JSON in UTF-8."),
]


@pytest.mark.parametrize("body, message", BODIES, ids=[one[1][:40] for one in BODIES])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bodies_that_are_no_objects(path, body, message):
    status, answer = post(create_app(Script(), Settings()), path, body)
    assert (status, answer["error"]["message"]) == (400, message)


def test_another_model(client):
    for answer in (
        lambda: client.chat.completions.create(model="gpt-4o", messages=said("Hi.")),
        lambda: client.completions.create(model="gpt-4o", prompt="Hi."),
        lambda: client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            answer()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        message = "The model 'gpt-4o' is not served here; ask for 'demo', or leave it out."
        assert caught.value.body["message"] == message
    for name in (MODEL, "default"):
        assert chat(client, "Spell the word cat.", seed=0).model == MODEL, name


def test_no_such_path():
    app = create_app(Script(), Settings())
    status, _, body = ask(app, "GET", "/v1/nothing")
    assert (status, json.loads(body)["error"]["message"]) == (404, "There is no /v1/nothing here; see /openapi.json.")
    status, headers, body = ask(app, "GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    assert json.loads(body)["error"]["message"] == f"{CHAT} knows no GET; see /openapi.json."


# what the scheduler says


@pytest.mark.parametrize(
    "error, status, code, message",
    [
        (Busy(64, 7), 429, "busy", "64 requests are waiting, which is all that may; try again in 7 s."),
        (Stopping(), 503, "stopping", "The server is stopping; ask again later."),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_no_room(error, status, code, message, stream):
    app = create_app(Script(error=error), Settings())
    body = json.dumps({"messages": said("Hi."), "stream": stream, "n": 2}).encode()
    told, headers, answer = ask(app, "POST", CHAT, (), (body, b""))
    error = json.loads(answer)["error"]
    assert (told, error["code"], error["message"]) == (status, code, message)
    assert headers.get("retry-after") == ("7" if status == 429 else None)


@pytest.mark.parametrize(
    "error, shown",
    [
        (PromptError("It went wrong."), {"message": "It went wrong.", "type": "invalid_request_error"}),
        (Stopping(), {"message": "The server is stopping; ask again later.", "type": "server_error"}),
        (ZeroDivisionError(), {"message": "The server failed; its log says why.", "type": "server_error"}),
    ],
)
def test_an_error_in_a_stream_ends_it(error, shown):
    script = Script(Block(0, 0, 1, (5,), "Once"), Failed(error))
    body = json.dumps({"messages": said("Hi."), "stream": True}).encode()
    status, headers, answer = ask(create_app(script, Settings()), "POST", CHAT, (), (body, b""))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    first, text, last, nothing = answer.decode().split("\n\n")
    assert json.loads(first[6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert json.loads(text[6:])["choices"][0]["delta"] == {"content": "Once"}
    assert json.loads(last[6:])["error"].items() >= shown.items()
    assert nothing == ""
    assert script.submitted[0].cancelled.is_set()


def test_an_error_before_a_stream_is_a_status():
    script = Script(Failed(OptionError("schema is wrong.")))
    for stream, status in ((False, 400), (True, 200)):
        told, _ = ask(create_app(script, Settings()), "POST", CHAT, (),
                      (json.dumps({"messages": said("Hi."), "stream": stream}).encode(), b""))[::2]  # fmt: skip
        assert told == status


@contextmanager
def connected(url, body, path=CHAT):
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as asker:
        data = json.dumps(body).encode()
        asker.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        yield asker


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, asked", [
    (CHAT, {"messages": said(COUNT), "n": 2}),
    (COMPLETIONS, {"prompt": "Once there was a cat"}),
])  # fmt: skip
def test_who_leaves_is_not_answered(scheduler, url, path, asked, stream):
    slow = {"max_tokens": 3000, "entropy_bound": 1e-9, "patience": 0, "certainty_threshold": 0}
    before, count = scheduler.load().counters, asked.get("n", 1)
    with connected(url, {**asked, **slow, "confidence_threshold": 0, "stream": stream}, path):
        until(lambda: scheduler.load().running == count)
    until(lambda: scheduler.load().running == 0, seconds=3)
    after = scheduler.load().counters
    assert after["cancelled"] - before["cancelled"] == count
    assert after["generated_tokens"] == before["generated_tokens"]


# completions


def test_a_text_is_continued(client):
    prefix = "Once there was a cat named Mia. Mia lived in a"
    same = engine_of(DEMO).infill(prefix, "", seed=2, max_tokens=20)
    answer = client.completions.create(model=MODEL, prompt=prefix, seed=2, max_tokens=20)
    assert (answer.object, answer.choices[0].text) == ("text_completion", same.text)
    assert answer.choices[0].finish_reason == same.finish_reason
    assert answer.usage.completion_tokens == len(same.tokens)
    parts = list(client.completions.create(model=MODEL, prompt=[prefix], seed=2, max_tokens=20, stream=True))
    assert "".join(part.choices[0].text for part in parts) == same.text
    assert parts[-1].choices[0].finish_reason == same.finish_reason


def test_a_hole_is_filled(client):
    prefix, suffix = "The cat saw a ", " in the garden."
    same = engine_of(DEMO).infill(prefix, suffix, seed=0, max_denoising_steps=8)
    options = {"seed": 0, "max_tokens": 64, "extra_body": {"max_denoising_steps": 8}}
    answer = client.completions.create(model=MODEL, prompt=prefix, suffix=suffix, **options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (same.text, "stop")
    cut = client.completions.create(model=MODEL, prompt=prefix, suffix=suffix, stop=same.text[1:3], **options)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (same.text[: same.text.find(same.text[1:3])], "stop")


def test_a_continuation_stops(client):
    prefix, options = "1, 2, 3,", {"seed": 0, "max_tokens": 40}
    whole = engine_of(DEMO).infill(prefix, "", **options).text
    assert len(whole) > 4
    stop = whole[2:4]
    for stream in (False, True):
        answer = client.completions.create(model=MODEL, prompt=prefix, stop=stop, stream=stream, **options)
        choices = [part.choices[0] for part in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
        assert choices[-1].finish_reason == "stop"


COMPLETIONS_REFUSED = [
    ({}, "prompt", "prompt is missing; give it."),
    ({"prompt": ["a", "b"]}, "prompt",
     "prompt is a list of 2; it should be one string: send several in several requests, and no tokens."),
    ({"prompt": [1, 2]}, "prompt",
     "prompt is a list of 2; it should be one string: send several in several requests, and no tokens."),
    ({"prompt": [[1]]}, "prompt",
     "prompt is a list of 1; it should be one string: send several in several requests, and no tokens."),
    ({"prompt": ""}, "prompt", "There is no text before or behind the hole, and no prompt; give one of them."),
    ({"prompt": "a", "suffix": "b", "max_tokens": 16}, "max_tokens",
     "max_tokens is 16; the length of a hole is found by looking at up to 64 tokens: give that many or more."),
    ({"prompt": "a", "echo": True}, "echo", "echo is true; the prompt is not repeated: leave it out, or give false."),
    ({"prompt": "a", "best_of": 2}, "best_of",
     "best_of is 2; every answer is given: leave it out, and ask for n."),
    ({"prompt": "a", "logprobs": 1}, "logprobs",
     "logprobs is 1; log-probabilities are told by /v1/chat/completions alone: leave it out."),
    ({"prompt": "a", "regex": "b"}, "regex",
     "regex is 'b'; a text is continued without it: leave it out, or ask /v1/chat/completions."),
    ({"prompt": "a", "exact": True}, "exact",
     "exact is true; a text is continued without it: leave it out, or ask /v1/chat/completions."),
    ({"prompt": "a", "messages": []}, "messages", "messages is not supported here; leave it out."),
]  # fmt: skip


@pytest.mark.parametrize("body, param, message", COMPLETIONS_REFUSED)
def test_completions_that_cannot_be_honoured(client, body, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", cast_to=object, body=body)
    assert (caught.value.param, caught.value.body["message"]) == (param, message)


# the server itself


def test_models(client):
    (one,) = client.models.list().data
    assert (one.id, one.object, one.owned_by) == (MODEL, "model", "mlx-dgemma")
    assert client.models.retrieve(MODEL) == one
    assert client.models.retrieve("default") == one


def test_health_and_metrics(url, scheduler):
    app = create_app(scheduler, Settings(model=MODEL))
    told = {"status": "ok", "model": MODEL, "running": 0, "waiting": 0}
    assert json.loads(ask(app, "GET", "/health")[2]) == told
    app.state.stopping = lambda: True
    status, _, body = ask(app, "GET", "/health")
    assert (status, json.loads(body)) == (503, {**told, "status": "stopping"})
    ask(app, "GET", "/nothing/at/all")
    _, headers, body = ask(app, "GET", "/metrics")
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines, samples, told = body.decode().split("\n"), {}, {}
    assert lines.pop() == ""
    for line in lines:
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            told.setdefault(name, {})[what] = rest
        else:
            name, _, value = re.fullmatch(
                r'(dgemma_[a-z_]+)(\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})? (\d+)', line
            ).groups()
            assert {"HELP", "TYPE"} == set(told[name])
            assert told[name]["TYPE"] == ("counter" if name.endswith("_total") else "gauge")
            samples[line.rsplit(" ", 1)[0]] = int(value)
    assert samples["dgemma_running"] == 0
    assert samples["dgemma_generated_tokens_total"] == scheduler.load().counters["generated_tokens"] > 0
    assert samples['dgemma_http_requests_total{endpoint="/health",status="200"}'] == 1
    assert samples['dgemma_http_requests_total{endpoint="/health",status="503"}'] == 1
    assert samples['dgemma_http_requests_total{endpoint="other",status="404"}'] == 1
    assert {f"dgemma_{name}_total" for name in scheduler.load().counters} <= set(samples)
