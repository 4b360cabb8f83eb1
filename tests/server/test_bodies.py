"""Typed bodies: whatever is wrong with one is told by a sentence, and what no rule forbids is taken."""

import copy
import json
import re
from typing import get_args

import pytest
from pydantic_core import core_schema
from serving import WEATHER, Script, said

from mlx_dgemma.server.endpoints.chat import ChatExchange
from mlx_dgemma.server.errors import ApiError
from mlx_dgemma.server.schemas import fields
from mlx_dgemma.server.schemas.bodies import Chat
from mlx_dgemma.server.schemas.editing import Completion
from mlx_dgemma.server.schemas.fields import parse_body
from mlx_dgemma.server.schemas.items import Response
from mlx_dgemma.server.settings import Settings

PICTURE = "data:image/png;base64,aGk="
CALL = {"id": "a", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
SHARED = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "drafts": True, "user": "u", "seed": 1,
    "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "temperature": 1, "top_p": 1.0, "stop": ["a"],
    "exact": False, "max_denoising_steps": 1, "image_tokens": 70, "entropy_bound": 0.1,
}  # fmt: skip
FORM = {"schema": {"type": "object"}, "name": "n", "description": "d", "strict": True}
FUNCTION = WEATHER["function"]
VALID = {
    Chat: {
        **SHARED, "n": 1, "max_tokens": 9, "frequency_penalty": 0, "logit_bias": {}, "logprobs": False,
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "a"},
                                         {"type": "image_url", "image_url": {"url": PICTURE, "detail": "auto"}}]},
            {"role": "assistant", "content": None, "reasoning_content": "a", "tool_calls": [CALL]},
            {"role": "tool", "content": "a", "tool_call_id": "a"},
        ],
        "response_format": {"type": "json_schema", "json_schema": FORM}, "tools": [{"function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "reasoning_effort": "low", "thinking_budget": 9,
        "chat_template_kwargs": {"enable_thinking": True}, "regex": "a", "parallel_tool_calls": True,
    },
    Completion: {**SHARED, "prompt": ["a"], "suffix": "b", "echo": False, "best_of": 1},
    Response: {
        **SHARED, "instructions": "a", "max_output_tokens": 9, "reasoning": {"effort": "low"}, "include": [],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                         {"type": "input_image", "image_url": PICTURE}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]},
            {"type": "message", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "a", "annotations": []}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "a"},
        ],
        "text": {"format": {"type": "json_schema", **FORM}}, "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "auto", "truncation": "disabled",
    },
}  # fmt: skip
ODD = (0, 1.5, True, "odd", [], [0], {}, {"type": "odd"})
SENTENCE = re.compile(r"[^;]+ (is .+; .+|is missing; give it|is not supported here; .+|is no .+|holds .+)\.")
FREE = ("metadata", "parameters", "schema")  # any JSON object


def read(kind, body):
    return parse_body(kind, json.dumps(body).encode())


def places(value, path=()):
    """(path, its text) of everything in a JSON value but what lies in free objects."""
    if path:
        yield path, "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path)[1:]
    if path and path[-1] in FREE:
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(one, (*path, key))


def changed(body, path, value):
    body = copy.deepcopy(body)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


@pytest.mark.parametrize("kind", VALID)
def test_whatever_is_wrong_is_told_by_a_sentence(kind):
    read(kind, VALID[kind])
    refused = 0
    for path, text in places(VALID[kind]):
        for odd in ODD:
            try:
                read(kind, changed(VALID[kind], path, odd))
            except ApiError as error:
                refused += 1
                assert error.status == 400
                assert error.param.startswith(text.rpartition(".")[0]) or text.startswith(error.param)
                assert SENTENCE.fullmatch(str(error)), str(error)
    assert refused > 4 * len([*places(VALID[kind])])


@pytest.mark.parametrize("kind", VALID)
def test_null_is_absent_and_what_is_unknown_is_refused_everywhere(kind):
    objects = [()] + [path for path, _ in places(VALID[kind]) if path[-1] not in FREE]
    for path in objects:
        place = VALID[kind]
        for key in path:
            place = place[key]
        if isinstance(place, dict) and place:
            read(kind, changed(VALID[kind], (*path, "odd"), None))
            with pytest.raises(ApiError, match=r"odd is not supported here; leave it out\.$"):
                read(kind, changed(VALID[kind], (*path, "odd"), 1))


@pytest.mark.parametrize(
    ("asked", "budget"),
    [
        ({"reasoning_effort": "low"}, 512),
        ({"reasoning_effort": "low", "thinking_budget": 9}, 9),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning_effort": "low", "mode": "causal"}, None),
        ({}, None),
    ],
)
def test_an_effort_is_a_budget_of_the_thought(asked, budget):
    body = parse_body(Chat, json.dumps({"messages": said("Hi"), **asked}).encode())
    assert ChatExchange(body, Script().engine, Settings()).arguments.get("thinking_budget") == budget


def test_whatever_is_wrong_is_a_sentence():
    """Of every kind of error that pydantic knows, those among them that no field of today has."""
    words = {"expected": "'a' or 'b'", "discriminator": "'t'", "expected_tags": "'a'", "min_length": 1, "max_length": 2}
    known = [one for one in get_args(core_schema.ErrorType) if one not in ("custom_error", "union_tag_not_found")]
    assert len(known) > 90
    for kind in known:
        found = {"type": kind, "msg": "Input should be a thing", "loc": ("a",), "ctx": words}
        told = str(fields._api_error(found, {"a": {"t": "b"}}))
        assert told.startswith("a")
        assert told.endswith(".")
        assert "{" not in told


@pytest.mark.parametrize("tool", [{"type": "custom", "name": ""}, {"type": "namespace", "name": "", "tools": []}])
def test_tools_of_every_kind_have_names(tool):
    with pytest.raises(ApiError, match=r"^tools\[0\]\.name is ''; it should be 1 to 128 letters"):
        fields.parse_body(Response, json.dumps({"input": "Hi", "tools": [tool]}).encode())
