"""pydantic-ai: text, streams, models, tools with its own strict schemas, instructions beside a system prompt."""

from checks import ANNA, ASKED, KEY, MODEL, PERSON, SORT, SORTED, SUNNY, URL, run, same
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
CHAT, RESPONSES = (kind(MODEL, provider=provider) for kind in (OpenAIChatModel, OpenAIResponsesModel))


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city.
    """
    return "sunny"


async def text():
    for model in (CHAT, RESPONSES):
        same((await Agent(model).run(SORT)).output, SORTED)


async def stream():
    async with Agent(CHAT).run_stream(SORT) as result:
        same([one async for one in result.stream_text()][-1], SORTED)


async def output_type():
    same((await Agent(CHAT, output_type=Person).run(PERSON)).output, Person(**ANNA))


async def native_output():
    for model in (CHAT, RESPONSES):
        same((await Agent(model, output_type=NativeOutput(Person)).run(PERSON)).output, Person(**ANNA))


async def tools():
    for model in (CHAT, RESPONSES):
        same((await Agent(model, tools=[get_weather]).run(ASKED)).output, SUNNY)


async def two_system_texts():
    agent = Agent(CHAT, system_prompt="Answer in uppercase.", instructions="Answer in uppercase.")
    same((await agent.run("What is the capital of Italy?")).output.upper(), "THE CAPITAL OF ITALY IS ROME.")


run(text, stream, output_type, native_output, tools, two_system_texts)
