"""The corpus of schemas, as pydantic, zod and tool servers write them: which are taken, and whether answers are valid.

python bench/schemas.py                 # random texts of each schema's automaton
python bench/schemas.py --answers       # and an answer of the demo, after one step
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from pathlib import Path

import jsonschema

import mlx_dgemma
from mlx_dgemma.constraints.schema import translate

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS / "constraints"))
from automata import Automaton  # noqa: E402


def validator(schema: dict) -> jsonschema.protocols.Validator:
    """Of the draft that the schema names, with the formats that are installed: `pip install "jsonschema[format]"`."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", action="store_true", help="let the demo answer each schema, too")
    parser.add_argument("--texts", type=int, default=60, help="random texts of each schema")
    arguments = parser.parse_args()
    corpus = json.loads((TESTS / "data" / "schemas.json").read_text())
    engine = mlx_dgemma.load(dtype="float32") if arguments.answers else None
    warnings.simplefilter("ignore")
    texts = answers = wrong = 0
    slowest, largest = (0.0, ""), (0, "")
    for name, schema in corpus["taken"].items():
        began = time.process_time()
        automaton = Automaton(translate(schema).expression)
        slowest = max(slowest, (time.process_time() - began, name))
        largest = max(largest, (len(automaton.moves), name))
        check, source, found = validator(schema), random.Random(0), []
        for _ in range(arguments.texts):
            text = automaton.sample(source, source.choice([5, 40, 150, 400]))
            if automaton.matches(text):
                found.append(text)
        texts += len(found)
        if engine:
            result = engine.generate("Hi", schema=schema, seed=0, max_tokens=2000, max_denoising_steps=1)
            answers += 1
            found.append(result.text)
        for text in found:
            if error := next(check.iter_errors(json.loads(text)), None):
                wrong += 1
                print(f"{name}: {text[:200]!r} {error.message[:200]}")
    print(f"{len(corpus['taken'])} schemas taken, {len(corpus['refused'])} refused by name")
    print(f"{texts} random texts and {answers} answers, {wrong} of them invalid")
    print(f"at most {slowest[0]:.2f} s of processor time ({slowest[1]}) and {largest[0]} states ({largest[1]})")


if __name__ == "__main__":
    main()
