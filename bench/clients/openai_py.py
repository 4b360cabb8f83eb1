"""The openai package: chat, streams, structured output, tools, pictures, responses, completions."""

import json

import openai
from checks import ANNA, ASKED, COLOR, KEY, MODEL, PERSON, SORT, SORTED, SUNNY, URL, WEATHER, data_url, has, run, same
from pydantic import BaseModel, Field, create_model

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
TOOL = {"type": "function", "function": WEATHER}


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


GetWeather = create_model("GetWeather", city=(str, Field(description="The city.")))
STRICT = openai.pydantic_function_tool(GetWeather, name="get_weather", description="Get the weather of a city.")


def said(text):
    return [{"role": "user", "content": text}]


def chat():
    same(next(iter(client.models.list())).object, "model")
    answer = client.chat.completions.create(model=MODEL, messages=said(SORT))
    same(answer.choices[0].message.content, SORTED)
    same(answer.usage.total_tokens > 0, True)


def stream():
    with client.chat.completions.stream(
        model=MODEL, messages=said(SORT), stream_options={"include_usage": True}
    ) as parts:
        same(parts.get_final_completion().choices[0].message.content, SORTED)


def structured():
    answer = client.chat.completions.parse(model=MODEL, messages=said(PERSON), response_format=Person)
    same(answer.choices[0].message.parsed, Person(**ANNA))


def tools():
    messages = said(ASKED)
    made = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message
    same(json.loads(made.tool_calls[0].function.arguments), {"city": "Oslo"})
    messages += [made, {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "sunny"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    same(answer.choices[0].message.content, SUNNY)


def strict_tools():
    made = client.chat.completions.parse(model=MODEL, messages=said(ASKED), tools=[STRICT]).choices[0].message
    same(made.tool_calls[0].function.parsed_arguments, GetWeather(city="Oslo"))


def tools_and_format():
    made = client.chat.completions.parse(
        model=MODEL, messages=said(PERSON), tools=[STRICT], response_format=Person, parallel_tool_calls=False
    )
    same(made.choices[0].message.parsed, Person(**ANNA))


def picture():
    parts = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": COLOR}]
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    has(answer.choices[0].message.content, "is red.")


def responses():
    same(client.responses.create(model=MODEL, input=SORT).output_text, SORTED)
    same(client.responses.parse(model=MODEL, input=PERSON, text_format=Person).output_parsed, Person(**ANNA))
    with client.responses.stream(model=MODEL, input=SORT) as events:
        same(events.get_final_response().output_text, SORTED)


def responses_tools():
    tool = {"type": "function", **WEATHER, "strict": True}
    tool["parameters"] = {**WEATHER["parameters"], "additionalProperties": False}
    first = client.responses.create(
        model=MODEL, input=ASKED, tools=[tool], include=["reasoning.encrypted_content"], reasoning={"summary": "auto"}
    )
    call = next(one for one in first.output if one.type == "function_call")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(model=MODEL, input=[*said(ASKED), *first.output, result], tools=[tool])
    same(second.output_text, SUNNY)


def completions():
    answer = client.completions.create(model=MODEL, prompt="def add(a, b):\n    return a ", suffix=" b", max_tokens=16)
    same(answer.choices[0].text.strip(), "+")


run(chat, stream, structured, tools, strict_tools, tools_and_format, picture, responses, responses_tools, completions)
