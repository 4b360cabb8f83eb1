"""Random tool calls and the notation that the release's chat template writes for them, to test the reader with."""

import json
import random
from typing import Any

QUOTE = '<|"|>'
NAMES = (
    "f",
    "get_weather",
    "fs.read",
    "google:mcp:f",
    "a-b",
    "lobe-web-browsing____search",
    "x.y:z",
    "call",
    "callback",
)
LETTERS = [*"abcxyz ABC019 .,:;{}[]()<>|\"'\\/=\n\t-_$#é日🙂", "call:", "<|turn>", "<turn|>", "<|image|>", "true", "12"]
KEY_LETTERS = "abcXYZ019_-.$@ /éß日"


def template_form(value: Any) -> str:
    """A value as the release's template writes it: strings between markers, keys bare and sorted."""
    if isinstance(value, str):
        return QUOTE + value + QUOTE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        members = sorted(value.items(), key=lambda member: member[0].lower())
        return "{" + ",".join(f"{key}:{template_form(inner)}" for key, inner in members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(template_form, value)) + "]"
    return str(value)  # None is written as Python writes it


def random_text(chance: random.Random, letters=LETTERS, longest: int = 12) -> str:
    return "".join(chance.choice(letters) for _ in range(chance.randint(0, longest)))


def random_key(chance: random.Random) -> str:
    return random_text(chance, KEY_LETTERS, 10).strip() or "k"


def random_value(chance: random.Random, depth: int = 3) -> Any:
    kind = chance.random()
    if depth and kind < 0.35:
        count = chance.randint(0, 4)
        if kind < 0.2:
            return {random_key(chance): random_value(chance, depth - 1) for _ in range(count)}
        return [random_value(chance, depth - 1) for _ in range(count)]
    if kind < 0.7:
        return random_text(chance)
    return chance.choice([True, False, None, 0, -1, 12345678901234567890, 1.5, -2e-09, 1e22, 3.0])


def random_call(chance: random.Random) -> tuple[str, dict, str]:
    """A name, arguments, and the call between its markers."""
    name = chance.choice(NAMES)
    arguments = {random_key(chance): random_value(chance) for _ in range(chance.randint(0, 5))}
    return name, arguments, f"<|tool_call>call:{name}{template_form(arguments)}<tool_call|>"


def damaged(chance: random.Random, call: str) -> str:
    """A call from which something was cut out, or into which something was put."""
    at = chance.randrange(len(call))
    if chance.random() < 0.6:
        return call[:at] + call[at + chance.randint(1, 8) :]
    return (
        call[:at]
        + chance.choice(["{", "}", "[", QUOTE, '"', ",", ":", "<|tool_call>", "<pad>", "<tool_call|>"])
        + call[at:]
    )


def words_of(value: Any) -> str:
    """The letters and digits of everything in a value, sorted."""
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(sorted(filter(str.isalnum, told)))
