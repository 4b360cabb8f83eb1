"""The ollama package: chat, streams, formats, tools, pictures, generate, lists."""

import json

import ollama
from checks import (
    ANNA,
    ASKED,
    COLOR,
    PERSON,
    PERSON_SCHEMA,
    SORT,
    SORTED,
    SUNNY,
    URL,
    WEATHER,
    has,
    red_square,
    run,
    same,
)

client = ollama.Client(host=URL)
TOOL = {"type": "function", "function": WEATHER}


def model():
    return client.list().models[0].model


def said(text, **more):
    return [{"role": "user", "content": text, **more}]


def lists():
    name = model()
    same("completion" in (client.show(name).capabilities or []), True)
    client.ps()


def chat():
    same(client.chat(model(), said(SORT)).message.content, SORTED)


def stream():
    parts = [*client.chat(model(), said(SORT), stream=True, keep_alive="5m")]
    same("".join(one.message.content or "" for one in parts), SORTED)
    same(parts[-1].done, True)


def generate():
    same(client.generate(model(), SORT, options={"num_ctx": 4096, "num_predict": 128}).response, SORTED)


def structured():
    same(json.loads(client.chat(model(), said(PERSON), format=PERSON_SCHEMA).message.content), ANNA)


def tools():
    turns = said(ASKED)
    made = client.chat(model(), turns, tools=[TOOL]).message
    same([(one.function.name, one.function.arguments) for one in made.tool_calls], [("get_weather", {"city": "Oslo"})])
    turns += [made, {"role": "tool", "tool_name": "get_weather", "content": "sunny"}]
    same(client.chat(model(), turns, tools=[TOOL]).message.content, SUNNY)


def picture():
    has(client.chat(model(), said(COLOR, images=[red_square()])).message.content, "is red.")


run(lists, chat, stream, generate, structured, tools, picture)
