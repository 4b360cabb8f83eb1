"""What the server refuses, what it tells of itself, and clients that leave."""

import json
import re
import socket
from contextlib import contextmanager

import openai
import pytest
from listeners import until
from serving import CHAT, COMPLETIONS, MODEL, RESPONSES, WEATHER, Script, ask, chat, post, said

from mlx_dgemma import OptionError, PromptError, RangeError, __version__
from mlx_dgemma.decoding.events import Block
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.tickets import Busy, Failed, Health, Stopping

COUNT = "Count from 1 to 30."

# refusals

NOT = "The schema at # has maxContains, which is not supported; write the items as prefixItems."
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
     "messages[0].content is 5; it should be a string or a list that is not empty."),
    ({"messages": [{"role": "user", "content": "x", "nick": "Anna"}]}, "messages[0].nick",
     "messages[0].nick is not supported here; leave it out."),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,x"}}]}]},
     "messages[0].content[0].type",
     "messages[0].content[0].type is 'video_url'; it should be \"text\" or \"image_url\" or \"input_audio\"."),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
     "messages[0].content[0].type",
     "messages[0].content[0].type is 'image'; it should be \"text\" or \"image_url\" or \"input_audio\"."),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages",
     "The prompt has 5012 tokens, but the context leaves room for 4032 beside a canvas of 64; shorten it."),
    ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages[0].tool_call_id",
     "messages[0].tool_call_id is 'a'; it should be the id of a call in an earlier assistant message."),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}]},
     "messages[0].tool_calls[0].function.arguments",
     "messages[0].tool_calls[0].function.arguments is '[]'; it should be a JSON object, written as a string."),
    ({"messages": [{"role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
     "messages[0].tool_calls[0].function.arguments",
     "messages[0].tool_calls[0].function.arguments is '{\"a\": \"\\\\ud800\"}'; it should be a JSON object, "
     "written as a string."),
    ({"seed": -2}, "seed", "seed is -2; it should be a whole number, from 0 to 18446744073709551615."),
    ({"seed": 2**64 - 1, "n": 2}, "seed",
     "seed is 18446744073709551615; it should be a whole number, from 0 to 18446744073709551614."),
    ({"n": 9}, "n", "n is 9; it should be a whole number, from 1 to 8."),
    ({"stop": ["a"] * 65}, "stop",
     "stop is a list of 65; it should be a string of 1 to 1,000 characters, or a list of up to 64."),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it should be a whole number, at least 1."),
    ({"temperature": 2.1}, "temperature", "temperature is 2.1; it should be a number from 0 to 2."),
    ({"temperature": 1e-45}, "temperature", "temperature is 1e-45; it should be 0, or a number from 0.001 to 2."),
    ({"t_max": 1e-45}, "t_max", "t_max is 1e-45; it should be a number from 0.001 to 1e+09."),
    ({"max_denoising_steps": 2**30}, "max_denoising_steps",
     "max_denoising_steps is 1073741824; it should be a whole number, from 1 to 1000."),
    ({"temperature": 0.5, "t_max": 0.9}, "temperature",
     "temperature is 0.5; and t_max is 0.9, which it would multiply: leave one out."),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty is 3; it should be a number from -2 to 2."),
    ({"frequency_penalty": True}, "frequency_penalty",
     "frequency_penalty is true; it should be a number from -2 to 2."),
    ({"logit_bias": {"1": 1}}, "logit_bias",
     "logit_bias is an object of 1; biases are unknown to this model: leave it out."),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs",
     "top_logprobs is 21; it should be a whole number, from 0 to 20."),
    ({"response_format": {"type": "xml"}}, "response_format.type",
     'response_format.type is \'xml\'; it should be "text" or "json_object" or "json_schema".'),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "maxContains": 1}}}},
     "response_format", NOT),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 10**30}}}},
     "response_format",
     f"The schema at # has minLength {10**30}, and 1,000,000 is the most; make it smaller."),
    ({"regex": "("}, "regex",
     "The pattern '(' is not a regular expression: missing ), unterminated subpattern at position 0."),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex",
     "regex is 'a'; and response_format asks for a form of its own: leave one out."),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json",
     "structured_outputs.json is '[]'; it should be a JSON Schema, an object."),
    ({"tool_choice": "required"}, "tool_choice",
     "tool_choice is 'required'; but there are no tools: give some, or leave it out."),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name",
     "tool_choice.function.name is 'f'; no tool has this name."),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice",
     "tool_choice is 'any'; it should be auto, none, required, or name a function."),
    ({"tools": [WEATHER], "tool_choice": "required", "exact": True}, "exact",
     "exact is true; and tool_choice is given; they cannot be together: leave one out."),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name",
     "tools[1].function.name is 'get_weather'; it stands twice: give every function a name of its own."),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type",
     "tools[0].type is 'web_search'; functions are the only tools here."),
    ({"tools": [{}]}, "tools[0].function", "tools[0].function is missing; give it."),
    ({"reasoning_effort": "none", "thinking": True}, "reasoning_effort",
     "reasoning_effort is 'none'; but thinking says the contrary: leave one out."),
    ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs.other",
     "chat_template_kwargs.other is not supported here; leave it out."),
    ({"drafts": True}, "drafts", "drafts is true; drafts are streamed: give stream true, or leave them out."),
    ({"exact": True, "fast": True}, "exact",
     "exact is True and fast is True; the reference knows no such thing: leave one out."),
    ({"image_tokens": 71}, "image_tokens",
     "image_tokens is 71; it should be one of 70, 140, 280, 560, 1120."),
    ({"t_min": "hot"}, "t_min", "t_min is 'hot'; it should be a number from 0 to 1e+09."),
    ({"best_of": 2}, "best_of", "best_of is not supported here; leave it out."),
]  # fmt: skip


