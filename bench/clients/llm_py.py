"""llm with a model of extra-openai-models.yaml: prompt, stream, schema, tool, conversation."""

import json
import os
import tempfile
from pathlib import Path

from checks import ANNA, ASKED, PERSON, PERSON_SCHEMA, SORT, SORTED, SPELL, SPELLED, SUNNY, URL, run, same

folder = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
(folder / "extra-openai-models.yaml").write_text(
    f"- {{model_id: dgemma-served, model_name: default, api_base: '{URL}/v1',\n"
    "   supports_schema: true, supports_tools: true}\n"
)
import llm  # noqa: E402

served = llm.get_model("dgemma-served")
served.key = "none"


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return "sunny"


def prompt():
    same(served.prompt(SORT, stream=False).text(), SORTED)


def stream():
    same("".join(served.prompt(SORT)), SORTED)


def structured():
    same(json.loads(served.prompt(PERSON, schema=PERSON_SCHEMA).text()), ANNA)


def tools():
    same("".join(served.chain(ASKED, tools=[get_weather])), SUNNY)


def conversation():
    talk = served.conversation()
    same(talk.prompt(SORT).text(), SORTED)
    same(talk.prompt(SPELL).text(), SPELLED)


run(prompt, stream, structured, tools, conversation)
