"""Makes the reference of `mlx-dgemma check` out of the tests' outputs of Transformers.

    python bench/references.py            # writes mlx_dgemma/check/references.safetensors
    python bench/references.py --check    # exits with 1 where it is out of date

Of each case it keeps what is fed in, and logits at a few positions and tokens; of the trajectory every step; of causal
decoding every token. `tests/data/README.md` says how Transformers made them.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from mlx_dgemma.check.references import FILE

DATA = Path(__file__).parent.parent / "tests" / "data"
POSITIONS, TOKENS = 4, 256  # of the logits of a case, evenly spread
STEPS = ("cur_step", "prefix_length", "canvas_in", "argmax", "accepted", "entropy", "finished", "sequence", "input_ids")


def made() -> dict[str, np.ndarray]:
    """The arrays of the file by name: case, a dot, and what they are."""
    found = {}
    for name in ("short", "long", "two_blocks", "image"):
        held = load_file(DATA / f"{name}.safetensors")
        for one in ("input_ids", "canvas", "committed"):
            if one in held:
                found[f"{name}.{one}"] = held[one].astype(np.int16)
        stride = 1 if name in ("short", "long") else 4  # the others hold every fourth position
        for one, spaced in (("logits", stride), ("logits_conditioned", 4)):
            if one not in held:
                continue
            logits = held[one][0]
            rows = np.linspace(0, len(logits) - 1, POSITIONS).astype(np.int16)
            tokens = np.linspace(0, logits.shape[1] - 1, TOKENS).astype(np.int16)
            found[f"{name}.{one}"] = logits[rows][:, tokens]
            found[f"{name}.{one}.positions"], found[f"{name}.{one}.tokens"] = rows * np.int16(spaced), tokens
    found["image.png"] = np.frombuffer((DATA / "image_0.png").read_bytes(), np.uint8)
    steps = load_file(DATA / "trajectory.safetensors")
    for one in STEPS:
        array = steps[one]
        found[f"trajectory.{one}"] = array.astype(np.int16) if array.dtype == np.int32 else array
    for number, case in enumerate(json.loads((DATA / "causal.json").read_text())):
        found[f"causal.{number:02}.prompt"] = np.array(case["prompt_ids"], np.int16)
        found[f"causal.{number:02}.tokens"] = np.array(case["tokens"], np.int16)
    return found


def content() -> bytes:
    """The file's bytes."""
    return save({name: np.ascontiguousarray(array) for name, array in sorted(made().items())})


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        FILE.write_bytes(content())
    elif FILE.read_bytes() != content():
        sys.exit(f"{FILE.name} is out of date; run python bench/references.py")
