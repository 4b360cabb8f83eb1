"""The prompts whose answers a search looks at: the user's, or a small set of common tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_dgemma.errors import DataError, PromptError
from mlx_dgemma.prompt.messages import messages_of
from mlx_dgemma.prompt.template import render

BUNDLED = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and two tests.",
    "Translate into French: The train leaves at half past nine, and we still have to buy tickets.",
    "A shop sells pens at 3 for 2 euros. What do 12 pens and a notebook of 4.50 euros cost? Think step by step.",
    "Summarise the plot of Romeo and Juliet in one paragraph.",
    "List five European capitals with their countries as a JSON array of objects.",
    "Explain to a ten-year-old what a black hole is.",
    "Tell me a short story about a fox that learns to swim.",
    "What does this SQL do, and how would you speed it up? SELECT * FROM orders WHERE YEAR(created) = 2024;",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday afternoon.",
    "Schreibe ein kurzes Gedicht über den Herbst.",
    "Compare TCP and UDP in a table with three rows.",
)


def bundled(tokenizer: Any) -> list[list[int]]:
    """Token ids of the bundled prompts."""
    return [render(tokenizer, messages_of(text)) for text in BUNDLED]


def read(tokenizer: Any, file: str | Path) -> list[list[int]]:
    """Token ids of a user's prompts.

    Args:
        tokenizer: with the chat template.
        file: a .jsonl file with `prompt` or `messages` in every line; of any other file each line is a prompt.

    Raises:
        DataError: the file or a line cannot be used.
    """
    path, found = Path(file).expanduser(), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a text file with one prompt a line.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(render(tokenizer, messages_of(_asked(line) if path.suffix == ".jsonl" else line)))
        except (ValueError, KeyError, TypeError, PromptError) as error:
            raise DataError(f"{path.name}, line {number}: no prompt could be read ({error}); mend it.") from None
    if not found:
        raise DataError(f"{path.name} contains no prompts; write one a line.")
    return found


def _asked(line: str) -> Any:
    """The conversation of a record, without the answer that it may end with."""
    record = json.loads(line)
    if "messages" not in record:
        return record["prompt"]
    messages = record["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
