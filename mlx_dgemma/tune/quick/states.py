"""The states that the model's own sampler visits: canvases with what conditions them, on disk.

A round's folder holds `canvases.i32` [M, C], `conditioning.f16` [M, C, H], both without a header, and `states.jsonl`,
one line for each canvas of an answer. The last file is written last: where it is, the others are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ...decoding import sampler
from ...decoding.canvas import CanvasBatch
from ...decoding.lookahead import advance
from ...decoding.session import PromptTokens, Session
from ...decoding.step import inputs
from ...errors import DataError
from ...files import atomic_file, told_errors
from ..objective import positions_per_chunk

if TYPE_CHECKING:
    from ...engine import Engine
    from ...model.kv_cache import Prefix

SOUND = 0.25  # least probability of a token beside the best one, in a canvas that is learned
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
        weight: with which the model learns to say it early; 0: it is kept as it is.
        open: whether its states learn what their own trajectory comes to, which `tokens` are once they are recorded.
        first: the first of its states on disk: the input of the second step. That of the first step is noise.
        steps: denoising steps whose inputs are known, that of the noise included.
    """

    where: str
    text: str
    prefix: list[int]
    tokens: list[int]
    length: int
    weight: float
    open: bool = False
    first: int = 0
    steps: int = 1


@dataclass(frozen=True)
class States:
    """The canvases of a round, and the arrays that their states lie in."""

    canvases: list[Canvas]
    tokens: np.ndarray  # [M, C] int32
    conditioning: np.ndarray  # [M, C, H] float16


@dataclass
class Visit:
    """A canvas under way.

    Attributes:
        states: (canvas [C] int32, conditioning [C, H] float16) of the second step on, as many as are wanted.
        end: [C] int32, the most probable tokens of its last step.
    """

    states: list[tuple[np.ndarray, np.ndarray]]
    end: np.ndarray


def visit(
    engine: Engine, prefixes: Sequence[Prefix], keys: mx.array, rooms: Sequence[int], steps: int, to_end: bool = False
) -> list[Visit]:
    """Denoise one canvas behind each prefix, and keep the inputs of its first steps.

    Args:
        engine: with the model and the options of its sampler.
        prefixes: of one row each.
        keys: [B, 2], a random key each.
        rooms: tokens that each text has room for.
        steps: the last step that is looked at.
        to_end: whether the canvases go on until the reference's rule stops them, so that their ends mean something.
    """
    options = engine.options.override(exact=False, fast=False, canvas="full")
    if to_end:
        options = options.override(certainty_threshold=0, patience=0)
    batch = CanvasBatch(engine.model, prefixes, options, keys, rooms)
    visits = [Visit([], np.zeros(0)) for _ in prefixes]
    for step in range(options.max_denoising_steps if to_end else steps):
        if 0 < step < steps:
            canvas, conditioning = inputs(batch, batch.rows.last, batch.steps, batch.dense)
            assert conditioning is not None
            seen, on_host = np.asarray(canvas), np.asarray(conditioning.astype(mx.float16))
            for i, over in enumerate(batch.finished):
                if not over:
                    visits[i].states.append((seen[i], on_host[i]))
        found = advance(batch, ahead=False)
        if found.overflowed:
            raise engine.model.range_error()
        if all(batch.finished):
            break
    for one, end in zip(visits, np.asarray(found.argmax)):
        one.end = end
    return visits


def soundness(engine: Engine, prefix: Sequence[int], tokens: Sequence[int]) -> float:
    """How well each token of a text follows those before it, by what the model says token by token.

    A canvas is drawn at many positions at once, and each of them may confirm what is wrong with the others. Token by
    token, one that contradicts what stands before it is far less probable than another one, and a free choice among
    many is not.

    Args:
        engine: with the model.
        prefix: token ids before the text, two at least.
        tokens: the text.

    Returns:
        The least probability of a token beside the best one at its place, 0 to 1.
    """
    model, size = engine.model, positions_per_chunk(engine.config.text.vocab_size)
    hidden = model.encode(mx.array([[prefix[-1], *tokens[:-1]]]), _encoded(engine, prefix[:-1], len(tokens)))
    ids, least = mx.array(list(tokens))[:, None], mx.array(0.0)
    for start in range(0, len(tokens), size):
        logits = model.logits(hidden[:, start : start + size])[0]
        own = mx.take_along_axis(logits, ids[start : start + size], axis=-1)[:, 0]
        least = mx.minimum(least, (own - logits.max(axis=-1)).min())
        mx.eval(least)
    return float(np.exp(np.asarray(least)))


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
    with (folder / CANVASES).open("wb") as tokens, (folder / CONDITIONING).open("wb") as conditioning:
        for start, some in _alike(canvases, batch_size):
            for canvas, one in _visited(engine, some, steps, (seed << 32) + start):
                placed.append(replace(canvas, first=known, steps=1 + len(one.states)))
                known += len(one.states)
                with told_errors(folder):
                    for state, condition in one.states:
                        tokens.write(state.astype(np.int32).tobytes())
                        conditioning.write(condition.tobytes())
            yield len(placed)
    with atomic_file(folder / INDEX) as draft:
        draft.write_text("".join(json.dumps(asdict(one)) + "\n" for one in placed), "utf-8")


def _alike(canvases: Sequence[Canvas], size: int) -> Iterator[tuple[int, list[Canvas]]]:
    """Batches of canvases that are alike in `open`, each with the number of its first canvas."""
    start = 0
    for open_ in (False, True):
        own = [canvas for canvas in canvases if canvas.open == open_]
        for at in range(0, len(own), size):
            yield start, own[at : at + size]
            start += len(own[at : at + size])


def _visited(engine: Engine, canvases: Sequence[Canvas], steps: int, number: int) -> list[tuple[Canvas, Visit]]:
    """Visit some canvases that are alike in `open`; open ones end as their trajectories do, or are kept as they are."""
    open_ = canvases[0].open
    prefixes = [_encoded(engine, canvas.prefix, engine.config.canvas_length) for canvas in canvases]
    keys = mx.stack([mx.random.key(number + i) for i in range(len(canvases))])
    rooms = [engine.options.max_tokens] * len(canvases)
    visits = visit(engine, prefixes, keys, rooms, steps, open_)
    if not open_:
        return list(zip(canvases, visits))
    ends = np.stack([one.end for one in visits])
    stops = mx.array(engine.options.end_tokens, mx.int32)
    lengths = np.asarray(sampler.text(mx.array(ends), stops, mx.array(rooms, mx.int32)).sum(axis=-1)).tolist()
    found = []
    for canvas, one, length in zip(canvases, visits, lengths):
        tokens = one.end.tolist()
        sound = soundness(engine, canvas.prefix, tokens[:length]) >= SOUND
        found.append((replace(canvas, tokens=tokens, length=length, weight=canvas.weight * sound), one))
    return found


def _encoded(engine: Engine, tokens: Sequence[int], room: int) -> Prefix:
    session = Session(engine.model, len(tokens) + room)
    return session.encode_all(PromptTokens(list(tokens), list(tokens)), engine.options.prefill_chunk)


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
        raise DataError(
            f"The states in {folder} are broken; remove {INDEX} there and continue with --resume."
        ) from None


def _mapped(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array that stays on the disk.

    Raises:
        ValueError: the file has another size.
    """
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if file.stat().st_size != wanted:
        raise ValueError(f"{file} has not {wanted} bytes")
    return np.memmap(file, dtype, "r", shape=shape) if wanted else np.zeros(shape, dtype)
