"""openai-agents: text, streams, function tools, handoffs, output_type, with chat completions and with responses."""

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    handoffs,
    set_tracing_disabled,
)
from agents.extensions import handoff_filters
from checks import ANNA, ASKED, KEY, MODEL, PERSON, SORT, SORTED, SUNNY, URL, run, same
from pydantic import BaseModel

set_tracing_disabled(True)


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


@function_tool
def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city.
    """
    return "sunny"


def models():
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    return [kind(model=MODEL, openai_client=client) for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel)]


async def text():
    for model in models():
        same((await Runner.run(Agent(name="sorter", model=model), SORT)).final_output, SORTED)


async def stream():
    for model in models():
        result = Runner.run_streamed(Agent(name="sorter", model=model), SORT)
        same(len([one async for one in result.stream_events()]) > 0, True)
        same(result.final_output, SORTED)


async def output_type():
    for model in models():
        same(
            (await Runner.run(Agent(name="writer", model=model, output_type=Person), PERSON)).final_output,
            Person(**ANNA),
        )


async def tools():
    for model in models():
        agent = Agent(name="weather", model=model, tools=[get_weather])
        same((await Runner.run(agent, ASKED)).final_output, SUNNY)


async def tools_and_output_type():
    for model in models():
        agent = Agent(name="writer", model=model, tools=[get_weather], output_type=Person)
        same((await Runner.run(agent, PERSON)).final_output, Person(**ANNA))


async def handoff():
    """The demo knows no handoffs: the first agent must call, and the second sees the question alone."""
    for model in models():
        second = Agent(name="sorter", model=model)
        passed_on = handoffs.handoff(second, input_filter=handoff_filters.remove_all_tools)
        first = Agent(
            name="desk", model=model, handoffs=[passed_on], model_settings=ModelSettings(tool_choice="required")
        )
        result = await Runner.run(first, SORT)
        same((result.last_agent.name, result.final_output), ("sorter", SORTED))


run(text, stream, output_type, tools, tools_and_output_type, handoff)
