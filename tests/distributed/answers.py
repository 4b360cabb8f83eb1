"""Answers in every mode and verb, to be compared between numbers of ranks."""

import warnings
from typing import Any

from support import RED, square

from mlx_dgemma.engine import Engine

PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
SUM, STORY = "What is 3 + 4?", "Write a story"
FEW = {"seed": 3, "max_tokens": 12, "max_denoising_steps": 2}


def few_answers(engine: Engine) -> dict[str, Any]:
    """Tokens of a canvas, of text token by token, and of drafts that are verified."""
    return {
        "default": engine.generate(SUM, **FEW).tokens,
        "speculative": engine.generate(SUM, mode="speculative", temperature=0, seed=3, max_tokens=12).tokens,
    }


def answers(engine: Engine) -> dict[str, Any]:
    """Tokens, texts and probabilities by what was asked."""
    found: dict[str, Any] = few_answers(engine)
    for name, options in {
        "fast": {"fast": True},
        "exact": {"exact": True, "max_denoising_steps": 2},
        "causal": {"mode": "causal", "temperature": 0.7, "max_denoising_steps": None},
        "schema": {"schema": SCHEMA},
    }.items():
        given = {key: value for key, value in {**FEW, **options}.items() if value is not None}
        made = engine.generate(PERSON if name == "schema" else SUM, **given)
        found[name] = made.tokens
        found[f"{name} steps"] = [made.stats.denoising_steps, made.stats.canvas_positions]
    found["picture"] = engine.generate("What colour is it?", images=[square(RED)], **FEW).tokens
    few = {name: value for name, value in FEW.items() if name != "seed"}
    found["batch"] = [one.tokens for one in engine.generate_batch([SUM, STORY], seeds=[1, 2], **few)]
    session = engine.session()
    for turn in (SUM, "And 5 + 4?"):
        found[f"turn {turn}"] = engine.generate(turn, session=session, **FEW).tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["infill"] = engine.infill("The number 3 + 4 is ", ".", length=3, seed=0).tokens
    found["choose"] = {str(key): round(value, 4) for key, value in engine.choose(SUM, ["7", "8"]).items()}
    return found
