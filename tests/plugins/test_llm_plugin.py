"""The plugin of `llm`, beside an interface that is no more than the plugin uses."""

import asyncio
import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pydantic
import pytest

import mlx_dgemma

FROG = "Spell the word frog."
TOOL = SimpleNamespace(
    name="get_weather",
    description="Get the weather of a city.",
    input_schema={"type": "object", "properties": {"city": {"type": "string", "description": "The city."}},
                  "required": ["city"]},
)  # fmt: skip


def fake_llm():
    """Modules in place of `llm` and `llm.parts`."""
    parts, found = ModuleType("llm.parts"), ModuleType("llm")
    for name, names in {
        "TextPart": ("text",), "ReasoningPart": ("text",), "AttachmentPart": ("attachment",),
        "ToolCallPart": ("name", "arguments", "tool_call_id"), "ToolResultPart": ("name", "output", "tool_call_id"),
        "StreamEvent": ("type", "chunk", "tool_call_id"),
    }.items():  # fmt: skip
        fields = {one: field(default=None) for one in names}
        made = type(name, (), {"__annotations__": dict.fromkeys(names, object), **fields})
        setattr(parts, name, dataclass(made))
    found.Options = type("Options", (pydantic.BaseModel,), {"model_config": {"extra": "forbid"}})
    found.Model, found.AsyncModel = type("Model", (), {}), type("AsyncModel", (), {})
    found.ModelError = type("ModelError", (Exception,), {})
    found.ToolCall = SimpleNamespace
    found.hookimpl = lambda function: function
    found.parts = parts
    return found, parts


@pytest.fixture
def plugin(monkeypatch):
    found, parts = fake_llm()
    monkeypatch.setitem(sys.modules, "llm", found)
    monkeypatch.setitem(sys.modules, "llm.parts", parts)
    monkeypatch.delitem(sys.modules, "mlx_dgemma.plugins.llm_plugin", raising=False)
    yield importlib.import_module("mlx_dgemma.plugins.llm_plugin")
    monkeypatch.delitem(sys.modules, "mlx_dgemma.plugins.llm_plugin")


@pytest.fixture(scope="module")
def engine():
    return mlx_dgemma.load()


class Response:
    def __init__(self):
        self.calls, self.used, self.response_json = [], {}, None

    def add_tool_call(self, call):
        self.calls.append(call)

    def set_usage(self, **used):
        self.used = used


def prompt_of(plugin, *messages, tools=(), schema=None, **options):
    """A prompt with messages of (role, parts)."""
    said = [SimpleNamespace(role=role, parts=list(parts)) for role, *parts in messages]
    given = plugin.Options(**{"seed": 0, **options})
    return SimpleNamespace(messages=said, options=given, tools=tools, schema=schema)


def events_of(plugin, engine, prompt):
    plugin.engine_of = lambda checkpoint, adapter: engine
    response = Response()
    model = plugin.Dgemma()
    return list(model.execute(prompt, True, response)), response


def test_it_is_registered(plugin):
    told = []
    plugin.register_models(lambda *models, aliases: told.append((models, aliases)))
    ((models, _),) = told
    assert [one.model_id for one in models] == ["dgemma"] * 2
    assert "image/png" in models[0].attachment_types


def test_messages_and_keywords(plugin):
    parts = sys.modules["llm.parts"]
    picture = SimpleNamespace(content_bytes=lambda: b"png")
    prompt = prompt_of(
        plugin,
        ("system", parts.TextPart("Be brief.")),
        ("user", parts.TextPart("Look."), parts.AttachmentPart(picture)),
        ("assistant", parts.ReasoningPart("Hm."), parts.ToolCallPart("f", {"a": 1}, "c1")),
        ("tool", parts.ToolResultPart("f", "1", "c1"), parts.ToolResultPart("g", "2", "c2")),
        tools=[TOOL],
        schema={"type": "object"},
        max_tokens=9,
        checkpoint="here",
    )
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert plugin.messages_of(prompt) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": b"png"}, {"type": "text", "text": "Look."}]},
        {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [call], "content": ""},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "name": "g", "content": "2"},
    ]
    function = {"name": TOOL.name, "description": TOOL.description, "parameters": TOOL.input_schema}
    assert plugin.keywords_of(prompt) == {
        "seed": 0, "max_tokens": 9, "thinking": False, "schema": {"type": "object"},
        "tools": [{"type": "function", "function": function}],
    }  # fmt: skip


def test_answers(plugin, engine):
    parts = sys.modules["llm.parts"]
    events, response = events_of(plugin, engine, prompt_of(plugin, ("user", parts.TextPart(FROG))))
    assert [(one.type, one.chunk) for one in events] == [("text", "f r o g")]
    assert response.used == {"input": 16, "output": 4} and response.response_json["seed"] == 0
    weather = prompt_of(plugin, ("user", parts.TextPart("What is the weather in Oslo?")), tools=[TOOL])
    events, response = events_of(plugin, engine, weather)
    assert [(one.type, one.chunk) for one in events] == [
        ("tool_call_name", "get_weather"),
        ("tool_call_args", '{"city": "Oslo"}'),
    ]
    assert [(one.name, one.arguments) for one in response.calls] == [("get_weather", {"city": "Oslo"})]
    with pytest.raises(plugin.llm.ModelError, match="mode is 'no'; it should be one of"):
        events_of(plugin, engine, prompt_of(plugin, ("user", parts.TextPart("a")), mode="no"))


def test_answers_come_on_a_thread_too(plugin, engine):
    plugin.engine_of = lambda checkpoint, adapter: engine
    text = sys.modules["llm.parts"].TextPart

    async def ask(prompt):
        return [one.chunk async for one in plugin.AsyncDgemma().execute(prompt, True, Response())]

    assert asyncio.run(ask(prompt_of(plugin, ("user", text(FROG))))) == ["f r o g"]
    with pytest.raises(plugin.llm.ModelError):
        asyncio.run(ask(prompt_of(plugin, ("user", text("a")), mode="no")))
