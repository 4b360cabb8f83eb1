"""Every endpoint goes one way: what holds for a request of one of them holds for those of all."""

import base64
import io
import json
import threading

import httpx
import pytest
from listeners import LIMIT
from serving import CHAT, COMPLETIONS, RESPONSES, WEATHER, Script, ask, post, said
from support import BLUE, square

from mlx_dgemma.decoding.events import Finished, Result, Stats
from mlx_dgemma.prompt import builder
from mlx_dgemma.prompt.images import open_image
from mlx_dgemma.prompt.vocabulary import Vocabulary
from mlx_dgemma.server import pipeline
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.metrics import BOUNDS, Histograms
from mlx_dgemma.server.settings import Settings

HI = {CHAT: {"messages": said("Hi.")}, COMPLETIONS: {"prompt": "Hi."}, RESPONSES: {"input": "Hi."}}
LONG, MESSAGES = "a " * 2**19, "/v1/messages"


@pytest.mark.parametrize("path", HI)
def test_drafts(url, path):
    body = {**HI[path], "stream": True, "drafts": True, "max_denoising_steps": 1, "seed": 0}
    body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 4
    lines = httpx.post(url + path, json=body, timeout=LIMIT).text.splitlines()
    drafts = [one for line in lines if line.startswith("data: {") if (one := json.loads(line[6:]).get("draft"))]
    assert (drafts[0]["index"], drafts[0]["block"], drafts[0]["step"]) == (0, 0, 1)


def image_of(path, url):
    if path == CHAT:
        return {"type": "image_url", "image_url": {"url": url}}
    if path == MESSAGES:
        data = url.partition(",")[2]
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    return {"type": "input_image", "image_url": url}


