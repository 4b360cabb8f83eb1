"""litellm with its providers openai, anthropic and ollama_chat: chat, stream, structured output, tools, responses."""

import json

import litellm
from checks import ANNA, ASKED, KEY, MODEL, PERSON, PERSON_SCHEMA, SORT, SORTED, SUNNY, URL, WEATHER, run, same

OPENAI = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
TOOL = {"type": "function", "function": WEATHER}


def said(text):
    return [{"role": "user", "content": text}]


def chat():
    for one in (OPENAI, {**OPENAI, "model": f"hosted_vllm/{MODEL}"}, {**OPENAI, "model": f"lm_studio/{MODEL}"}):
        same(litellm.completion(messages=said(SORT), **one).choices[0].message.content, SORTED)


def stream():
    parts = litellm.completion(messages=said(SORT), stream=True, **OPENAI)
    same("".join(one.choices[0].delta.content or "" for one in parts), SORTED)


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON_SCHEMA, "strict": True}}
    answer = litellm.completion(messages=said(PERSON), response_format=form, **OPENAI)
    same(json.loads(answer.choices[0].message.content), ANNA)


def tools():
    turns = said(ASKED)
    made = litellm.completion(messages=turns, tools=[TOOL], **OPENAI).choices[0].message
    same(json.loads(made.tool_calls[0].function.arguments), {"city": "Oslo"})
    turns += [made, {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "sunny"}]
    same(litellm.completion(messages=turns, tools=[TOOL], **OPENAI).choices[0].message.content, SUNNY)


def responses():
    same(litellm.responses(input=SORT, **OPENAI).output[-1].content[0].text, SORTED)


run(chat, stream, structured, tools, responses)
