"""Answers in every mode and verb, to be compared between numbers of ranks."""

import warnings
from typing import Any

from support import RED, square

from mlx_dgemma.engine import Engine

PERSON = "Write JSON for: Anna is 31 years old and lives in Oslo."
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
SUM, STORY = "What is 3 + 4?", "Write a story"
FEW = {"seed": 3, "max_tokens": 24}


def answers(engine: Engine) -> dict[str, Any]:
    """Tokens, texts and probabilities by what was asked."""
    found: dict[str, Any] = {}
    for name, options in {
        "default": {},
        "narrow": {"canvas": "auto", "max_tokens": 8},
        "fast": {"fast": True},
        "exact": {"exact": True, "max_denoising_steps": 4},
        "causal": {"mode": "causal", "temperature": 0.7},
        "speculative": {"mode": "speculative", "temperature": 0},
        "schema": {"schema": SCHEMA},
    }.items():
        made = engine.generate(PERSON if name == "schema" else SUM, **{**FEW, **options})
        found[name] = made.tokens
        found[f"{name} steps"] = [made.stats.denoising_steps, made.stats.canvas_positions]
    found["picture"] = engine.generate("What colour is it?", images=[square(RED)], **FEW).tokens
    found["batch"] = [one.tokens for one in engine.generate_batch([SUM, STORY], seeds=[1, 2], max_tokens=24)]
    session = engine.session()
    for turn in (SUM, "And 5 + 4?"):
        found[f"turn {turn}"] = engine.generate(turn, session=session, **FEW).tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["infill"] = engine.infill("The number 3 + 4 is ", ".", length=3, seed=0).tokens
        found["edit"] = engine.edit("The cat is red.", "Make it blue", seed=0).text
    found["choose"] = {str(key): round(value, 4) for key, value in engine.choose(SUM, ["7", "8"]).items()}
    return found
