"""The Responses API without a server: input items to messages, and events to output items."""

import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from serving import Script, post

from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.endpoints.response_events import ResponseBuilder
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.schemas.fields import parse_body
from mlx_dgemma.server.schemas.items import Response as ResponseBody
from mlx_dgemma.server.schemas.items import input_messages
from mlx_dgemma.server.settings import Settings

EVENT = TypeAdapter(ResponseStreamEvent)


def read(given, **fields):
    return input_messages(parse_body(ResponseBody, json.dumps({"input": given, **fields}).encode()))


def call(call_id, name="f", arguments="{}", **more):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def output(call_id, text):
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def thought(text, part="content", kind="reasoning_text"):
    return {"type": "reasoning", "id": "rs_1", "summary": [], part: [{"type": kind, "text": text}]}


# input


def test_a_text_is_a_users():
    assert read("Hi") == [{"role": "user", "content": "Hi"}]


def test_instructions_come_first():
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert read("Hi", instructions="Be brief.") == told
    assert read([{"role": "developer", "content": "Be brief."}, {"type": "message", **told[1]}]) == [
        {**told[0], "role": "developer"},
        told[1],
    ]


def test_parts():
    parts = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": "data:image/png;base64,aGk=", "detail": "auto", "file_id": None},
    ]
    assert read([{"role": "user", "content": parts}]) == [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image", "image": b"hi"}]}
    ]


def test_what_the_model_said_in_a_turn_is_one_message():
    said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": None}
    said["content"] = [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}]
    items = [thought("Hm."), said, call("a", arguments='{"x": 1}', id="fc_1", status="completed"), call("b", "g")]
    assert read([{"role": "user", "content": "Go"}, *items, output("b", "2"), output("a", "1")]) == [
        {"role": "user", "content": "Go"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Yes."}],
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]


def test_turns_of_the_model_stay_apart():
    two = [{"role": "assistant", "content": "One."}, {"role": "assistant", "content": "Two."}]
    assert read(two) == two
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    assert read([call("a"), *two[:1], thought("Hm."), thought("So.", "summary", "summary_text"), *two[1:]]) == [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        two[0],
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        {**two[1], "reasoning_content": "So."},
    ]  # fmt: skip


def test_texts_of_an_output_are_joined():
    parts = [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "rain"}]
    assert read([call("a"), output("a", parts)])[1]["content"] == "sun\nrain"


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        (None, "input", "input is missing; give it."),
        (3, "input", "input is 3; it should be a string or a list that is not empty."),
        (["Hi"], "input[0]", "input[0] is 'Hi'; it should be a JSON object."),
        (
            [{"type": "item_reference"}],
            "input[0].id",
            "input[0].id is missing; give it.",
        ),
        ([{"content": "Hi"}], "input[0].role", "input[0].role is missing; give it."),
        (
            [{"role": "user", "content": []}],
            "input[0].content",
            "input[0].content is a list of 0; it should be a string or a list that is not empty.",
        ),
        (
            [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}],
            "input[0].content[0].type",
            "input[0].content[0].type is 'input_file'; "
            'it should be "input_text" or "output_text" or "input_image" or "input_audio".',
        ),
        (
            [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}],
            "input[0].content[0].file_id",
            "input[0].content[0].file_id is 'f'; no files are kept here: give image_url, a data URL.",
        ),
        (
            [call("a", arguments='{"x": NaN}')],
            "input[0].arguments",
            "input[0].arguments is '{\"x\": NaN}'; it should be a JSON object, written as a string.",
        ),
        (
            [call("a"), output("b", "1")],
            "input[1].call_id",
            "input[1].call_id is 'b'; no function_call before it has this call_id: send the whole conversation.",
        ),
    ],
)
def test_items_that_cannot_be_read(given, param, message):
    with pytest.raises(ApiError) as caught:
        read(given)
    assert (str(caught.value), caught.value.param, caught.value.status) == (message, param, 400)


def test_pictures_are_counted():
    picture = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
    app = create_app(Script(), Settings(pictures=2))
    status, answer = post(app, "/v1/responses", {"input": [{"role": "user", "content": [picture] * 3}]})
    assert (status, answer["error"]["param"]) == (400, "input")
    assert answer["error"]["message"] == "There are more than 2 pictures; send fewer."


# events

BASE = {"model": "m", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
TEXT = (
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
)
ITEM_OPENED = ("response.output_item.added", "response.content_part.added")


def told(reply, *steps):
    events = [json.loads(json.dumps(event)) for step in (reply.start(), *steps) for event in step]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    for event in events:
        EVENT.validate_python(event)
    return events


def kinds(events):
    return [event["type"] for event in events]


def test_a_text_that_grows():
    reply = ResponseBuilder(BASE)
    events = told(reply, reply.append("", "a"), reply.append("", ""), reply.append("", "b"), reply.finish([], True))
    assert kinds(events) == [
        *("response.created", "response.in_progress", *ITEM_OPENED, TEXT[0]), *TEXT, "response.completed"
    ]  # fmt: skip
    last, item = events[-1]["response"], events[-1]["response"]["output"][0]
    assert item["content"] == [{"type": "output_text", "text": "ab", "annotations": [], "logprobs": []}]
    assert (item["status"], last["status"], last["incomplete_details"]) == ("completed", "completed", None)
    assert [event["item_id"] for event in events if "item_id" in event] == [item["id"]] * 5
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    assert events[-2]["item"] == item


def test_thinking_then_text_then_calls():
    reply = ResponseBuilder(BASE)
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": f'{{"x": {n}}}'}} for n in (0, 1)
    ]
    events = told(reply, reply.append("Hm.", "Yes."), reply.finish(calls, True, usage=None))
    thinking = [kind.replace("output_text", "reasoning_text") for kind in TEXT]
    one_call = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert kinds(events)[2:-1] == [*ITEM_OPENED, *thinking, *ITEM_OPENED, *TEXT, *one_call, *one_call]
    items = events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert [(item["call_id"], item["arguments"]) for item in items[2:]] == [
        ("call_0", '{"x": 0}'),
        ("call_1", '{"x": 1}'),
    ]
    assert len({item["id"] for item in items}) == 4
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [(event["output_index"], event["item"]) for event in done] == [*enumerate(items)]


def test_thinking_behind_text_opens_another_item():
    reply = ResponseBuilder(BASE)
    events = told(reply, reply.append("", "a"), reply.append("b", "c"), reply.finish([], True))
    assert [item["content"][0]["text"] for item in events[-1]["response"]["output"]] == ["a", "b", "c"]


def test_an_empty_answer_is_a_message():
    reply = ResponseBuilder(BASE)
    response = Response.model_validate(told(reply, reply.finish([], True))[-1]["response"])
    assert (len(response.output), response.output_text) == (1, "")


def test_a_text_that_was_cut():
    reply = ResponseBuilder(BASE)
    last = told(reply, reply.append("", "a"), reply.finish([], False))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_failure_closes_what_is_open():
    reply = ResponseBuilder(BASE)
    events = told(reply, reply.append("", "a"), reply.fail("It broke."))
    assert kinds(events)[-4:] == [*TEXT[1:], "response.failed"]
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "It broke."}
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
