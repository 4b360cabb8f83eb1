"""The reader of tool calls: 10,000 random calls, 10,000 damaged ones, and the time of 100,000 characters.

    python bench/reader.py --count 10000

Calls are written in the form of the release's template. Strings with quote markers are counted apart: as text they
cannot always be told from the notation. Prints a row per text and a last line of JSON.
"""

import argparse
import random
import re
import sys
import time
import warnings
from pathlib import Path

from report import finish, machine, table

import mlx_dgemma

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tool_calls import QUOTE, damaged, random_call, random_key, random_text, template_form, words_of

SIZE = 100_000
LONG = {
    "a call with a long string": f"<|tool_call>call:f{{a:{QUOTE}{'x, y: {z} ' * (SIZE // 10)}{QUOTE}}}<tool_call|>",
    "a call with many keys": "<|tool_call>call:f{" + ",".join(f"k{i}:{i}" for i in range(SIZE // 11)) + "}<tool_call|>",
    "text": "Some text here. " * (SIZE // 16),
    "text that begins calls": "call:f{" * (SIZE // 7),
    "markers": "<|tool_call>" * (SIZE // 12),
    "quotes": f"<|tool_call>call:f{{a:{QUOTE * (SIZE // 5)}}}<tool_call|>",
    "brackets": f"<|tool_call>call:f{{a:{'[' * (SIZE // 2)}{']' * (SIZE // 2)}}}<tool_call|>",
    "a thought": "<|channel>thought\n" + "hm call:f{a:1 " * (SIZE // 14),
}


def come_back(engine, count: int, quotes: bool) -> int:
    """How many calls are read as they were written."""
    chance, right = random.Random(0), 0
    for _ in range(count):
        name, arguments, text = random_call(chance)
        if quotes:
            letters = [*"ab ,:.", QUOTE]
            arguments = {random_key(chance): random_text(chance, letters) + QUOTE for _ in range(2)}
            text = f"<|tool_call>call:{name}{template_form(arguments)}<tool_call|>"
        answer = engine.read(text)
        calls = [(one["function"]["name"], one["function"]["arguments"]) for one in answer.tool_calls]
        right += calls == [(name, arguments)] and not answer.text
    return right


def keep_words(engine, count: int) -> int:
    """Of how many damaged calls every letter is in the text or in a call."""
    chance, right = random.Random(1), 0
    marker = re.compile("|".join(map(re.escape, [*engine.tokenizer.all_special_tokens, QUOTE])))
    for _ in range(count):
        text = damaged(chance, random_call(chance)[2])
        answer = engine.read(text)
        right += bool(answer.tool_calls) or words_of(answer.text) == words_of(marker.sub("", text))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    about = machine()
    engine = mlx_dgemma.load(dtype="float32")
    found = {
        "calls that come back": come_back(engine, options.count, quotes=False),
        "of those with quotes in strings": come_back(engine, options.count, quotes=True),
        "damaged calls of which nothing is lost": keep_words(engine, options.count),
    }
    seconds = {}
    for what, text in LONG.items():
        started = time.perf_counter()
        engine.read(text)
        seconds[what] = time.perf_counter() - started
    table(["", f"of {options.count}"], [[what, right] for what, right in found.items()])
    table([f"{SIZE} characters", "ms"], [[what, f"{one * 1000:.0f}"] for what, one in seconds.items()])
    finish("reader", **about, count=options.count, **found, seconds=seconds)


if __name__ == "__main__":
    main()
