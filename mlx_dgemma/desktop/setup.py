"""The first run: which checkpoint and recipe fit this machine, and how the model comes to it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx

from ..check.paper import paper_step
from ..checkpoint import memory
from ..checkpoint.find import fetch
from ..checkpoint.folder import Checkpoint, read_generation
from ..checkpoint.headers import INDEX, read_tensors
from ..checkpoint.processor import read_processor
from ..convert.conversion import convert
from ..convert.jobs import source_quantization
from ..convert.recipes import RECIPES, Recipe, recipe_named
from ..errors import CheckpointError, DgemmaError, MemoryLimitError, OptionError, human
from ..model import device
from ..model.config import ModelConfig, read_json

RELEASE = "google/diffusiongemma-26B-A4B-it"
# What is proposed where the unquantized weights do not fit, best first.
RANKED = ("8bit", "mac-36gb", "6bit", "4bit", "mac-24gb", "3bit", "mac-16gb")
PREFIX = 1024  # positions behind which the paper model reckons a step
FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
HINT = "give a folder or a Hub id"
INTERRUPTED = "Interrupted. Files that are complete are kept; run the command again to go on."


@dataclass(frozen=True)
class Choice:
    """One way to store the weights: its bytes, those with a prefix and workspace of 4,096 tokens, and if they fit."""

    recipe: str | None  # None: as the source stores them
    weights: int
    total: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What there is to choose from for a checkpoint on this machine.

    Attributes:
        name: the Hub id or folder.
        choices: what fits best first; of a quantized checkpoint there is one.
        chosen: what is proposed, or what the user named.
        machine: the chip's name.
        available: bytes that MLX can have.
        step_ms: milliseconds of a denoising step by the paper model; None for a chip without one.
    """

    name: str
    choices: tuple[Choice, ...]
    chosen: Choice
    machine: str
    available: int
    step_ms: float | None

    @property
    def target(self) -> Path | None:
        """The folder of the converted checkpoint; None if nothing is converted."""
        if self.chosen.recipe is None:
            return None
        stem = "diffusiongemma" if self.name == RELEASE else Path(self.name).expanduser().name
        return Path.home() / "models" / f"{stem}-{self.chosen.recipe}"


def plan(name: str = RELEASE, recipe: str | None = None) -> Plan:
    """Look at this machine and at a checkpoint's config.json, which is downloaded if it is not here.

    Args:
        name: folder or Hub id.
        recipe: what to convert with; None proposes.

    Raises:
        CheckpointError: no such checkpoint, or it is quantized already and a recipe is named.
        OptionError: no such recipe.
        MemoryLimitError: nothing fits, or the named recipe does not.
    """
    if recipe is not None:
        recipe_named(recipe)
    folder = fetch(name, ("*.json",), lambda one: (one / "config.json").exists(), HINT)
    raw, notes = read_json(folder / "config.json"), list[str]()
    config = ModelConfig.from_dict(raw, notes)
    empty = Checkpoint(
        folder, config, read_generation(folder, config, notes), read_processor(folder, config.vision, notes), raw, {}
    )
    available = device.available()
    rest = memory.need(empty, memory.context(empty)).total  # no tensor is counted
    choices = _choices(empty, rest, available)
    if recipe is not None and len(choices) == 1:
        raise CheckpointError(f"{name} is quantized already; leave --recipe out, or name the original weights.")
    machine = str(mx.device_info().get("device_name", "unknown"))
    step = paper_step(machine, config, PREFIX)
    chosen = _chosen(name, choices, recipe, available)
    return Plan(name, choices, chosen, machine, available, step["sum"] if step else None)


def source_bytes(planned: Plan) -> int:
    """Bytes of the weights as the source stores them."""
    return planned.choices[0].weights


def _choices(empty: Checkpoint, rest: int, available: int) -> tuple[Choice, ...]:
    sizes: dict[str | None, int] = {None: _stored_bytes(empty)}
    if not empty.quantization:
        sizes |= {one: RECIPES[one].nbytes(empty.shapes) for one in RANKED}
    return tuple(Choice(one, size, size + rest, size + rest <= available) for one, size in sizes.items())


def _stored_bytes(empty: Checkpoint) -> int:
    """Bytes of the weights as stored: from the index of the files, else reckoned from config.json."""
    index = empty.path / INDEX
    total = read_json(index).get("metadata", {}).get("total_size") if index.exists() else None
    if isinstance(total, int):
        return total
    bits = (empty.quantization or {}).get("bits", 15)  # a scale and a bias of 16 bits for 64 weights are half a bit
    return empty.parameters * (bits + 1) // 8


