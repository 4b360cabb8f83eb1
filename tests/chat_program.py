"""`mlx-dgemma chat` with an echo in the model's place, for tests that type on a terminal.

    python tests/chat_program.py [--readline]

Answers are Markdown with the turn and what goes with it, so that a screen shows what arrived. Turns that hold "fail"
are refused, and of those with "wait" the second block comes after minutes. --readline hides prompt_toolkit.
"""

import json
import sys
import time
from types import SimpleNamespace

from mlx_dgemma.cli import chat_input
from mlx_dgemma.cli.commands.chat import chat
from mlx_dgemma.cli.common import ModelChoice
from mlx_dgemma.decoding.events import Block, Finished, Result, Stats
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.errors import PromptError
from mlx_dgemma.prompt.images import open_image


def stream(messages, *, drafts, system, session, **options):
    content = messages[-1]["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if "fail" in parts[-1]["text"]:
        raise PromptError("The echo is told to fail.")
    kinds = " ".join(part["type"] for part in parts)
    text = f"# Turn {len(messages) // 2 + 1}: {kinds}\n`{json.dumps(parts[-1]['text'], ensure_ascii=False)}`\n"
    yield Block(0, 1, (), text)
    if "wait" in parts[-1]["text"]:
        time.sleep(300)
    told = f"system {system}" if system else "**no** system"
    yield Block(1, 1, (), told)
    stats = Stats(1, 0, 1, 1, 1, 1, {"total": 1.0}, 1.0, 1.0, 1, 0)
    yield Finished(Result(text + told, "", [], [], "stop", stats))


def load(self, terminal, opened=None):
    builder = SimpleNamespace(load_image=lambda path, budget: open_image(path))
    return SimpleNamespace(options=GenerationOptions(), session=lambda: None, builder=builder, stream=stream)


if __name__ == "__main__":
    ModelChoice.load, ModelChoice.open = load, lambda self, terminal: SimpleNamespace(options=GenerationOptions())
    if "--readline" in sys.argv:
        chat_input.find_spec = lambda name: None
    chat.main(args=["-m", "echo"], prog_name="mlx-dgemma chat")
