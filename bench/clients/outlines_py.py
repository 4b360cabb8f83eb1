"""outlines: text and models with from_openai; choices, expressions and schemas with from_vllm."""

import json
import re
from typing import Literal

import openai
import outlines
from checks import ANNA, KEY, MODEL, PERSON, SORT, SORTED, URL, run, same
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
from_openai, from_vllm = outlines.from_openai(client, MODEL), outlines.from_vllm(client, MODEL)


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


def text():
    same(from_openai(SORT), SORTED)
    same("".join(from_openai.stream(SORT)), SORTED)
    same(from_vllm(SORT), SORTED)


def schema_by_openai():
    same(json.loads(from_openai(PERSON, Person)), ANNA)


def schema_by_vllm():
    same(json.loads(from_vllm(PERSON, Person)), ANNA)


def choice_by_vllm():
    same(from_vllm("Is 3 larger than 2?", Literal["yes", "no"]) in ("yes", "no"), True)


def expression_by_vllm():
    said = from_vllm("What is 23 + 45?", outlines.types.Regex(r"\d{1,3}"))
    same(bool(re.fullmatch(r"\d{1,3}", said)), True)


run(text, schema_by_openai, schema_by_vllm, choice_by_vllm, expression_by_vllm)
