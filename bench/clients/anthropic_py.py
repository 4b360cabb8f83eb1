"""The anthropic package: messages, streams, tools, pictures, counted tokens."""

import base64

import anthropic
from checks import ASKED, COLOR, KEY, MODEL, SORT, SORTED, SUNNY, URL, WEATHER, has, red_square, run, same

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
TOOL = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}


def said(content):
    return [{"role": "user", "content": content}]


def create(messages, **options):
    return client.messages.create(model=MODEL, max_tokens=256, messages=messages, **options)


def messages():
    answer = create(said(SORT))
    same((answer.content[0].text, answer.stop_reason), (SORTED, "end_turn"))


def stream():
    with client.messages.stream(model=MODEL, max_tokens=256, messages=said(SORT)) as events:
        same("".join(events.text_stream), SORTED)
        same(events.get_final_message().stop_reason, "end_turn")


def system_in_blocks():
    blocks = [{"type": "text", "text": "Answer in uppercase.", "cache_control": {"type": "ephemeral"}}]
    same(create(said("What is the capital of Italy?"), system=blocks).content[0].text, "THE CAPITAL OF ITALY IS ROME.")


def tools():
    first = create(said(ASKED), tools=[TOOL])
    call = next(one for one in first.content if one.type == "tool_use")
    same((call.name, call.input, first.stop_reason), ("get_weather", {"city": "Oslo"}, "tool_use"))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [*said(ASKED), {"role": "assistant", "content": first.content}, *said([result])]
    same(create(turns, tools=[TOOL]).content[0].text, SUNNY)


def streamed_tools():
    with client.messages.stream(model=MODEL, max_tokens=256, messages=said(ASKED), tools=[TOOL]) as events:
        final = events.get_final_message()
    same(
        [(one.name, one.input) for one in final.content if one.type == "tool_use"], [("get_weather", {"city": "Oslo"})]
    )


def picture():
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(red_square()).decode()}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": COLOR}]
    has(create(said(parts)).content[0].text, "is red.")


def count_tokens():
    counted = client.messages.count_tokens(model=MODEL, messages=said(ASKED), tools=[TOOL]).input_tokens
    used = create(said(ASKED), tools=[TOOL]).usage
    same(counted, used.input_tokens + (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0))


run(messages, stream, system_in_blocks, tools, streamed_tools, picture, count_tokens)
