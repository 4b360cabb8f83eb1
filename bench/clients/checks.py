"""What the scripts beside this one share: questions that the demo can answer, and the loop over a client's checks."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import sys
from collections.abc import Callable

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"  # of the server, without /v1
MODEL, KEY = "default", "none"
SORT, SORTED = "Sort these numbers: 42, 7, 19", "7, 19, 42"
SPELL, SPELLED = "Spell the word cat.", "c a t"
PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
ANNA = {"name": "Anna", "age": 31, "city": "Oslo"}
ASKED, SUNNY = "What is the weather in Oslo?", "The weather in Oslo is sunny."
COLOR = "What color is the shape?"
PERSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}},
        "required": ["city"],
    },
}
TRIES = 3  # most clients cannot send a seed, and the demo is not right with every one


def red_square() -> bytes:
    """A PNG of a red square."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (160, 160), (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((48, 48, 112, 112), fill=(220, 40, 40))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def data_url() -> str:
    """The red square as a data URL."""
    return "data:image/png;base64," + base64.b64encode(red_square()).decode()


def same(said: object, wanted: object) -> None:
    """Fail with both where an answer is another than wanted.

    Raises:
        AssertionError: it is.
    """
    if said != wanted:
        raise AssertionError(f"{said!r} instead of {wanted!r}")


def has(said: str | None, wanted: str) -> None:
    """Fail with both where an answer does not hold what is wanted.

    Raises:
        AssertionError: it does not.
    """
    if wanted not in (said or ""):
        raise AssertionError(f"{said!r} without {wanted!r}")


def run(*checks: Callable) -> None:
    """Run the checks one after the other and print their results as JSON: {name: "" or the sentence it failed with}.

    A check that gets a wrong answer is asked again, with another of the server's seeds; one that is refused is not.
    """
    results = {}
    for check in checks:
        name = check.__name__.replace("_", " ")
        for _ in range(TRIES):
            try:
                answer = check()
                if inspect.iscoroutine(answer):
                    asyncio.run(answer)
                results[name] = ""
            except Exception as error:  # whatever a client raises is its verdict
                results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if "Error code: 4" in results[name]:
                    break
            if not results[name]:
                break
    print(json.dumps(results))