@pytest.mark.parametrize("path, options", [
    (CHAT, {"n": 3, "max_tokens": 2}),
    (RESPONSES, {"max_output_tokens": 2}),
    (MESSAGES, {"max_tokens": 2}),
    ("/api/chat", {"options": {"num_predict": 2}, "stream": False}),
])  # fmt: skip
def test_pictures_are_decoded_once_and_not_on_the_schedulers_thread(url, scheduler, monkeypatch, path, options):
    threads, read = [], open_image

    def spy(source):
        threads.append(threading.current_thread())
        return read(source)

    monkeypatch.setattr(builder, "open_image", spy)
    square(BLUE).save(file := io.BytesIO(), "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    message = {"role": "user", "content": [image_of(path, f"data:image/png;base64,{data}")] * 2}
    if path == "/api/chat":
        message = {"role": "user", "content": "Hi.", "images": [data] * 2}
    body = {"input" if path == RESPONSES else "messages": [message], **options}
    assert httpx.post(url + path, json=body, timeout=LIMIT).status_code == 200
    assert len(threads) == 2
    assert all(one.name.startswith("pictures") for one in threads)


@pytest.mark.parametrize("path, name", [(CHAT, "messages"), (RESPONSES, "input")])
def test_what_is_no_picture_is_told_with_its_field(url, path, name):
    shown = [{"role": "user", "content": [image_of(path, "data:image/png;base64,AAAA")]}]
    answer = httpx.post(url + path, json={name: shown, "stream": True}, timeout=LIMIT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


CALL = {"name": "f", "arguments": json.dumps({"x": LONG})}
TOOL = {**WEATHER["function"], "description": LONG}
CALLED = {"role": "assistant", "tool_calls": [{"id": "a", "function": CALL}]}
LONG_BODIES = [
    (CHAT, {"messages": said(LONG)}),
    (CHAT, {"messages": said("Hi."), "tools": [{"type": "function", "function": TOOL}]}),
    (CHAT, {"messages": [*said("Hi."), CALLED]}),
    (RESPONSES, {"input": LONG}),
    (RESPONSES, {"input": "Hi.", "instructions": LONG}),
    (RESPONSES, {"input": "Hi.", "tools": [{"type": "function", **TOOL}]}),
    (RESPONSES, {"input": [{"type": "function_call", "call_id": "a", **CALL}]}),
    (COMPLETIONS, {"prompt": LONG}),
    (COMPLETIONS, {"prompt": "Hi.", "suffix": LONG}),
    (MESSAGES, {"max_tokens": 5, "messages": said(LONG)}),
    (MESSAGES, {"max_tokens": 5, "messages": said("Hi."), "system": LONG}),
    (MESSAGES, {"max_tokens": 5, "messages": said("Hi."), "tools": [
        {"name": "f", "description": LONG, "input_schema": {"type": "object"}},
    ]}),
    (MESSAGES, {"max_tokens": 5, "messages": [*said("Hi."), {"role": "assistant", "content": LONG}]}),
    (f"{MESSAGES}/count_tokens", {"messages": said(LONG)}),
    ("/api/chat", {"messages": said(LONG)}),
    ("/api/generate", {"prompt": "Hi.", "suffix": LONG}),
    ("/v1/fim/completions", {"prompt": LONG, "suffix": "Hi."}),
    ("/infill", {"input_prefix": "Hi.", "input_suffix": "", "input_extra": [{"filename": "a", "text": LONG}]}),
    ("/completion", {"prompt": LONG}),
    ("/v1/edits", {"input": LONG, "instruction": "Hi."}),
    ("/v1/edits", {"input": "Hi.", "instruction": LONG}),
    ("/v1/fill", {"template": LONG + "{n}", "holes": {"n": ["a", "b"]}}),
    ("/v1/decisions", {"input": LONG, "questions": [{"type": "predicate", "instructions": "Hi."}]}),
    ("/v1/decisions", {"input": "Hi.", "questions": [{"type": "predicate", "instructions": LONG}]}),
]  # fmt: skip


@pytest.mark.parametrize("path, body", LONG_BODIES)
def test_what_cannot_fit_is_not_cut_into_tokens(url, scheduler, monkeypatch, path, body):
    wrapped, encoded, plain = type(scheduler.engine.tokenizer), [], Vocabulary.encode

    def encode(self, text, **options):
        encoded.append(len(text))
        return self._tokenizer.encode(text[:99], **options)

    monkeypatch.setattr(wrapped, "encode", encode, raising=False)
    monkeypatch.setattr(Vocabulary, "encode", lambda self, text: encoded.append(len(text)) or plain(self, text[:99]))
    answer = httpx.post(url + path, json=body, timeout=LIMIT)
    assert answer.status_code == 400
    assert "characters, but the context leaves room for 4032 tokens" in answer.text
    assert max(encoded, default=0) < 1000
    if path in HI:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", HI)
def test_large_bodies_are_parsed_beside_the_event_loop(monkeypatch, path):
    threads, parse = [], pipeline.parse_body

    def spy(*arguments):
        threads.append(threading.current_thread())
        return parse(*arguments)

    monkeypatch.setattr(pipeline, "parse_body", spy)
    app = create_app(Script(), Settings())
    for user in ("a", "a" * pipeline.SMALL_BODY):
        assert post(app, path, {**HI[path], "user": user, "n": 0})[0] == 400
    here, beside = threads
    assert (here, beside.name) == (threading.current_thread(), "AnyIO worker thread")


@pytest.mark.parametrize("flood, status, message", [
    ("[" + "{}," * 340_000 + "{}]", 413, "The body has more than 100,000 values; send fewer."),
    (f"[{',' * 10**6}]", 413, "The body has more than 100,000 values; send fewer."),
    ("[" + "{}," * 40_000 + "{}]", 400, "{} is a list of 40001; it should have at most 4,096: send fewer."),
])  # fmt: skip
@pytest.mark.parametrize("path, name", [(CHAT, "messages"), (RESPONSES, "input")])
def test_floods_of_objects_are_not_looked_at(path, name, flood, status, message):
    told, _, answer = ask(create_app(Script(), Settings()), "POST", path, (), (f'{{"{name}": {flood}}}'.encode(), b""))
    assert (told, json.loads(answer)["error"]["message"]) == (status, message.format(name))


def test_many_values_in_a_text_are_one():
    app = create_app(Script(), Settings())
    status, answer = post(app, CHAT, {"messages": said('[{",\\"}]' * 40_000), "n": 0})
    assert (status, answer["error"]["param"]) == (400, "n")


def test_histograms():
    stats = Stats(1, 0, 9, 1, 4, 64, {"prefill": 1.0, "denoise": 2.0, "total": 3.0}, 1.5, 3.0, 0, 0)
    histograms = Histograms()
    histograms.observe(1.0, object())
    histograms.observe(3.2, Finished(Result("a", "", [], [5], "stop", stats)))
    lines = dict(line.rsplit(" ", 1) for line in histograms.lines() if not line.startswith("#"))
    sums = {"queue": 0.2, "first_block": 1.7, "step": 0.5, "total": 3.2}
    for name, value in sums.items():
        assert float(lines[f"dgemma_{name}_seconds_sum"]) == pytest.approx(value)
        assert lines[f"dgemma_{name}_seconds_count"] == lines[f'dgemma_{name}_seconds_bucket{{le="+Inf"}}'] == "1"
        within = [bound for bound in BOUNDS if lines[f'dgemma_{name}_seconds_bucket{{le="{bound}"}}'] == "1"]
        assert within == [bound for bound in BOUNDS if value <= bound + 1e-9]
