"""Prompts that the demo answers, and texts around holes."""

import json

PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
ANSWER = '{"name": "Anna", "age": 31, "city": "Oslo"}'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
}
SUM = "What is 25 + 31?"
ADDING = "Write a Python function that adds two numbers left and right."
CODE = "def add(left, right):\n    return left + right"
LEO = "Tell a story about a cat named Leo."
STORY = "Once there was a cat named Leo. Leo lived in a meadow. One day Leo found a blue ball. The cat was happy."
ONCE = {"max_denoising_steps": 1}
TOOL = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}
SAW = "The cat saw a cat in the meadow."


def around(text, hole):
    prefix, _, suffix = text.partition(hole)
    assert prefix + hole + suffix == text
    return prefix, suffix


def count_of(engine, text):
    return len(engine.tokenizer.encode(text, add_special_tokens=False))


def is_person(text):
    value = json.loads(text)
    return list(value) == ["name", "age", "city"] and [type(one) for one in value.values()] == [str, int, str]
