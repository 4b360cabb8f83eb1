"""The demo in float32 against outputs of Transformers, a small part of those that the tests use.

`bench/references.py` makes the file, whose arrays are named by case: what is fed in, and `logits` at `logits.positions`
and `logits.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from ..decoding import sampler
from ..model.diffusion_gemma import DiffusionGemma
from ..model.functions import entropy
from ..prompt.images import patchify
from .lines import Line, attempt, judged

FILE = Path(__file__).parent / "references.safetensors"
BOUND = 1e-4  # of logits, and of entropies in nats
TEMPERATURE = 0.8  # of the logits that a case is conditioned on
STEPS, T_MIN, T_MAX, ENTROPY_BOUND, STABILITY, CONFIDENCE = 48, 0.4, 0.8, 0.1, 1, 0.005  # of the trajectory's sampler
Arrays = dict[str, mx.array]


def lines(model: DiffusionGemma) -> Iterator[Line]:
    """The lines of this section.

    Args:
        model: the demo in float32.
    """
    held = read()
    for case in ("short", "long", "two_blocks", "image"):
        yield attempt(f"logits, {case.replace('_', ' ')}", partial(_logits, model, held, case))
    yield attempt("trajectory", lambda: _trajectory(model, _of(held, "trajectory")))
    yield attempt("causal tokens", lambda: _causal(model, held))


def read() -> Arrays:
    """The file's arrays; integers as int32."""
    held = mx.load(str(FILE))
    assert isinstance(held, dict)
    return {name: a.astype(mx.int32) if a.dtype == mx.int16 else a for name, a in held.items()}


def _of(held: Arrays, case: str) -> Arrays:
    return {name.removeprefix(f"{case}."): a for name, a in held.items() if name.startswith(f"{case}.")}


def _logits(model: DiffusionGemma, held: Arrays, case: str) -> Line:
    """Logits of a canvas behind a prompt, and once more conditioned on themselves where the reference has that."""
    one = _of(held, case)
    prefix, images = model.new_prefix(), None
    if "png" in one:
        cut = patchify([Image.open(BytesIO(bytes(np.asarray(one["png"])))).convert("RGB")], 70)
        images = mx.array(cut.patches), mx.array(cut.positions)
    model.encode(one["input_ids"], prefix, images=images)
    if "committed" in one:
        model.encode(one["committed"], prefix)
    made = model.logits(model.denoise(one["canvas"], prefix))
    errors = {"logits": _error(made, one, "logits")}
    if "logits_conditioned" in one:
        conditioning = model.condition(made / TEMPERATURE)
        again = model.logits(model.denoise(one["canvas"], prefix, conditioning))
        errors["conditioned"] = _error(again, one, "logits_conditioned")
    worst = max(errors.values())
    says = f"off by {worst:.1e}, allowed {BOUND:.0e}"
    return judged(f"logits, {case.replace('_', ' ')}", worst < BOUND, says, errors=errors)


def _error(made: mx.array, one: Arrays, name: str) -> float:
    """The largest difference at the positions and tokens that the reference holds; infinite where one is no number."""
    part = made[0][one[f"{name}.positions"]][:, one[f"{name}.tokens"]]
    error = float(np.abs(np.asarray(part) - np.asarray(one[name])).max())
    return error if np.isfinite(error) else float("inf")


def _trajectory(model: DiffusionGemma, held: Arrays) -> Line:
    """Every step of a generation of two blocks: argmax, acceptance, entropy and stop, from the reference's canvases."""
    wanted = {name: np.asarray(array) for name, array in held.items()}
    prefix = model.new_prefix()
    model.encode(held["input_ids"], prefix)
    conditioning, worst = None, 0.0
    earlier: list[mx.array] = []
    different = {"tokens": 0, "accepted": 0, "stops": 0}
    steps = len(wanted["cur_step"])
    for row in range(steps):
        if prefix.offset < wanted["prefix_length"][row]:
            model.encode(held["sequence"][:, prefix.offset : int(wanted["prefix_length"][row])], prefix)
            conditioning, earlier = None, []
        t = sampler.temperature(int(wanted["cur_step"][row]), STEPS, T_MIN, T_MAX)
        processed = model.logits(model.denoise(held["canvas_in"][row : row + 1], prefix, conditioning)) / t
        best, uncertainty = mx.argmax(processed, axis=-1), entropy(processed)
        accepted = sampler.accept(uncertainty, ENTROPY_BOUND)
        stop = sampler.settled(best, earlier, uncertainty, STABILITY, CONFIDENCE).item()
        different["tokens"] += int((np.asarray(best)[0] != wanted["argmax"][row]).sum())
        different["accepted"] += int((np.asarray(accepted)[0] != wanted["accepted"][row]).sum())
        different["stops"] += int(stop != wanted["finished"][row])
        worst = max(worst, float(np.abs(np.asarray(uncertainty)[0] - wanted["entropy"][row]).max()))
        conditioning, earlier = model.condition(processed), [best]
    blocks = wanted["argmax"][wanted["finished"]].flatten()
    same = np.array_equal(blocks, wanted["sequence"][0, wanted["input_ids"].shape[1] :])
    good = same and not any(different.values()) and worst < BOUND
    count = ", ".join(f"{number} {name}" for name, number in different.items())
    says = f"{steps} steps: {count} differ; entropy off by {worst:.1e}, allowed {BOUND:.0e}"
    return judged("trajectory", good, says, steps=steps, entropy_error=worst, **different)


def _causal(model: DiffusionGemma, held: Arrays) -> Line:
    """Greedy decoding by the encoder alone: each token is the argmax behind the ones before it."""
    cases = sorted(name.removesuffix(".prompt") for name in held if name.endswith(".prompt"))
    wrong = total = 0
    for case in cases:
        prompt, tokens = held[f"{case}.prompt"], held[f"{case}.tokens"]
        states = model.encode(mx.concatenate([prompt, tokens])[None, :-1], model.new_prefix())
        best = mx.argmax(model.logits(states[:, prompt.size - 1 :])[0], axis=-1)
        wrong += int((np.asarray(best) != np.asarray(tokens)).sum())
        total += tokens.size
    says = f"{wrong} of {total} tokens of {len(cases)} prompts differ"
    return judged("causal tokens", wrong == 0, says, wrong=wrong, tokens=total)
