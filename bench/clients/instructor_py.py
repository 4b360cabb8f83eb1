"""instructor: models out of text by tools, by JSON schema, and in pieces."""

import instructor
import openai
from checks import ANNA, KEY, MODEL, PERSON, URL, run, same
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


def asked(mode):
    patched = instructor.from_openai(client, mode=mode)
    options = {"model": MODEL, "messages": [{"role": "user", "content": PERSON}], "response_model": Person}
    same(patched.create(max_retries=1, **options).model_dump(), ANNA)


def json_schema():
    asked(instructor.Mode.JSON_SCHEMA)


def tools():
    asked(instructor.Mode.TOOLS)


def strict_tools():
    asked(instructor.Mode.TOOLS_STRICT)


def partial():
    patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    pieces = patched.create_partial(
        model=MODEL, messages=[{"role": "user", "content": PERSON}], response_model=Person, max_retries=1
    )
    same([*pieces][-1].model_dump(), ANNA)


run(json_schema, tools, strict_tools, partial)
