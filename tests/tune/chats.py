"""Chats and tools that the tests of data and evaluation share."""

import copy
from dataclasses import replace

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def templated(engine, template):
    """The same engine with another chat template."""
    wrapper = copy.copy(engine.tokenizer)
    object.__setattr__(wrapper, "_tokenizer", copy.copy(wrapper._tokenizer))
    wrapper._tokenizer.chat_template = template
    return replace(engine, tokenizer=wrapper)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def image(source):
    return {"type": "image", "image": str(source)}
