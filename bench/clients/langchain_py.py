"""langchain's create_agent with tools and both strategies of structured output, and ChatOpenAI below it."""

from checks import ANNA, ASKED, COLOR, KEY, MODEL, PERSON, SORT, SORTED, SUNNY, URL, data_url, has, run, same
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


def said(text):
    return {"messages": [{"role": "user", "content": text}]}


def chat():
    same(model.invoke(SORT).content, SORTED)
    same("".join(one.content for one in model.stream(SORT)), SORTED)


def messages():
    capital = HumanMessage("What is the capital of Italy?", name="anna")
    turns = [SystemMessage("Answer in uppercase."), SystemMessage("Answer in uppercase."), capital]
    same(model.invoke(turns).content.upper(), "THE CAPITAL OF ITALY IS ROME.")


def picture():
    parts = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": COLOR}]
    has(model.invoke([HumanMessage(parts)]).content, "is red.")


def agent_with_tools():
    same(create_agent(model, tools=[get_weather]).invoke(said(ASKED))["messages"][-1].content, SUNNY)


def tool_strategy():
    agent = create_agent(model, tools=[], response_format=ToolStrategy(Person))
    same(agent.invoke(said(PERSON))["structured_response"], Person(**ANNA))


def provider_strategy():
    agent = create_agent(model, tools=[], response_format=ProviderStrategy(Person))
    same(agent.invoke(said(PERSON))["structured_response"], Person(**ANNA))


def provider_strategy_with_tools():
    agent = create_agent(model, tools=[get_weather], response_format=ProviderStrategy(Person))
    same(agent.invoke(said(PERSON))["structured_response"], Person(**ANNA))


run(chat, messages, picture, agent_with_tools, tool_strategy, provider_strategy, provider_strategy_with_tools)
