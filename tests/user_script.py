"""A user's script for mypy, not for pytest: `mypy --strict` accepts it only while the marked lines are refused."""

from typing_extensions import assert_type

import mlx_dgemma
from mlx_dgemma import Block, Draft, Engine, Finished, Session
from mlx_dgemma.convert import Report, convert

engine = mlx_dgemma.load("folder", dtype="float32")
assert_type(engine, Engine)
answer = engine.generate("hi", seed=0, max_tokens=5, max_denoising_steps=12, exact=True, system="Be short.")
assert_type(answer, mlx_dgemma.Result)
assert_type(answer.text, str)
assert_type(answer.tokens, list[int])

conversation: Session = engine.session()
for event in engine.stream([{"role": "user", "content": "hi"}], session=conversation, regex="[a-z]+"):
    if isinstance(event, Finished):
        print(event.result.text, event.result.stats.tokens_per_second)
    else:
        assert_type(event, Draft | Block)

engine.infill("a = ", "\n", length=3, seed=0)
engine.edit("The cat.", "Replace cat with dog.", strength=0.5)
engine.fill("Dear {name},", {"name": 20}, seed=0)
print(engine.choose("Which is larger, 51 or 23?", ["51", "23"], calibrate=True)["51"])
assert_type(convert("folder", "new", recipe="4bit"), Report)

mlx_dgemma.lode()  # type: ignore[attr-defined]
mlx_dgemma.load(dtype=16)  # type: ignore[arg-type]
engine.generate("hi", sed=0)  # type: ignore[call-arg]
engine.generate("hi", max_tokens="5")  # type: ignore[arg-type]
engine.stream("hi", sed=0)  # type: ignore[call-arg]
engine.stream("hi", max_denoising_steps="12")  # type: ignore[arg-type]
engine.infill("a = ", "\n", sed=0)  # type: ignore[call-arg]
engine.fill("Dear {name},", {"name": 20}, sed=0)  # type: ignore[call-arg]
engine.choose("Which?", ["a", "b"], sed=0)  # type: ignore[call-arg]
engine.edit("The cat.", "Replace cat with dog.", sed=0)  # type: ignore[call-arg]
convert("folder", "new", recipy="4bit")  # type: ignore[call-arg]
