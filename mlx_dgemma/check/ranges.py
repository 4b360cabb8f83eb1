"""How large the numbers of a checkpoint's linear maps get: whether their products can be computed in float16.

Every linear map is watched while prompts are encoded and answered in the dtype that the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.float16 import DECODER, KINDS, LARGEST, SMALLEST, misfit
from ..engine import Engine
from ..errors import OptionError, count
from ..model.diffusion_gemma import DiffusionGemma
from ..model.head import SHARES
from ..upstream import QuantizedSwitchLinear, SwitchLinear

MARGIN = 4.0  # other prompts may lead to numbers so many times larger, or smaller
SHOWN = 5  # maps in the report
TABLE = f"{DECODER}embed_tokens"
ROWS = 16384  # of the embedding at once
PROMPTS = (
    "Write a story about a fox who learns to swim.",
    "Sort these numbers: 42, 7, 19, 88, 3, 61",
    "Write a Python function that merges two sorted lists, with a docstring and three tests.",
    'Write JSON for: Anna is 31 years old and lives in Oslo. Keys: "name", "age", "city".',
    "What is 28 + 15? Explain every step.",
    "Erkl\u00e4re in drei S\u00e4tzen, warum der Himmel blau ist, und \u00fcbersetze sie ins Japanische.",
    "\u8bf7\u7528\u4e2d\u6587\u5199\u4e00\u9996\u5173\u4e8e\u6708\u4eae\u7684\u77ed\u8bd7\u3002 \U0001f319\U0001f31f",
    "Summarise: " + "The harbour was quiet, the boats lay still, and nobody spoke of the storm. " * 24,
)
"""Prompts of several kinds of text: a story, digits, code, JSON, other languages, a long text."""


@dataclass(frozen=True)
class MapRange:
    """The largest absolute numbers that went into a linear map and came out of it; 0: it was never used.

    The embedding's are the head's input and its own largest number, the bound of an expected embedding.
    """

    name: str
    input: float
    output: float

    def fault(self) -> str | None:
        """Why float16 does not suit this map, or None."""
        for what, largest in (("takes", self.input), ("gives", self.output)):
            if not largest * MARGIN <= LARGEST:
                return f"{self.name} {what} {largest:.4g}, more than a quarter of float16's {LARGEST:.0f}"
            if 0 < largest < SMALLEST * MARGIN:
                return f"{self.name} {what} at most {largest:.3g}, where float16 is coarser than bfloat16"
        return None


@dataclass(frozen=True)
class Ranges:
    """What `audit` found.

    Attributes:
        model: the checkpoint's name.
        prompts: that were answered.
        steps: denoising steps that they took.
        maps: every linear map of the text stack, and the embedding.
        misfits: weights and scales that float16 cannot hold, a sentence's part each.
    """

    model: str
    prompts: int
    steps: int
    maps: tuple[MapRange, ...]
    misfits: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Why float16 does not suit the checkpoint; empty if it does."""
        return [*self.misfits, *(fault for one in self.maps if (fault := one.fault()))]

    @property
    def allowed(self) -> bool:
        """Whether products may be computed in float16."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "allowed": self.allowed, "faults": self.faults}

    def lines(self) -> list[str]:
        """The report: the largest numbers, and a verdict."""
        largest = sorted(self.maps, key=lambda one: -max(one.input, one.output))[:SHOWN]
        width = max(len(one.name) for one in largest)
        told = [
            f"{self.model}: {len(self.maps)} linear maps, "
            f"{count(self.prompts, 'prompt')}, {count(self.steps, 'denoising step')}",
            f"{'largest numbers':{width}}{'input':>12}{'output':>12}",
            *(f"{one.name:{width}}{one.input:>12.4g}{one.output:>12.4g}" for one in largest),
        ]
        if self.allowed:
            room = LARGEST / max(max(one.input, one.output) for one in self.maps)
            return [*told, f"float16 suits: numbers could be {room:.0f} times larger; use --compute-dtype float16"]
        return [*told, *(f"float16 does not suit: {fault}" for fault in self.faults)]


def audit(engine: Engine, prompts: Sequence[str] = PROMPTS, seed: int = 0, max_tokens: int = 256) -> Ranges:
    """Answer prompts and record the largest absolute input and output of every linear map.

    Args:
        engine: a loaded checkpoint, which is as before afterwards.
        prompts: texts.
        seed: of the answers.
        max_tokens: of an answer.

    Raises:
        OptionError: the engine computes in float16 itself, so larger numbers could not be seen.
        RangeError: the checkpoint computes inf or NaN in its own dtype.
    """
    if mx.float16 in (engine.model.dtype, engine.model.compute_dtype):
        raise OptionError("The model is loaded in float16, which hides larger numbers; load it without, to audit it.")
    decoder, steps = engine.model.model.decoder, 0
    modules: list[tuple[str, Any]] = [(DECODER + path, one) for path, one in decoder.named_modules()]
    misfits = [misfit(path, one) for path, one in modules if type(one) in KINDS]
    with _recording(engine.model) as seen:
        for prompt in prompts:
            steps += engine.generate(prompt, seed=seed, max_tokens=max_tokens).stats.denoising_steps
    head_input = seen.pop(f"{DECODER}norm")[1]
    table = MapRange(TABLE, head_input, _largest_embedding(decoder.embed_tokens))
    if table.output * SHARES > LARGEST:
        misfits.append(f"{TABLE} holds {table.output:.4g}, {SHARES:.0f} times which is beyond float16's {LARGEST:.0f}")
    maps = [*(MapRange(name, *pair) for name, pair in seen.items()), table]
    found = tuple(one for one in misfits if one)
    return Ranges(engine.checkpoint.path.name, len(prompts), steps, tuple(maps), found)


@contextmanager
def _recording(model: DiffusionGemma) -> Iterator[dict[str, list[float]]]:
    """Record [largest input, largest output] of the linear maps and of the final norm, by path."""
    seen: dict[str, list[float]] = {}
    changed: list[tuple[nn.Module, type]] = []
    watched = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    mx.disable_compile()  # a compiled function would not call its maps
    try:
        for path, module in model.model.decoder.named_modules():
            if isinstance(module, watched) or path == "norm":
                name = DECODER + path.removesuffix(".linear")  # inside an adapter
                seen[name] = [0.0, 0.0]
                changed.append((module, type(module)))
                module.__class__ = _recorder(type(module), seen[name])
        yield seen
    finally:
        mx.enable_compile()
        for module, kind in changed:
            module.__class__ = kind


def _recorder(kind: Any, largest: list[float]) -> type:
    """A subclass whose calls record the largest absolute numbers."""

    def call(self: nn.Module, x: mx.array, *others: Any, **options: Any) -> mx.array:
        y = kind.__call__(self, x, *others, **options)
        for i, array in enumerate((x, y)):
            here: Any = mx.abs(array).max()
            largest[i] = max(largest[i], here.item())  # now: a lazy one would keep a step's graph
        return y

    return type(kind.__name__, (kind,), {"__call__": call})


def _largest_embedding(table: Any) -> float:
    rows = table.weight.shape[0]
    parts: list[Any] = [
        mx.abs(table(mx.arange(start, min(start + ROWS, rows)))).max() for start in range(0, rows, ROWS)
    ]
    return max(part.item() for part in parts)