@pytest.mark.parametrize("changes, param, message", REFUSED, ids=[f"{one[1]}-{i}" for i, one in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused(client, changes, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=object, body={"messages": said("Hello."), **changes})
    told = caught.value.body
    assert (told["param"], told["type"]) == (param, "invalid_request_error")
    assert told["message"] == message
    assert (told["code"] == "context_length_exceeded") == ("context leaves room" in told["message"])


def test_a_wrong_prompt_is_refused_before_its_stream(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, " ", stream=True, n=2)
    assert caught.value.body["message"] == "Message 0 is empty; say what you want."


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
        message = (
            "The model 'gpt-4o' is not served here; ask for 'demo', leave it out, or start the server with --alias for "
            "this name."
        )
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
        (Busy(64, 7), 429, "busy", "The queue is full (64 waiting); retry in 7 s."),
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
        (RangeError("Too large."), {"message": "Too large.", "type": "server_error", "code": "range"}),
        (ZeroDivisionError(), {"message": "The server failed; its log says why.", "type": "server_error"}),
    ],
)
def test_an_error_in_a_stream_ends_it(error, shown):
    script = Script(Block(block=0, steps=1, tokens=(5,), text="Once"), Failed(error))
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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, asked", [
    (CHAT, {"messages": said(COUNT), "n": 2}),
    (COMPLETIONS, {"prompt": "Once there was a cat"}),
    (RESPONSES, {"input": COUNT}),
])  # fmt: skip
def test_who_leaves_is_not_answered(scheduler, url, path, asked, stream):
    slow = {
        "max_output_tokens" if path == RESPONSES else "max_tokens": 3000,
        "entropy_bound": 1e-9,
        "patience": 0,
        "certainty_threshold": 0,
    }
    before, count = scheduler.load().counters, asked.get("n", 1)
    with connected(url, {**asked, **slow, "confidence_threshold": 0, "stream": stream}, path):
        until(lambda: scheduler.load().running == count)
    until(lambda: scheduler.load().running == 0)
    after = scheduler.load().counters
    assert after["cancelled"] - before["cancelled"] == count
    assert after["generated_tokens"] == before["generated_tokens"]


COMPLETIONS_REFUSED = [
    ({}, "prompt", "prompt is missing; give it."),
    ({"prompt": ["a", "b"]}, "prompt",
     "prompt is a list of 2; it should be one string: send several in several requests, and no tokens."),
    ({"prompt": [1, 2]}, "prompt",
     "prompt is a list of 2; it should be one string: send several in several requests, and no tokens."),
    ({"prompt": [[1]]}, "prompt",
     "prompt is a list of 1; it should be one string: send several in several requests, and no tokens."),
    ({"prompt": ""}, "prompt", "There is no text before or behind the hole, and no prompt; give one of them."),
    ({"prompt": "a", "suffix": "b", "max_tokens": 0}, "max_tokens",
     "max_tokens is 0; it should be a whole number, at least 1, or -1 for none."),
    ({"prompt": "a", "echo": True}, "echo", "echo is true; the prompt is not repeated: leave it out, or give false."),
    ({"prompt": "a", "best_of": 2}, "best_of",
     "best_of is 2; every answer is given: leave it out, and ask for n."),
    ({"prompt": "a", "logprobs": 1}, "logprobs",
     "logprobs is 1; log-probabilities are told by /v1/chat/completions alone: leave it out, or give 0."),
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


def test_health_and_metrics(client, scheduler):
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Spell the word cat."}], seed=0)
    app = create_app(scheduler, Settings(model=MODEL))
    told = {"status": "ok", "model": MODEL, "running": 0, "waiting": 0}
    body = json.loads(ask(app, "GET", "/health")[2])
    assert body.pop("seconds_since_step") >= 0
    told |= {"version": __version__, "digest": body["digest"]}
    assert body == told and len(body["digest"]) == 32
    app.state.stopping = lambda: True
    status, _, body = ask(app, "GET", "/health")
    assert (status, json.loads(body)["status"]) == (503, "stopping")
    app.state.stopping = lambda: False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "health", lambda: Health(False, 3.0))
        status, _, body = ask(app, "GET", "/health")
    assert (status, json.loads(body)) == (503, {**told, "status": "failed", "seconds_since_step": 3.0})
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
                r'(dgemma_[a-z_]+)(\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})? (\d+(?:\.\d+)?)', line
            ).groups()
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {"HELP", "TYPE"} == set(told[base])
            kind = "histogram" if base.endswith("_seconds") else "counter" if name.endswith("_total") else "gauge"
            assert told[base]["TYPE"] == kind
            assert kind == "histogram" or value.isdecimal()
            samples[line.rsplit(" ", 1)[0]] = float(value)
    assert samples["dgemma_running"] == 0
    assert samples["dgemma_generated_tokens_total"] == scheduler.load().counters["generated_tokens"] > 0
    assert samples['dgemma_http_requests_total{endpoint="/health",status="200"}'] == 1
    assert samples['dgemma_http_requests_total{endpoint="/health",status="503"}'] == 2
    assert samples['dgemma_http_requests_total{endpoint="other",status="404"}'] == 1
    assert {f"dgemma_{name}_total" for name in scheduler.load().counters} <= set(samples)
