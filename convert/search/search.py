"""A whole search: trajectories are recorded, widths are measured, and a plan is made that fits a size."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.errors import CheckpointError, OptionError, human
from mlx_dgemma.files import atomic_file, told_errors
from mlx_dgemma.prompt.endings import own_options

from ..recipes import RECIPES, Quantization, Recipe, width_name
from ..sources.opened import Source
from . import plan, prompts, trajectories, widths
from .candidate import by_recipe, measured
from .plan import planned
from .report import Found, write
from .sensitivity import COSTS, SAMPLES, Costs, Sensitivity
from .shelf import Shelf
from .trajectories import Trajectory

STATES = 3  # of each trajectory as a mean
TRAJECTORIES, RUN, PLAN = "trajectories.safetensors", "search.json", "plan.json"
Progress = Callable[[str, int, int], None]  # called with what is done, how far it is, and of how much
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def size_of(text: str) -> int:
    """Bytes of a size such as "11.5GB" or "10GiB".

    Raises:
        OptionError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?i?B?)", text.strip())
    unit = found[2].upper() if found else None
    if found is None or unit not in _UNITS or (not unit and float(found[1]) < 10**6):
        raise OptionError(f"target-size is {text!r}; it should be a size such as 11.5GB.")
    return int(float(found[1]) * _UNITS[unit])


def search(
    source: Source,
    folder: Path,
    nbytes: int | None = None,
    bits: float | None = None,
    prompt_file: str | None = None,
    tried: Sequence[Quantization] = widths.ALL,
    states: int = STATES,
    samples: int = SAMPLES,
    progress: Progress | None = None,
    keep: bool | None = None,
) -> Found:
    """Search a plan, and write it with a report into a folder.

    Args:
        source: what will be converted.
        folder: of the search's files; a search that was interrupted goes on from there, and another size reuses
            what was measured.
        nbytes: of the whole checkpoint, at most.
        bits: the same in bits a weight.
        prompt_file: the user's prompts; None takes the bundled ones.
        tried: the widths to try.
        states: of each trajectory as a mean.
        samples: random directions of each position.
        progress: told how far the search is.
        keep: hold all layers in memory; None: if they fit into half of it.

    Raises:
        OptionError: nothing fits the size.
        CheckpointError: the folder belongs to another search, or the source is quantized already.
        DgemmaError: a file cannot be written.
    """
    started, checkpoint = time.perf_counter(), source.checkpoint
    if source.decode is None and checkpoint.quantization:
        raise CheckpointError(f"{checkpoint.path} is quantized already; search on the original weights.")
    target = nbytes if nbytes is not None else int((bits or 0) * checkpoint.parameters / 8)
    shapes, shelf = checkpoint.shapes, Shelf(source, keep)
    float_bytes = shelf.stored.size
    planned("check", shapes, _free(shapes, tried), target, float_bytes)
    mx.reset_peak_memory()
    with told_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    told = progress or (lambda what, done, total: None)
    seen = _recorded(source, shelf, folder, prompt_file, tried, states, samples, told)
    sensitivity = Sensitivity(shelf, seen, folder, tried, samples)
    costs = sensitivity.run(lambda done, total: told("Measuring", done, total))
    name = f"searched for {human(target)}"
    found, expected = planned(name, shapes, costs.modules, target, float_bytes)
    told("Checking", 0, 1)
    far, same = measured(shelf, by_recipe(found, shelf.stored), seen, sensitivity.outputs())
    told("Checking", 1, 1)
    stored = found.nbytes(shapes, float_bytes)
    result = Found(
        found,
        stored,
        stored * 8 / checkpoint.parameters,
        expected,
        far,
        same,
        mx.get_peak_memory(),
        time.perf_counter() - started,
        _named(shapes, costs, float_bytes),
        (len(seen), sum(len(one.steps) > 1 for one in seen)),
    )
    plan.save(folder / PLAN, found)
    write(folder, result, costs, shapes, seen, float_bytes)
    return result


def _recorded(
    source: Source,
    shelf: Shelf,
    folder: Path,
    prompt_file: str | None,
    tried: Sequence[Quantization],
    states: int,
    samples: int,
    told: Progress,
) -> list[Trajectory]:
    """The folder's trajectories, recorded if they are not there yet."""
    checkpoint = source.checkpoint
    tokenizer = load_tokenizer(checkpoint)
    asked = prompts.bundled(tokenizer) if prompt_file is None else prompts.read(tokenizer, prompt_file)
    _claim(folder, source, asked, tried, states, samples)
    file = folder / TRAJECTORIES
    if not file.exists():
        options, _ = own_options(checkpoint, tokenizer, checkpoint.config.text.vocab_size)

        def note(done: int, total: int) -> None:
            told("Recording", done, total)

        trajectories.save(file, trajectories.record(shelf.trunk(), options, asked, states, progress=note))
    return trajectories.load(file)


def _free(shapes: Mapping[str, tuple[int, ...]], tried: Sequence[Quantization]) -> dict[str, dict[str, float]]:
    """Costs of nothing, to see whether a size can be met at all."""
    modules = widths.modules_of(shapes)
    found = {}
    for path, shape in modules.items():
        found[path] = {width_name(one): 0.0 for one in widths.allowed(path, shape, tried)}
    return found


def expected_of(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], costs: Costs) -> float | None:
    """The sum of the divergences of a recipe's widths; None where one was not measured."""
    total = 0.0
    for path, own in costs.modules.items():
        width = recipe.fitted(path, shapes[f"{path}.weight"][-1])
        if width is not None and width_name(width) not in own:
            return None
        total += 0.0 if width is None else own[width_name(width)]
    return total


def _named(shapes: Mapping[str, tuple[int, ...]], costs: Costs, float_bytes: int) -> dict[str, tuple[int, float]]:
    found = {name: expected_of(recipe, shapes, costs) for name, recipe in RECIPES.items()}
    return {
        name: (RECIPES[name].nbytes(shapes, float_bytes), value) for name, value in found.items() if value is not None
    }


def _claim(
    folder: Path,
    source: Source,
    asked: Sequence[Sequence[int]],
    tried: Sequence[Quantization],
    states: int,
    samples: int,
) -> None:
    """Write what the folder's files are of, or check it.

    Raises:
        CheckpointError: they are of another search.
    """
    checkpoint = source.checkpoint
    tensors = sorted((name, info.dtype, info.nbytes) for name, info in checkpoint.tensors.items())
    about = json.dumps([checkpoint.raw_config, tensors, [list(one) for one in asked]], sort_keys=True)
    mine = {
        "source": hashlib.sha256(about.encode()).hexdigest(),
        "widths": [width_name(one) for one in tried],
        "states": states,
        "samples": samples,
    }
    file = folder / RUN
    if not file.exists():
        if (folder / COSTS).exists() or (folder / TRAJECTORIES).exists():
            raise CheckpointError(f"{folder} holds files of something else; give another folder for the search.")
        with atomic_file(file) as draft:
            draft.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        return
    try:
        same = json.loads(file.read_text(encoding="utf-8")) == mine
    except ValueError:
        same = False
    if not same:
        raise CheckpointError(
            f"{folder} belongs to a search with another source, other prompts or widths; remove it or give another one."
        )


def trajectories_of(folder: Path) -> list[Trajectory]:
    """The trajectories that a search recorded."""
    return trajectories.load(folder / TRAJECTORIES)
