"""A canvas's pass by traces of its layers and without them: its time, the host's part of it, and whether bits differ.

`step.py --trace off on` and `parallel.py --trace off on` time whole steps both ways and call this.
"""

import time

import mlx.core as mx
import numpy as np
from report import show, spread

from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

CHOICES = ["off", "on"]
HELP = "time steps without layers' traces or with them (default: as the model is loaded)"


def use(model: DiffusionGemma, choice: str | None) -> None:
    """Let a model replay traces of its layers, or not; None leaves it as it is."""
    if choice is not None:
        model.layer_traces = None
        if choice == "on":
            model.trace_layers()


def compare(model: DiffusionGemma, prompt: mx.array, count: int = 8) -> dict:
    """Some passes over a canvas each way, one after the other; what the device has to do in them is the same.

    Returns:
        For "off" and "on": `build_ms`, what the host takes to build a pass; `pass_ms`, until its states are there;
        `first_ms`, to build the first one, which makes the traces. And whether the states are equal in every bit.
    """
    length = model.config.canvas_length
    prefix = model.new_prefix(capacity=prompt.shape[1] + length)
    prefill(model, prefix, np.asarray(prompt), None)
    canvas = mx.random.randint(0, min(model.config.text.vocab_size, 255_000), (1, length), key=mx.random.key(3))
    state = mx.random.normal((1, length, model.config.text.hidden_size), key=mx.random.key(4)).astype(model.dtype)
    mx.eval(model.denoise(canvas, prefix, state), prefix.state)  # makes room for the canvas
    found, states = {}, {}
    before = model.layer_traces
    for choice in CHOICES:
        use(model, choice)
        builds, passes = [], []
        for _ in range(count + 1):
            began = time.perf_counter()
            hidden = model.denoise(canvas, prefix, state)
            builds.append(1e3 * (time.perf_counter() - began))
            mx.eval(hidden, prefix.state)
            passes.append(1e3 * (time.perf_counter() - began))
        states[choice] = hidden
        found[choice] = {
            "first_ms": round(builds[0], 2), "build_ms": spread(builds[1:]), "pass_ms": spread(passes[1:]),
        }  # fmt: skip
    model.layer_traces = before
    found["equal"] = mx.array_equal(states["off"], states["on"]).item()
    return found


def told(found: dict) -> str:
    """What `compare` returned, in a line."""
    parts = [
        f"{name}: build {show(one['build_ms'], 2)} ms (first {one['first_ms']}), pass {show(one['pass_ms'], 2)} ms"
        for name, one in ((choice, found[choice]) for choice in CHOICES)
    ]
    return f"layers' traces {'; '.join(parts)}; bits {'equal' if found['equal'] else 'DIFFER'}"
