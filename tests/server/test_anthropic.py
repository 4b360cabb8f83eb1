"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, against a server with the demo and without one."""

import base64
import io
import json

import httpx
import pytest
from listeners import LIMIT
from serving import Script, ask, post, serving
from support import RED, prompt_of, square

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.events import Block, Finished, Result, Stats
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.endpoints.anthropic import MessageExchange
from mlx_dgemma.server.errors import ApiError, anthropic_error
from mlx_dgemma.server.schemas import anthropic
from mlx_dgemma.server.schemas.anthropic import Messages, conversation
from mlx_dgemma.server.schemas.fields import parse_body
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.scheduler import Busy, Failed, Scheduler

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}},
        "required": ["city"],
    },
}
STATS = Stats(7, 3, 2, 1, 1, 4, {"load": 0.0, "prefill": 0.0, "denoise": 0.0, "total": 0.0}, 0.0, 1.0, 0, 0)


def user(*content):
    return {"role": "user", "content": content[0] if content and isinstance(content[0], str) else [*content]}


def text(words, **more):
    return {"type": "text", "text": words, **more}


def picture_block():
    file = io.BytesIO()
    square(RED).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


@pytest.fixture(scope="module")
def engine():
    return mlx_dgemma.load(DEMO, dtype="float32")


@pytest.fixture(scope="module")
def client(engine):
    with (
        serving(Scheduler(engine, rows=4, waiting=8), model="demo") as url,
        httpx.Client(base_url=url, timeout=LIMIT) as client,
    ):
        yield client


def message(client, messages, stream=True, **fields):
    """A message, put together from its events or asked for in one, whose tokens are counted as those of its prompt."""
    messages = [user(messages)] if isinstance(messages, str) else messages
    body = {"model": "demo", "seed": 0, "messages": messages, **fields}
    counted = client.post(COUNT, json=body)
    answer = client.post(f"{PATH}?beta=true", json={"max_tokens": 200, "stream": stream, **body})
    assert (counted.status_code, answer.status_code) == (200, 200), answer.text
    told = accumulated(answer.text) if stream else answer.json()
    assert (told["type"], told["role"], told["model"], told.pop("id")[:4]) == ("message", "assistant", "demo", "msg_")
    del told["stats"]
    told["usage"] = sum(told["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))
    assert counted.json()["input_tokens"] == told["usage"]
    for block in told["content"]:
        assert block.pop("id", "toolu_").startswith("toolu_")
    return told


def accumulated(stream):
    """The message that a stream tells, put together as Anthropic's SDK does it."""
    found, buffers = None, {}
    for event in stream.strip().split("\n\n"):
        name, data = event.split("\n")
        told = json.loads(data.removeprefix("data: "))
        kind = told["type"]
        assert name == f"event: {kind}"
        if kind == "message_start":
            assert found is None
            found = told["message"]
            assert found["content"] == []
        elif kind == "content_block_start":
            assert told["index"] == len(found["content"])
            found["content"].append(told["content_block"])
        elif kind == "content_block_delta":
            block, delta = found["content"][told["index"]], told["delta"]
            field = delta["type"].removesuffix("_delta")
            if field == "input_json":
                buffers[told["index"]] = buffers.get(told["index"], "") + delta["partial_json"]
            elif field == "signature":
                block["signature"] = delta["signature"]
            else:
                block[field] += delta[field]
        elif kind == "content_block_stop":
            if told["index"] in buffers:
                found["content"][told["index"]]["input"] = json.loads(buffers[told["index"]])
        elif kind == "message_delta":
            found |= told["delta"] | {"usage": found["usage"] | told["usage"], "stats": told["stats"]}
        else:
            assert kind in ("ping", "message_stop")
    assert kind == "message_stop"
    return found


def test_a_stream_tells_the_same_message(client, engine):
    prompt, system = (
        "What is the capital of Italy?",
        [text("Answer in uppercase.", cache_control={"type": "ephemeral"})],
    )
    whole, streamed = (
        message(client, prompt, stream, system=system, metadata={"user_id": "a"}) for stream in (False, True)
    )
    assert whole == streamed
    assert whole["content"] == [text("THE CAPITAL OF ITALY IS ROME.")]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    assert whole["usage"] == len(prompt_of(engine, prompt, system="Answer in uppercase.").tokens)
    assert whole["x_ignored"] == ["metadata", "system[0].cache_control"]


def test_a_thought_is_a_block(client):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    thought, said = message(client, "What is 23 + 45?", thinking=thinking)["content"]
    assert (thought.pop("thinking")[:5], said) == ("Ones:", text("23 + 45 = 68."))
    assert thought == {"type": "thinking", "signature": ""}


def test_a_tool_is_called_and_its_result_is_read(client):
    asked = [user("What is the weather in Oslo?")]
    server_tool = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    first = message(client, asked, tools=[server_tool, WEATHER], tool_choice={"type": "auto"})
    call = {"type": "tool_use", "name": "get_weather", "input": {"city": "Oslo"}}
    assert (first["content"], first["stop_reason"]) == ([call], "tool_use")
    assert first["x_ignored"] == ["tools[0].type"]
    done = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("rainy")]}
    turns = [*asked, {"role": "assistant", "content": [{**call, "id": "toolu_1"}]}, user(done)]
    assert message(client, turns, tools=[WEATHER])["content"] == [text("The weather in Oslo is rainy.")]


