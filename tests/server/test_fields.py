"""What clients send beside what matters, and answers that must be generated again to be as they were asked for."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from serving import CHAT, RESPONSES, Script, ask, post, said, tool

from mlx_dgemma.decoding.events import Block, Finished, Result, Stats
from mlx_dgemma.prompt.answer import BROKEN
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.endpoints.retakes import is_surely_valid
from mlx_dgemma.server.schemas.bodies import Chat
from mlx_dgemma.server.schemas.fields import parse_body
from mlx_dgemma.server.schemas.items import MessageItem, Response, input_messages
from mlx_dgemma.server.schemas.messages import PICTURE, chat_messages
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.server.stored import StoredResponses
from mlx_dgemma.serving.tickets import Accepted, Ticket

STATS = Stats(1, 0, 3, 1, 4, 64, {"load": 0.0, "prefill": 1.0, "denoise": 2.0, "total": 3.0}, 1.5, 1.0, 0, 0)
CITY = tool("get_city", city={"enum": ["Oslo", "Rome"]})
CITY["function"]["strict"] = True
FORM = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": ["a"]}}}
DATA = "data:image/png;base64,aGk="


def finished(text="", calls=(), tokens=(5, 6)):
    made = [{"id": f"call_{n}", "type": "function", "function": call} for n, call in enumerate(calls)]
    reason = "tool_calls" if made else "stop"
    return Finished(Result(text, "", made, list(tokens), reason, STATS, [-0.5] * len(tokens)))


def call(name="get_city", **arguments):
    return {"name": name, "arguments": arguments}


class Takes(Script):
    """A scheduler that tells each request the next of some results."""

    def __init__(self, *results):
        super().__init__()
        self.left = list(results)

    def submit(self, prepare, listener, drafts=False):
        self.submitted.append(Ticket(prepare, listener, drafts))
        result = self.left.pop(0)
        for event in (Accepted(1, 0), Block(0, 1, (5,), text=result.result.text), result):
            listener(event)
        return self.submitted[-1]


def answered(path, body, *results):
    """(the answer, how many requests were generated)."""
    script = Takes(*results)
    status, answer = post(create_app(script, Settings()), path, body)
    assert status == 200, answer
    assert script.left == []
    return answer, len(script.submitted)


def chat(*results, **fields):
    answer, count = answered(CHAT, {"messages": said("Hi."), **fields}, *results)
    return answer["choices"][0], count, answer


def test_calls_of_strict_tools_are_generated_again_where_they_are_not_valid():
    wrong = finished(calls=[call(city="Oslo"), call(city="Paris"), call("other", city=1)])
    choice, count, answer = chat(wrong, finished('{"city": "Rome"}', tokens=(7,)), tools=[CITY])
    cities = [json.loads(one["function"]["arguments"])["city"] for one in choice["message"]["tool_calls"]]
    assert (cities, count, choice["finish_reason"]) == (["Oslo", "Rome", 1], 2, "tool_calls")
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["stats"]["denoising_steps"] == 8
    assert chat(finished(calls=[call(city="Oslo")]), tools=[CITY])[1] == 1
    lax = {**CITY, "function": {**CITY["function"], "strict": False}}
    assert chat(wrong, tools=[lax])[1] == 1


def test_a_call_of_strict_tools_that_cannot_be_read_is_generated_again():
    note = f"The tool call 'call:city{{x' {BROKEN}"
    broken = finished("Let me see. call:city{x")
    broken = replace(broken, result=replace(broken.result, notes=(note,)))
    choice, count, _ = chat(broken, finished('{"city": "Rome"}'), tools=[CITY])
    (made,) = choice["message"]["tool_calls"]
    assert (made["function"], count) == ({"name": CITY["function"]["name"], "arguments": '{"city": "Rome"}'}, 2)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    lax = {**CITY, "function": {**CITY["function"], "strict": False}}
    assert chat(broken, tools=[lax])[1] == 1
    cut = replace(broken, result=replace(broken.result, finish_reason="length"))
    assert chat(cut, tools=[CITY])[1] == 1


def test_of_parallel_calls_the_first_is_kept():
    wrong = finished(calls=[call(city="Oslo"), call(city="Paris")])
    choice, count, _ = chat(wrong, tools=[CITY], parallel_tool_calls=False)
    assert (len(choice["message"]["tool_calls"]), count) == (1, 1)


@pytest.mark.parametrize(
    "form", [{"response_format": FORM}, {"regex": "[{].*"}, {"guided_json": FORM["json_schema"]["schema"]}]
)
def test_beside_tools_a_text_is_generated_again_where_it_is_not_in_its_form(form):
    choice, count, _ = chat(finished("Well."), finished('{"a": 1}'), tools=[CITY], **form)
    assert (choice["message"]["content"], count) == ('{"a": 1}', 2)
    assert chat(finished(calls=[call(city="Oslo")]), tools=[CITY], **form)[1] == 1
    if "regex" not in form:
        assert chat(finished('{"a": 2}'), tools=[CITY], **form)[1] == 1


def test_a_stream_has_only_the_text_in_its_form():
    body = {"messages": said("Hi."), "tools": [CITY], "response_format": FORM, "stream": True, "user": "u"}
    app = create_app(Takes(finished("Well."), finished('{"a": 1}')), Settings())
    lines = ask(app, "POST", CHAT, (), (json.dumps(body).encode(), b""))[2].decode().split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == '{"a": 1}'
    assert chunks[-1]["x_ignored"] == ["user"]
    assert "x_ignored" not in chunks[0]


def test_patterns_are_not_tried():
    assert is_surely_valid("a", {"type": "string"})
    assert not is_surely_valid(1, {"type": "string"})
    assert not is_surely_valid("a", {"type": "string", "pattern": "(a*)*b"})


def test_what_clients_send_by_default_is_told():
    sent = {"top_p": 0.9, "top_k": 40, "presence_penalty": 1.5, "frequency_penalty": 0, "max_tokens": -1, "seed": -1,
            "model": "", "store": True, "user": "u", "stream_options": {"include_usage": True}, "n": 1, "min_p": 0.0,
            "stop": [str(n) for n in range(20)]}  # fmt: skip
    _, _, answer = chat(finished("a"), **sent)
    told = ["presence_penalty", "store", "top_k", "top_p", "user", "stream_options"]
    assert answer["x_ignored"] == told
    by_token = {"mode": "causal", "top_p": 0.9, "repetition_penalty": 1.1}
    assert "x_ignored" not in chat(finished("a"), **by_token)[2]
    assert "x_ignored" not in chat(finished("a"))[2]


def test_forced_calls_have_no_stop_and_no_log_probs():
    forced = {"tools": [CITY], "tool_choice": "required", "stop": ["Observation:"], "logprobs": True}
    choice, _, answer = chat(finished('{"city": "Oslo"}'), **forced)
    assert (choice["logprobs"], answer["x_ignored"]) == (None, ["stop", "logprobs"])


def test_messages_of_other_servers_are_read():
    made = {"id": "a", "type": "function", "function": {"name": "m:s/f", "arguments": ""}, "extra_content": {}}
    shown = [{"type": "text", "text": "sun"}, {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}}]
    body = {"messages": [
        {"role": "user", "content": "Hi", "cache_control": {"type": "ephemeral"}},
        {"role": "assistant", "content": None, "audio": None, "refusal": None, "reasoning_details": []},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "a", "content": shown},
        {"role": "user", "content": "So?"},
    ]}  # fmt: skip
    read = chat_messages(parse_body(Chat, json.dumps(body).encode()).messages)
    assert [one["role"] for one in read] == ["user", "assistant", "assistant", "tool", "user", "user"]
    assert read[2]["tool_calls"][0] == {"id": "a", "type": "function", "function": {"name": "m:s/f", "arguments": {}}}
    assert read[3]["content"] == f"sun\n{PICTURE}"
    assert read[4]["content"] == [{"type": "image", "image": b"hi"}]


# /v1/responses

SPACE = {"type": "namespace", "name": "crm", "description": "d", "tools": [{"type": "function", **CITY["function"]}]}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Patch.", "format": {"definition": "start: x"}}


def test_what_codex_sends_is_answered():
    body = {
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}], "name": "n"},
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "p"},
            {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "c"}]},
        ],
        "instructions": "i", "tools": [SPACE, PATCH, {"type": "web_search", "x": 1}], "store": False,
        "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"], "client_metadata": {"a": "b"},
        "text": {"verbosity": "low"}, "truncation": "auto", "parallel_tool_calls": True,
    }  # fmt: skip
    calls = [call("crm.get_city", city="Rome"), call("apply_patch", input="*** Begin")]
    answer, count = answered(RESPONSES, body, finished(calls=calls))
    first, second = answer["output"]
    assert (first["name"], first["namespace"], count) == ("get_city", "crm", 1)
    assert (second["type"], second["name"], second["input"]) == ("custom_tool_call", "apply_patch", "*** Begin")
    told = "client_metadata include input[1].name input[2].encrypted_content reasoning.summary text.verbosity"
    assert answer["x_ignored"] == [*told.split(), "tools[0].description", "tools[2]", "truncation"]
    read = parse_body(Response, json.dumps(body).encode())
    assert [one.name for one in read.functions] == ["crm.get_city", "apply_patch"]
    assert "start: x" in read.functions[1].description
    made = input_messages(read)[3]["tool_calls"][0]["function"]
    assert made == {"name": "apply_patch", "arguments": {"input": "p"}}


def test_a_response_goes_on_from_an_earlier_one():
    app = create_app(Takes(finished("Yes."), finished("No."), finished("So.")), Settings())
    first = post(app, RESPONSES, {"input": "a", "instructions": "i"})[1]
    stored = app.state.settings.stored
    second = post(app, RESPONSES, {"input": "b", "previous_response_id": first["id"]})[1]
    assert second["previous_response_id"] == first["id"]
    read = input_messages(parse_body(Response, b'{"input": "c"}'), stored.items(second["id"]))
    assert [one["content"] if isinstance(one["content"], str) else one["content"][0]["text"] for one in read] == [
        "a", "Yes.", "b", "No.", "c"
    ]  # fmt: skip
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    assert post(app, RESPONSES, {"input": [reference, {"role": "user", "content": "c"}], "store": False})[0] == 200
    for body in ({"input": "a", "previous_response_id": "resp_0"}, {"input": [{**reference, "id": "msg_0"}]}):
        status, answer = post(app, RESPONSES, body)
        assert status == 404
        assert "is not kept here, or no longer: send the whole conversation" in answer["error"]["message"]


def test_the_store_is_bounded():
    stored = StoredResponses(most=2, most_bytes=1000)
    for name in "abc":
        stored.add(name, [name])
    assert [stored.items(name) for name in "abc"] == [None, ["b"], ["c"]]
    stored.add("d", ["x" * 800])
    assert (stored.items("b"), stored.items("d")) == (None, ["x" * 800])
    stored.add("e", ["x" * 2000])
    assert (stored.items("e"), stored.items("d")) == (None, ["x" * 800])


@pytest.mark.parametrize(
    "pictures", [["ab" * 2000, "cd" * 2000, "ef" * 2000], [b"ab" * 2000, b"cd" * 2000, b"ef" * 2000]]
)
def test_a_picture_that_comes_with_every_request_is_held_once(pictures):
    stored, empty = StoredResponses(most=3, most_bytes=10_000), pictures[0][:0]
    for n in range(3):
        copies = [empty.join([pictures[0][:1], pictures[0][1:]]) for _ in range(2)]
        stored.add(f"a{n}", [MessageItem.model_construct(content=[{"url": copy} for copy in copies])])
    held = [part["url"] for n in range(3) for part in stored.items(f"a{n}")[0].content]
    assert held == [pictures[0]] * 6 and len(set(map(id, held))) == 1
    stored.add("b", [pictures[1]])
    assert stored.items("a0") is None and stored.items("a1") and stored.items("b")
    stored.add("c", [pictures[2]])  # three of them have no room
    assert [bool(stored.items(name)) for name in ("a1", "a2", "b", "c")] == [False, False, True, True]
    stored.add("d", [pictures[0]])  # the first picture is free again, and now the second goes
    assert [bool(stored.items(name)) for name in ("b", "c", "d")] == [False, True, True]


def test_the_table_of_the_pages_is_the_models():
    made = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "fields.py"))
    assert made["page"]() == made["PAGE"].read_text(encoding="utf-8"), "run bench/fields.py"
