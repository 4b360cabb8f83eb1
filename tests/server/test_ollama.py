"""Ollama's API: the same answers in its words."""

import base64
import io
import json

import httpx
import pytest
from listeners import LIMIT
from serving import MODEL, WEATHER, Script, ask, post
from support import BLUE, square

from mlx_dgemma.decoding.events import Block, Finished, Result, Stats
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.schemas.ollama import OllamaChat, ollama_messages, ollamas_name
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.tickets import Failed

FROG = [{"role": "user", "content": "Spell the word frog."}]
STATS = Stats(3, 0, 2, 1, 4, 64, {"load": 5.0, "prefill": 1.0, "denoise": 2.0, "total": 3.0}, 1.5, 3.0, 0, 0)
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}


def block(text, thinking=""):
    return Block(0, 1, (), text, thinking)


def finished(text="", thinking="", calls=(), reason="stop"):
    return Finished(Result(text, thinking, list(calls), [1, 2], reason, STATS))


def scripted(path, body, *events, **settings):
    """(status, the lines of the answer) of a server that tells these events."""
    app = create_app(Script(*events), Settings(model=MODEL, **settings))
    status, headers, answer = ask(app, "POST", path, (), (json.dumps(body).encode(), b""))
    if len(answer.splitlines()) > 1:
        assert headers["content-type"] == "application/x-ndjson"
    return status, [json.loads(line) for line in answer.splitlines()]


def without_time(line):
    assert line.pop("created_at").endswith("Z")
    return line


END = {"done": True, "done_reason": "stop", "total_duration": 3 * 10**9, "load_duration": 0, "prompt_eval_count": 3,
       "prompt_eval_duration": 10**9, "eval_count": 2, "eval_duration": 2 * 10**9}  # fmt: skip


def test_a_chat_is_streamed_unless_it_asks_for_one_answer():
    events = (block("", "Hm."), block("Ye"), block("s"), finished("Yes", "Hm.", [CALL], "tool_calls"))
    status, lines = scripted("/api/chat", {"model": f"{MODEL}:latest", "messages": FROG}, *events)
    called = {"function": {"index": 0, "name": "f", "arguments": {"a": [1]}}}
    messages = [without_time(line).pop("message") for line in lines]
    assert messages[3]["tool_calls"][0].pop("id").startswith("call_")
    assert messages == [{"role": "assistant", **one} for one in (
        {"content": "", "thinking": "Hm."}, {"content": "Ye"}, {"content": "s"},
        {"content": "", "tool_calls": [called]}, {"content": ""},
    )]  # fmt: skip
    assert (status, lines) == (200, [*[{"model": f"{MODEL}:latest", "done": False}] * 4,
                                     {"model": f"{MODEL}:latest", **END}])  # fmt: skip
    status, (whole,) = scripted("/api/chat", {"messages": FROG, "stream": False}, *events)
    assert whole["message"]["tool_calls"][0].pop("id")
    message = {"role": "assistant", "content": "Yes", "thinking": "Hm.", "tool_calls": [called]}
    assert without_time(whole) == {"model": MODEL, "message": message, **END}


def test_a_prompt_a_text_and_nothing():
    body = {"prompt": "Yes?", "options": {"num_ctx": 8192}, "keep_alive": -1, "stream": False}
    _, (whole,) = scripted("/api/generate", body, block("Yes", "Hm."), finished("Yes", "Hm.", reason="length"))
    ignored = ["keep_alive", "options.num_ctx"]
    more = {"done_reason": "length", "response": "Yes", "thinking": "Hm.", "x_ignored": ignored}
    assert without_time(whole) == {"model": MODEL, **END, **more}
    _, lines = scripted("/api/generate", {"prompt": "a", "suffix": "c", "model": "gpt"}, block("b"), finished("b"),
                        aliases=("gpt",))  # fmt: skip
    assert [without_time(line) for line in lines] == [
        {"model": "gpt", "response": "b", "done": False},
        {"model": "gpt", "response": "", **END},
    ]
    for path, said in (
        ("/api/generate", {"response": ""}),
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
    ):
        _, (loaded,) = scripted(path, {"model": MODEL})
        assert without_time(loaded) == {"model": MODEL, **said, "done": True, "done_reason": "load"}


def test_an_answer_that_fails_later_ends_its_lines():
    _, lines = scripted("/api/chat", {"messages": FROG}, block("a"), Failed(MemoryError()))
    assert lines[-1] == {"error": "The server failed; its log says why."}