def test_a_stop_sequence_is_told(client):
    told = message(client, "Count from 1 to 25.", stop_sequences=["9", "7", "8"])
    assert (told["content"], told["stop_reason"]) == ([text("1, 2, 3, 4, 5, 6, ")], "stop_sequence")
    assert told["stop_sequence"] == "7"


def test_an_answer_that_is_begun_goes_on(client):
    turns = [user("What is the capital of France?"), {"role": "assistant", "content": "The capital of F"}]
    assert message(client, turns, thinking={"type": "adaptive"})["content"] == [text("rance is Paris.")]


def test_pictures_are_counted(client, engine):
    prompt = "What color is the shape?"
    told = message(client, [user(picture_block(), text(prompt))], max_tokens=1)
    assert told["usage"] == len(prompt_of(engine, prompt, [square(RED)]).tokens)
    assert told["stop_reason"] == "max_tokens"


def test_a_prompt_that_is_too_long_is_counted_and_told_in_the_words_that_agents_know(client):
    body = {"max_tokens": 1, "messages": [user("cat " * 5000)]}
    count = client.post(COUNT, json=body).json()["input_tokens"]
    assert count > 5000
    told = client.post(PATH, json=body)
    begin = f"Prompt is too long: {count} tokens > 4032 maximum. The prompt has {count} tokens"
    assert (told.status_code, told.json()["error"]["message"].startswith(begin)) == (400, True)


# what the blocks become


def read(*messages, **fields):
    return conversation(parse_body(Messages, json.dumps({"messages": messages, **fields}).encode()))


def test_blocks_become_messages():
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {"x": 1}, "caller": {"type": "direct"}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": [text("No."), picture_block()]}
    document = {"type": "document", "title": "Notes", "source": {"type": "text", "data": "b"}}
    found, begun = read(
        {"role": "system", "content": "Two."},
        user("Hi"),
        {"role": "system", "content": [text("Late.")]},
        {"role": "system", "content": "Gone.", "clear_at": "next_user_message"},
        {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "?"}, text("I look."), call]},
        user(result, document, text("So?")),
        {"role": "assistant", "content": ""},
        system=[text("One."), text("And.")],
    )
    system, first, said, told, last = found
    assert begun == ""
    assert system == {"role": "system", "content": "One.\nAnd.\n\nTwo."}
    assert first == user("Hi\n<system-reminder>\nLate.\n</system-reminder>")
    function = {"name": "look", "arguments": {"x": 1}}
    assert said == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }
    assert (told["role"], told["tool_call_id"]) == ("tool", "a")
    words, picture = told["content"]
    assert (words["text"], picture["image"][1:4]) == ("Error:\nNo.", b"PNG")
    assert last == user("Notes\nb\nSo?")


def test_texts_are_joined_once(monkeypatch):
    """Joined one by one, twenty megabytes of blocks took a minute."""
    merged, joined = anthropic._merged, []
    monkeypatch.setattr(anthropic, "_merged", lambda parts: (joined.append(len(parts)), merged(parts))[1])
    systems = [{"role": "system", "content": "S"}] * 40
    (system, said), _ = read(*systems, *[user(*[text("a")] * 50)] * 3)
    assert system == {"role": "system", "content": "\n\n".join("S" * 40)}
    assert said == user("\n".join("a" * 150))
    assert joined == [150]


def test_what_agents_send_is_taken():
    """The fields that Claude Code 2.1 sends, and what is told about them."""
    body = {
        "model": "default",
        "messages": [user(text("Hi", cache_control={"type": "ephemeral"}))],
        "system": [text("You help.", cache_control={"type": "ephemeral", "ttl": "1h"})],
        "tools": [{**WEATHER, "eager_input_streaming": True, "input_examples": [{"city": "Rome"}]}],
        "metadata": {"user_id": "{}"},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }
    result = Result("Hello", "", [], [1, 2], "stop", STATS)
    app = create_app(Script(Block(0, 1, (5,), "Hello"), Finished(result)), Settings())
    status, told = post(app, PATH, body)
    assert (status, told["content"], told["stop_reason"]) == (200, [text("Hello")], "end_turn")
    usage = {"input_tokens": 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 2}
    assert told["usage"] == usage
    paths = ["context_management", "messages[0].content[0].cache_control", "metadata", "system[0].cache_control"]
    assert told["x_ignored"] == [*paths, "tools[0].eager_input_streaming"]
    parsed = parse_body(Messages, json.dumps(body).encode())
    assert parsed.functions[0].description == 'Get the weather of a city.\nExamples:\n{"city": "Rome"}'
    assert (parsed.thinking, parsed.reasoning_effort, parsed.thinking_budget) == (True, "high", None)


