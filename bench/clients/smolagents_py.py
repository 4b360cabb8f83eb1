"""smolagents: its model, streamed and with tools, and ToolCallingAgent to its final answer."""

import json

from checks import KEY, MODEL, SORT, SORTED, URL, run, same
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

model = OpenAIServerModel(model_id=MODEL, api_base=f"{URL}/v1", api_key=KEY)


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city.
    """
    return "sunny"


def said(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def chat():
    same(model(said(SORT)).content, SORTED)
    same("".join(one.content or "" for one in model.generate_stream(said(SORT))), SORTED)


def stop_sequences():
    same(model(said(SORT), stop_sequences=["Observation:", "Calling tools:"]).content, SORTED)


def required_call():
    """A call that must be is written as JSON, which the demo has not learned: what city it names is its own."""
    made = model(
        said("What is the weather in Oslo?"), tools_to_call_from=[get_weather], stop_sequences=["Observation:"]
    )
    call = made.tool_calls[0].function
    same((call.name, [*json.loads(call.arguments)]), ("get_weather", ["city"]))


def tool_calling_agent():
    """The only tool is final_answer, which the agent brings: what it calls ends the run."""
    agent = ToolCallingAgent(tools=[], model=model, max_steps=3, verbosity_level=0)
    result = agent.run(SORT, return_full_result=True)
    same(result.state, "success")


run(chat, stop_sequences, required_call, tool_calling_agent)