RESULT = {"role": "tool", "content": "sunny", "tool_name": "g"}
REFUSED = [
    ("/api/chat", {"model": "llama3", "messages": FROG}, 404, "The model 'llama3' is not served here; ask for 'demo', "
     "leave it out, or start the server with --alias for this name."),
    ("/api/chat", {"messages": FROG, "options": {"mirostat": 2}}, 400,
     "options.mirostat is 2; mirostat is unknown here: leave it out, or give 0."),
    ("/api/chat", {"messages": FROG, "options": {"warmth": 2}}, 400,
     "options.warmth is not supported here; leave it out."),
    ("/api/chat", {"messages": FROG, "options": {"num_predict": 0}}, 400,
     "options.num_predict is 0; it should be a whole number, at least 1, or -1 for the server's own limit."),
    ("/api/chat", {"messages": FROG, "format": "yaml"}, 400,
     "format is 'yaml'; it should be \"json\" or a JSON Schema."),
    ("/api/chat", {"messages": FROG, "think": "hard"}, 400,
     "think is 'hard'; it should be true, false, low, medium or high."),
    ("/api/chat", {"messages": [*FROG, RESULT]}, 400, "messages[1].tool_name is 'g'; no call before it waits for this "
     "result: send the assistant's message with its tool_calls."),
    ("/api/chat", {"messages": [{"role": "system", "content": "", "images": ["AAAA"]}]}, 400,
     "messages[0].images is a list of 1; pictures belong to a message of the user or a tool."),
    ("/api/generate", {"prompt": "a", "template": "{{ .Prompt }}"}, 400,
     "template is '{{ .Prompt }}'; the checkpoint's own template is used: leave it out, or send raw true."),
    ("/api/generate", {"prompt": "a", "raw": True, "format": "json"}, 400,
     "format is 'json'; a text is continued without it: leave it out, or raw and suffix."),
    ("/api/generate", {"prompt": "a", "context": [1]}, 400,
     "context is a list of 1; nothing is kept here: send the whole conversation to /api/chat."),
    ("/api/embed", {"input": "a"}, 404, "This model makes no embeddings; ask another server for them."),
    ("/api/nothing", {}, 404, "There is no /api/nothing here; see /openapi.json."),
]  # fmt: skip


@pytest.mark.parametrize("path, body, status, message", REFUSED)
def test_errors_are_in_ollamas_form(path, body, status, message):
    assert post(create_app(Script(), Settings(model=MODEL)), path, body) == (status, {"error": message})


def test_the_model_itself(url):
    get = {path: httpx.get(url + path, timeout=LIMIT).json() for path in ("/api/tags", "/api/ps", "/api/version")}
    assert [one["name"] for one in get["/api/tags"]["models"]] == [MODEL]
    assert get["/api/ps"]["models"][0]["context_length"] == 4096
    assert get["/api/version"]["version"].count(".") == 2
    told = httpx.post(url + "/api/show", json={"model": f"{MODEL}:latest"}, timeout=LIMIT).json()
    assert told["model_info"]["diffusion_gemma.context_length"] == 4096
    assert told["capabilities"] == ["completion", "insert", "tools", "vision", "thinking"]
    assert told["details"]["parameter_size"] == "6.7M"


def test_what_a_body_stands_for():
    schema = {"type": "object"}
    options = {"seed": -1, "num_predict": -1, "top_k": 0, "repeat_penalty": 1.1, "repeat_last_n": 0, "temperature": 0.5}
    chat = OllamaChat(model="m:latest", format=schema, think="low", tools=[WEATHER], options=options).chat()
    assert chat.response_format.json_schema.schema_ == schema
    assert (chat.thinking, chat.reasoning_effort) == (None, "low")
    assert (chat.model, chat.stream, chat.temperature) == ("m", True, 0.5)
    assert (chat.seed, chat.max_tokens, chat.top_k, chat.repetition_penalty) == (None,) * 4
    options = {"seed": 7, "num_predict": 9, "top_k": 3, "repeat_penalty": 1.1, "mode": "causal", "stop": ["a"]}
    chat = OllamaChat(think=True, format="json", stream=False, options=options).chat()
    assert (chat.response_format.type, chat.thinking, chat.stream) == ("json_object", True, False)
    assert (chat.seed, chat.max_tokens, chat.top_k, chat.repetition_penalty) == (7, 9, 3, 1.1)
    assert (chat.mode, chat.stop) == ("causal", ["a"])


def test_names_of_a_chats_fields():
    names = ("top_p", "repetition_penalty", "max_tokens", "logprobs")
    assert [*map(ollamas_name, names)] == ["options.top_p", "options.repeat_penalty", "options.num_predict", "logprobs"]


def test_results_find_their_calls():
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "content": text, **named} for text, named in
               (("2", {"tool_name": "g"}), ("1", {}), ("3", {"tool_name": "f"}))]  # fmt: skip
    found = ollama_messages(OllamaChat(messages=[{"role": "assistant", "tool_calls": calls}, *results]))
    assert [(one["tool_call_id"], one["content"]) for one in found[1:]] == [
        ("call_0_1", "2"), ("call_0_0", "1"), ("call_0_2", "3")
    ]  # fmt: skip


def test_real_answers(url):
    square(BLUE).save(file := io.BytesIO(), "PNG")
    picture = base64.b64encode(file.getvalue()).decode()

    def answer(path, **body):
        told = httpx.post(url + path, json={"stream": False, "options": {"seed": 0}, **body}, timeout=LIMIT)
        assert told.status_code == 200, told.text
        return told.json()

    seen = answer("/api/generate", prompt="What color is the shape?", images=[picture])
    assert "blue" in seen["response"]
    weather = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = answer("/api/chat", messages=weather, tools=[WEATHER])["message"]
    assert asked["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    given = [*weather, asked, {"role": "tool", "content": "sunny"}]
    assert answer("/api/chat", messages=given, tools=[WEATHER])["message"]["content"] == "The weather in Oslo is sunny."
