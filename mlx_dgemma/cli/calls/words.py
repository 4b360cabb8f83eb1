"""The words of `mlx-dgemma generate` as scripts write them, read without click, whose import takes longer than a call.

What is not as expected, wrong or merely rare, is left to click, which knows every rule and tells every mistake. A test
holds this table against click's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from ...distributed import VARIABLES

TYPE_CHECKING = False  # as typing's
if TYPE_CHECKING:
    from typing import Any

# An option's name and what it takes: a number's lower bound, the words to choose from, a flag's value, or a kind of
# text. Counts are integers and their bounds, too.
OPTIONS: dict[str, tuple[str, Any]] = {
    "-f": ("files", "files"),
    "--file": ("files", "files"),
    "-v": ("verbose", True),
    "--verbose": ("verbose", True),
    "--json": ("as_json", True),
    "--regex": ("regex", "text"),
    "-m": ("model", "text"),
    "--model": ("model", "text"),
    "--adapter": ("adapter", "text"),
    "--dtype": ("dtype", ("float32", "bfloat16", "float16")),
    "--compute-dtype": ("compute_dtype", ("float16",)),
    "--kv-bits": ("kv_bits", ("8", "4")),
    "--low-memory": ("low_memory", True),
    "--ignore-memory": ("ignore_memory", True),
    "--system": ("system", "text"),
    "--seed": ("seed", 0),
    "--max-tokens": ("max_tokens", 1),
    "--thinking": ("thinking", True),
    "--no-thinking": ("thinking", False),
    "--thinking-budget": ("thinking_budget", 0),
    "--stop": ("stop", "texts"),
    "--exact": ("exact", True),
    "--image-tokens": ("image_tokens", 1),
    "--fps": ("fps", 0.0),
    "--max-frames": ("max_frames", 1),
    "--max-denoising-steps": ("max_denoising_steps", 1),
    "--entropy-bound": ("entropy_bound", 0.0),
    "--entropy-rise": ("entropy_rise", 0.0),
    "--t-min": ("t_min", 0.0),
    "--t-max": ("t_max", 0.0),
    "--stability-threshold": ("stability_threshold", 0),
    "--confidence-threshold": ("confidence_threshold", 0.0),
    "--certainty-threshold": ("certainty_threshold", 0.0),
    "--patience": ("patience", 0),
    "--effort": ("effort", ("low", "medium", "high")),
    "--fast": ("fast", True),
    "--mode": ("mode", ("diffusion", "causal", "speculative", "auto")),
    "--temperature": ("temperature", 0.0),
    "--top-p": ("top_p", 0.0),
    "--top-k": ("top_k", 0),
    "--min-p": ("min_p", 0.0),
    "--repetition-penalty": ("repetition_penalty", 0.0),
    "--prefill-chunk": ("prefill_chunk", 1),
}
FOR_CLICK = (  # options of `generate` that are not read here
    *("--image", "--video", "--audio", "--audio-model", "--tools", "--schema", "--output", "--copy"),
    *("--no-server", "--canvas"),
)
# Variables under which click does something else: several ranks, no server, completion by Tab.
ELSEWHERE = (*VARIABLES, "MLX_DGEMMA_NO_SERVER", "_MLX_DGEMMA_COMPLETE")


class Unknown(Exception):
    """Words that are for click."""


class Words:
    """What a command line gives.

    Attributes:
        prompt: the argument, or None.
        model: -m or its variable; None: neither.
        options: what an engine's verb takes, as `explicit_options` gives them.
        files, system, regex, as_json, verbose: the options of these names.
        adapter, dtype, compute_dtype, kv_bits: they find the server.
    """

    def __init__(self, given: dict[str, Any], environment: Mapping[str, str]):
        self.prompt: str | None = given.pop("prompt", None)
        self.model: str | None = given.pop("model", None) or environment.get("MLX_DGEMMA_MODEL") or None
        self.files: list[str] = given.pop("files", [])
        self.system, self.regex = given.pop("system", None), given.pop("regex", None)
        self.as_json, self.verbose = given.pop("as_json", False), given.pop("verbose", False)
        self.adapter, self.dtype = given.pop("adapter", None), given.pop("dtype", None)
        self.compute_dtype, self.kv_bits = given.pop("compute_dtype", None), given.pop("kv_bits", None)
        for name in ("low_memory", "ignore_memory"):  # they matter where a model is loaded
            given.pop(name, None)
        stop = {"stop": tuple(given.pop("stop"))} if "stop" in given else {}
        self.options: dict[str, Any] = {"thinking": False, **given, **stop}


def read_words(arguments: Sequence[str], environment: Mapping[str, str]) -> Words | None:
    """Read a command line; None: it is for click.

    Args:
        arguments: those of the program.
        environment: its variables.
    """
    if arguments[:1] != ["generate"] or any(name in environment for name in ELSEWHERE):
        return None
    given: dict[str, Any] = {}
    rest = list(reversed(arguments[1:]))
    try:
        while rest:
            word = rest.pop()
            if word[:1] != "-" or word == "-":
                _take_prompt(given, word)
            elif word == "--":
                while rest:
                    _take_prompt(given, rest.pop())
            else:
                _take_option(given, word, rest)
    except Unknown:
        return None
    if [*given.get("files", ()), given.get("prompt")].count("-") > 1:
        return None
    return Words(given, environment)


def _take_prompt(given: dict[str, Any], word: str) -> None:
    if "prompt" in given:
        raise Unknown
    given["prompt"] = _text(word)


def _take_option(given: dict[str, Any], word: str, rest: list[str]) -> None:
    flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
    name, kind = OPTIONS.get(flag, ("", None))
    if kind is None or (isinstance(kind, bool) and equals):
        raise Unknown
    if isinstance(kind, bool):
        given[name] = kind
        return
    if not equals:
        value = rest.pop() if rest else "-?"
        if value[:1] == "-" and value != "-":  # a missing value, perhaps
            raise Unknown
    if kind in ("files", "texts"):
        given.setdefault(name, []).append(_file(value) if kind == "files" else _text(value))
    elif kind == "text":
        given[name] = _text(value)
    elif isinstance(kind, tuple):
        given[name] = _one_of(value, kind)
    else:
        given[name] = _number(value, kind)


def _text(value: str) -> str:
    if not value or not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8
            raise Unknown from None
    return value


def _file(value: str) -> str:
    if value != "-" and not (os.path.isfile(value) and os.access(value, os.R_OK)):
        raise Unknown
    return value


def _one_of(value: str, words: tuple[str, ...]) -> str:
    if value not in words:
        raise Unknown
    return value


def _number(value: str, least: float) -> float:
    try:
        number = int(value) if isinstance(least, int) and value.isascii() and value.isdecimal() else float(value)
    except ValueError:
        raise Unknown from None
    if not isinstance(number, type(least)) or not math.isfinite(number) or number < least:
        raise Unknown
    return number