def _chosen(name: str, choices: tuple[Choice, ...], recipe: str | None, available: int) -> Choice:
    if recipe is None:
        for choice in choices:
            if choice.fits:
                return choice
        least = min(choices, key=lambda one: one.total)
        raise MemoryLimitError(
            f"{name} needs at least {human(least.total)} and this machine gives {human(available)}; without --model, "
            "the bundled demo answers."
        )
    found = next((one for one in choices if one.recipe == recipe), None)
    if found is None:
        raise OptionError(f"setup knows {', '.join(RANKED)}; for another run `mlx-dgemma convert --recipe {recipe}`.")
    if not found.fits:
        raise MemoryLimitError(
            f"{name} as {recipe} needs {human(found.total)} and this machine gives {human(available)}; take a recipe "
            "that fits."
        )
    return found


def obtain(
    planned: Plan, target: Path | None, progress: Callable[[int, int], None] | None, say: Callable[[str], None]
) -> str:
    """Download and convert as planned. What is there already is used.

    Args:
        planned: from `plan`.
        target: folder of the converted checkpoint; not used if nothing is converted.
        progress: called by the conversion with the bytes done so far and in total.
        say: told what begins.

    Returns:
        What config.toml is to name: the converted folder, or the source.

    Raises:
        DgemmaError: the download or the conversion failed; what was downloaded is kept.
    """
    if target is not None and planned.chosen.recipe is not None and target.exists():
        have = Checkpoint.open(target)
        if not _made_by(have, RECIPES[planned.chosen.recipe]):
            raise DgemmaError(f"{target} is another checkpoint; give another --folder, or remove it.")
        say(f"{target} is there already.")
        return str(target)
    with interrupts_end_at_once(say):
        say(f"Looking for {planned.name} here, else downloading it.")
        # One file after the other: an interruption costs one at most, where the Hub's client keeps no part of a file.
        source = fetch(planned.name, FILES, _has_weights, HINT, max_workers=1)
    if target is None or planned.chosen.recipe is None:
        return str(source.absolute()) if Path(planned.name).expanduser().exists() else planned.name
    say(f"Converting it to {planned.chosen.recipe}, into {target}.")
    convert(source, target, planned.chosen.recipe, progress=progress)
    return str(target)


def _made_by(have: Checkpoint, recipe: Recipe) -> bool:
    """Whether every module of a checkpoint is quantized as a recipe does it."""
    found = source_quantization(have)
    return bool(found) and all(recipe.fitted(path, have.shapes[f"{path}.weight"][-1]) == q for path, q in found.items())


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot is complete; raises CheckpointError if a shard is missing."""
    return any(folder.glob("*.safetensors")) and bool(read_tensors(folder))


@contextmanager
def interrupts_end_at_once(say: Callable[[str], None]) -> Iterator[None]:
    """Let Ctrl-C end the process while files are downloaded: the Hub's client waits for its threads otherwise.

    Versions of the client that go on inside a file find its part by the file's name alone; such parts are kept. Parts
    with a name of their own are of no use to a later run, so they are removed, as the client would at its own end.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    def unfinished() -> set[Path]:
        return set(Path(HF_HUB_CACHE).glob("models--*/blobs/*.*.incomplete"))

    others = unfinished()

    def stop(number: int, frame: FrameType | None) -> None:
        say(INTERRUPTED)
        for file in unfinished() - others:
            file.unlink(missing_ok=True)
        sys.stderr.flush()
        os._exit(130)

    before: Any = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def lines(planned: Plan) -> list[str]:
    """The plan as lines of text."""
    found = [f"{planned.machine}, {human(planned.available)} for MLX"]
    found += [f"{'':2}{'recipe':12}{'weights':>10}{'memory':>10}"]
    for one in planned.choices:
        mark = "*" if one is planned.chosen else ""
        name, fits = one.recipe or "as stored", "fits" if one.fits else "does not fit"
        found.append(f"{mark:2}{name:12}{human(one.weights):>10}{human(one.total):>10}  {fits}")
    if planned.step_ms is not None:
        found.append(f"A denoising step should take about {planned.step_ms:.0f} ms, by a model that was not measured.")
    return found
