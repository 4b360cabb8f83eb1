"""guidance: text and JSON by a schema, through its OpenAI model."""

import json

import guidance
from checks import ANNA, KEY, MODEL, PERSON, PERSON_SCHEMA, SORT, SORTED, URL, run, same

model = guidance.models.OpenAI(MODEL, api_key=KEY, base_url=f"{URL}/v1")


def asked(text, grammar):
    lm = model
    with guidance.user():
        lm += text
    with guidance.assistant():
        lm += grammar
    return lm["answer"]


def text():
    same(asked(SORT, guidance.gen("answer")), SORTED)


def structured():
    same(json.loads(asked(PERSON, guidance.json("answer", schema=PERSON_SCHEMA))), ANNA)


run(text, structured)