def test_what_is_asked_of_the_engine():
    body = {
        "messages": [user("Hi")],
        "thinking": {"type": "enabled", "budget_tokens": 9, "display": "omitted"},
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "low"},
        "max_tokens": 7,
        "temperature": 1,
    }
    asked = MessageExchange(parse_body(Messages, json.dumps(body).encode()), Script().engine, Settings()).arguments
    assert asked.pop("seed") >= 0
    assert asked == {
        "max_tokens": 7,
        "thinking": True,
        "thinking_budget": 9,
        "schema": {"type": "object"},
    }


def test_a_thought_may_be_left_out_of_what_is_sent():
    body = {"messages": [user("Hi")], "thinking": {"type": "adaptive", "display": "omitted"}}
    blocks = Block(0, 1, (5,), "", "Hm."), Block(1, 1, (5,), "Yes.")
    app = create_app(Script(*blocks, Finished(Result("Yes.", "Hm.", [], [], "stop", STATS))), Settings())
    content = [{"type": "thinking", "thinking": "", "signature": ""}, text("Yes.")]
    assert post(app, PATH, body)[1]["content"] == content


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_that_must_be(choice):
    body = {"messages": [user("Hi")], "tools": [WEATHER], "tool_choice": choice}
    result = Result('{"city": "Oslo"}', "", [], [5], "stop", STATS)
    app = create_app(Script(Block(0, 1, (5,), result.text), Finished(result)), Settings())
    told = post(app, PATH, body)[1]
    (call,) = told["content"]
    assert (call["name"], call["input"], told["stop_reason"]) == ("get_weather", {"city": "Oslo"}, "tool_use")


def test_an_answer_without_text_has_an_empty_block():
    app = create_app(Script(Finished(Result("", "", [], [], "stop", STATS))), Settings())
    assert post(app, PATH, {"messages": [user("Hi")]})[1]["content"] == [text("")]


URL = {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aa"}}
REFUSED = [
    (
        {"messages": [user(URL)]},
        "messages[0].content[0].source.type is 'url'; nothing is fetched and no files are kept here: send base64.",
    ),
    (
        {"messages": [user(PDF)]},
        "messages[0].content[0].source.type is 'base64'; no PDF is read, nothing is fetched and no files are kept "
        "here: send its text.",
    ),
    (
        {"messages": [user({**picture_block(), "source": {"type": "base64", "data": "data:image/png;base64,aa"}})]},
        "messages[0].content[0].source.data is 'data:image/png;base64,aa'; it should be a file in base64, without a "
        "data: before it.",
    ),
    (
        {"messages": [user({"type": "tool_result", "tool_use_id": "b"})]},
        "messages[0].content[0].tool_use_id is 'b'; it should be the id of a tool_use in an earlier assistant message.",
    ),
    ({"mcp_servers": [{}]}, "mcp_servers is a list of 1; no other server is asked: leave it out."),
    ({"container": "c"}, "container is 'c'; there are no containers here: leave it out."),
    ({"n": 2}, "n is not supported here; leave it out."),
    (
        {"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "tool", "name": "bash"}},
        "tool_choice.name is 'bash'; no tool has this name.",
    ),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name is missing; give it."),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name is 'a b'; it should be 1 to 128 letters, "
     "digits, _, - or .."),
    (
        {"messages": [user("Hi"), {"role": "assistant", "content": "So"}], "tools": [WEATHER]},
        "messages[1].role is 'assistant'; and tools is given, which an answer that is begun cannot have: leave one "
        "out.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused_in_anthropics_form(body, message):
    app = create_app(Script(), Settings())
    for path in (PATH, COUNT):
        status, told = post(app, path, {"messages": [user("Hi")], **body})
        assert status == 400
        assert told == {"type": "error", "error": {"type": "invalid_request_error", "message": message}}


def test_errors_have_the_form_of_the_path():
    app = create_app(Script(error=Busy(3, 2)), Settings(api_key="k"))
    body = {"messages": [user("Hi")]}
    kinds = [
        post(app, path, {**body, **more}, **{"x-api-key": key})[1]["error"]["type"]
        for path, key, more in (
            (PATH, "no", {}),
            (PATH, "k", {"model": "claude"}),
            (f"{PATH}/batches", "k", {}),
            (PATH, "k", {}),
        )
    ]
    assert kinds == ["authentication_error", "not_found_error", "not_found_error", "rate_limit_error"]
    assert post(app, "/v1/chat/completions", body)[1]["error"]["code"] == "invalid_api_key"
    assert [anthropic_error(ApiError("", status=one))["error"]["type"] for one in (500, 503, 413, 422)] == [
        "api_error", "overloaded_error", "request_too_large", "invalid_request_error"
    ]  # fmt: skip


def test_a_failure_behind_the_first_event_is_an_event():
    app = create_app(Script(Block(0, 1, (5,), "a"), Failed(RuntimeError("secret"))), Settings())
    body = json.dumps({"messages": [user("Hi")], "stream": True}).encode()
    status, headers, answer = ask(app, "POST", PATH, chunks=(body, b""))
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *_, last = answer.decode().strip().split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    told = {"type": "api_error", "message": "The server failed; its log says why."}
    assert json.loads(data.removeprefix("data: ")) == {"type": "error", "error": told}
