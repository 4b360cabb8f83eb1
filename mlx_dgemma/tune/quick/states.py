"""The states that the model's own sampler visits: canvases with what conditions them, on disk.

A round's folder holds `canvases.i32` [M, C], `conditioning.f16` [M, C, H], both without a header, and `states.jsonl`, one
line for each canvas of an answer. The last file is written last: where it is, the others are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ...decoding.canvas import CanvasBatch
from ...decoding.lookahead import advance
from ...decoding.options import GenerationOptions
from ...decoding.session import PromptTokens, Session
from ...decoding.step import inputs
from ...errors import DataError
from ...files import atomic_file, told_errors

if TYPE_CHECKING:
    from ...engine import Engine
    from ...model.kv_cache import Prefix

INDEX, CANVASES, CONDITIONING = "states.jsonl", "canvases.i32", "conditioning.f16"


@dataclass(frozen=True)
class Canvas:
    """One canvas of an answer, and the states in which the sampler saw it.

    Attributes:
        where: place of the prompt.
        text: the whole answer.
        prefix: token ids before the canvas.
        tokens: the canvas as it is at the end, whatever lies behind the answer's end included.
        length: how many of them belong to the answer.
        learn: whether the model learns to say it early, or is kept as it is.
        first: the first of its states on disk: the input of the second step. That of the first step is noise.
        steps: denoising steps whose inputs are known, that of the noise included.
    """

    where: str
    text: str
    prefix: list[int]
    tokens: list[int]
    length: int
    learn: bool
    first: int = 0
    steps: int = 1


@dataclass(frozen=True)
class States:
    """The canvases of a round, and the arrays that their states lie in."""

    canvases: list[Canvas]
    tokens: np.ndarray  # [M, C] int32
    conditioning: np.ndarray  # [M, C, H] float16


def visit(
    engine: Engine, prefixes: Sequence[Prefix], keys: mx.array, rooms: Sequence[int], steps: int
) -> Iterator[tuple[np.ndarray, mx.array, list[bool]]]:
    """Denoise one canvas behind each prefix, and look at the inputs of every step after the first.

    Args:
        engine: with the model and the options of its sampler.
        prefixes: of one row each.
        keys: [B, 2], a random key each.
        rooms: tokens that each text has room for.
        steps: the last step that is looked at.

    Yields:
        The canvases [B, C] int32, what conditions them [B, C, H], and which of them have not settled.
    """
    batch = CanvasBatch(engine.model, prefixes, _sampler(engine.options), keys, rooms)
    for _ in range(1, min(steps, batch.options.max_denoising_steps)):
        if advance(batch, ahead=False).overflowed:
            raise engine.model.range_error()
        if all(batch.finished):
            return
        canvas, conditioning = inputs(batch, batch.rows.last, batch.steps, batch.dense)
        assert conditioning is not None
        mx.eval(canvas, conditioning)
        yield np.asarray(canvas), conditioning, [not over for over in batch.finished]


def _sampler(options: GenerationOptions) -> GenerationOptions:
    return options.override(exact=False, fast=False)


def record(
    engine: Engine, canvases: Sequence[Canvas], folder: Path, steps: int, batch_size: int, seed: int
) -> Iterator[int]:
    """Write the states that the model's sampler visits on its way to each canvas into a folder.

    Args:
        engine: with the model that visits them.
        canvases: where to; their states are not known yet.
        folder: made if it does not exist.
        steps: the last denoising step that is looked at.
        batch_size: canvases denoised together.
        seed: of the noise.

    Yields:
        The number of canvases done.

    Raises:
        DgemmaError: a file cannot be written.
    """
    known = 0
    with told_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
    placed: list[Canvas] = []
    with atomic_file(folder / CANVASES, flush=False) as one, atomic_file(folder / CONDITIONING, flush=False) as other:
        with one.open("wb") as tokens, other.open("wb") as conditioning:
            for start in range(0, len(canvases), batch_size):
                some = canvases[start : start + batch_size]
                prefixes = [_encoded(engine, canvas.prefix) for canvas in some]
                keys = mx.stack([mx.random.key((seed << 32) + start + i) for i in range(len(some))])
                rooms = [engine.options.max_tokens] * len(some)
                rows: list[list[Any]] = [[] for _ in some]
                for seen, conditions, going in visit(engine, prefixes, keys, rooms, steps):
                    on_host = np.asarray(conditions.astype(mx.float16))
                    for i in np.flatnonzero(going):
                        rows[i].append((seen[i], on_host[i]))
                for canvas, states in zip(some, rows):
                    placed.append(Canvas(**{**vars(canvas), "first": known, "steps": 1 + len(states)}))
                    known += len(states)
                    for state, condition in states:
                        tokens.write(state.astype(np.int32).tobytes())
                        conditioning.write(condition.tobytes())
                yield len(placed)
    with atomic_file(folder / INDEX) as draft:
        draft.write_text("".join(json.dumps(asdict(one)) + "\n" for one in placed), "utf-8")


def _encoded(engine: Engine, tokens: list[int]) -> Prefix:
    session = Session(engine.model, len(tokens) + engine.config.canvas_length)
    return session.encode_all(PromptTokens(tokens, list(tokens)), engine.options.prefill_chunk)


def load(engine: Engine, folder: Path) -> States | None:
    """The states of a round; None if they are not complete.

    Raises:
        DataError: a file is broken.
    """
    if not (folder / INDEX).exists():
        return None
    length, width = engine.config.canvas_length, engine.config.text.hidden_size
    try:
        lines = (folder / INDEX).read_text("utf-8").splitlines()
        canvases = [Canvas(**json.loads(line)) for line in lines]
        known = sum(canvas.steps - 1 for canvas in canvases)
        tokens = _mapped(folder / CANVASES, np.int32, (known, length))
        return States(canvases, tokens, _mapped(folder / CONDITIONING, np.float16, (known, length, width)))
    except (OSError, ValueError, TypeError):
        raise DataError(f"The states in {folder} are broken; remove the folder, and --resume records them again.") from None


def _mapped(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array that stays on the disk.

    Raises:
        ValueError: the file has another size.
    """
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if file.stat().st_size != wanted:
        raise ValueError(f"{file} has not {wanted} bytes")
    return np.memmap(file, dtype, "r", shape=shape) if wanted else np.zeros(shape, dtype)
