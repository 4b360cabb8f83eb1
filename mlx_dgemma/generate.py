"""The block loop: canvases of noise become blocks of text. It knows no text, terminal or HTTP.

Three scopes: a step is one forward over the canvas, a block is one canvas until it settles, a commit
encodes the block into the prefix. Whatever is watched and whoever is beside, the draws are the same: every
random number comes from a key that depends on the job's seed, the block and the step alone.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from . import memory
from .config import GenerationConfig, ProcessorConfig
from .denoise import Canvases, Step
from .errors import OptionError
from .images import check_budget
from .layers import SCORES

if TYPE_CHECKING:
    from .model import DiffusionGemma
    from .prefix import Prefix
    from .result import Result
    from .session import Job


# How early a canvas is taken, by mode: bench/RESULTS.md has what that costs and saves.
SETTLE: dict[str, dict[str, Any]] = {
    "exact": {"certainty_threshold": 0, "patience": 0},
    "default": {"certainty_threshold": 0.1, "patience": 2},
    "fast": {"certainty_threshold": 0.3, "patience": 2},
}


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. Precedence: explicit option > the checkpoint's generation_config > these defaults.

    Raises:
        OptionError: a value outside its bounds.
    """

    max_tokens: int = 256  # the text is cut there; the canvas stays whole
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    max_denoising_steps: int = 48  # steps after which a canvas that has not settled is taken as it is
    entropy_bound: float = 0.1  # nats; higher accepts more positions at once
    t_min: float = 0.4  # temperature at the last step
    t_max: float = 0.8  # temperature at the first step
    stability_threshold: int = 1  # earlier steps whose argmax must be the same
    confidence_threshold: float = 0.005  # nats; mean entropy below which a canvas has settled
    exact: bool = False  # settle as the reference does, by the two thresholds above over the whole canvas
    fast: bool = False  # keep best tokens for good once they are confident, instead of drawing by entropy_bound
    certainty_threshold: float | None = None  # nats; settled where no position is above (0.1, fast 0.3; 0: never)
    patience: int | None = None  # steps without change that settle a canvas (2; 0: never)
    end_tokens: tuple[int, ...] = (1,)  # any of these ends the text
    prefill_chunk: int | None = None  # prompt tokens encoded at once; None: `fitting_chunk`
    image_tokens: int = 280  # the most soft tokens of a picture: 70, 140, 280, 560 or 1120
    fps: float = 1.0  # frames looked at in a second of video
    max_frames: int = 32  # frames looked at in a whole video

    def __post_init__(self):
        for name in ("exact", "fast"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it should be true or false.")
        mode = "exact" if self.exact else "fast" if self.fast else "default"
        for name, value in SETTLE[mode].items():
            given = getattr(self, name)
            if self.exact and (given or self.fast):
                other = f"{name} is {given!r}" if given else "fast is True"
                raise OptionError(f"exact is True and {other}; the reference knows no such thing: leave one out.")
            object.__setattr__(self, name, value if given is None else given)
        for name, kind, low in (
            ("max_tokens", int, 1),
            ("max_denoising_steps", int, 1),
            ("entropy_bound", float, 0),
            ("t_min", float, 0),
            ("t_max", float, self.t_min),
            ("stability_threshold", int, 0),
            ("confidence_threshold", float, 0),
            ("certainty_threshold", float, 0),
            ("patience", int, 0),
            ("prefill_chunk", int, 1),
            ("max_frames", int, 1),
            ("fps", float, 0),
        ):
            value = getattr(self, name)
            if name == "prefill_chunk" and value is None:
                continue
            number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
            if not number or not low <= value < float("inf"):
                noun = "a whole number" if kind is int else "a number"
                bound = f"t_min = {low}" if name == "t_max" else low
                raise OptionError(f"{name} is {value!r}; it should be {noun}, at least {bound}.")
        for name in ("t_max", "fps"):
            if getattr(self, name) == 0:
                raise OptionError(f"{name} is {getattr(self, name)!r}; it should be above 0.")
        check_budget(self.image_tokens)
        for name, single, noun in (("stop", str, "strings that are not empty"), ("end_tokens", int, "token ids")):
            given = getattr(self, name)
            values = (given,) if isinstance(given, single) else given
            if not isinstance(values, (list, tuple)) or not all(type(one) is single and one != "" for one in values):
                raise OptionError(f"{name} is {given!r}; it should be {noun}.")
            object.__setattr__(self, name, tuple(values))

    @classmethod
    def of(cls, config: GenerationConfig, processor: ProcessorConfig) -> GenerationOptions:
        """The checkpoint's own settings."""
        names = {f.name for f in fields(cls)} & {f.name for f in fields(config)}
        return cls(
            **{name: getattr(config, name) for name in names},
            max_tokens=config.max_new_tokens,
            end_tokens=config.eos_token_ids,
            image_tokens=processor.image_tokens,
            max_frames=processor.video_frames,
        )

    def override(self, **changes: Any) -> GenerationOptions:
        """These options with some replaced; None leaves one as it is.

        Raises:
            OptionError: an unknown name or a value outside its bounds.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}."
                raise OptionError(f"{name} is not an option; {hint}")
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes.get("fast", self.fast) and "entropy_bound" in changes:
            raise OptionError(
                f"fast is True and entropy_bound is {changes['entropy_bound']!r}; "
                "fast mode accepts by confidence: leave one out."
            )
        if {"exact", "fast"} & set(changes):
            changes = {**dict.fromkeys(SETTLE["default"]), **changes}  # they follow the mode
        return replace(self, **changes)


@dataclass(frozen=True)
class Draft:
    """A canvas after one denoising step. Arrays are [C]; reading them changes nothing."""

    block: int  # from 0
    step: int  # denoising steps done in this block
    tokens: mx.array  # int32, the most probable token of every position
    accepted: mx.array  # bool, positions kept for the next step
    entropy: mx.array  # float32, nats
    text: str = ""  # filled in by the engine


@dataclass(frozen=True)
class Block:
    """A canvas that settled."""

    block: int  # from 0
    steps: int  # denoising steps it took
    tokens: tuple[int, ...]  # the whole canvas, also what lies behind an end token
    text: str = ""  # answer text that is new and final (filled in by the engine)
    thinking: str = ""  # thinking text that is new and final
    log_probs: tuple[float, ...] = ()  # of the tokens, in nats, as the last step's processed logits have them


@dataclass(frozen=True)
class Finished:
    """The last event of a generation."""

    result: Result


class Reader(Protocol):
    """Takes a row's blocks and says when its text has ended."""

    @property
    def left(self) -> int:
        """Tokens that the text has room for."""

    def feed(self, tokens: tuple[int, ...]) -> str | None:
        """Take a block; returns the finish reason once there is one."""

    def cut(self, reason: str) -> None:
        """No further block will come."""


def prefill(*arguments: Any, **named: Any) -> None:
    """Encode a prompt; takes what `encoding` takes."""
    for _ in encoding(*arguments, **named):
        pass


def encoding(
    model: DiffusionGemma,
    prefix: Prefix,
    tokens: np.ndarray,
    chunk: int | None,
    mask: np.ndarray | None = None,
    features: Sequence[mx.array | None] = (),
) -> Iterator[None]:
    """Encode a prompt chunk by chunk, so that memory is bounded by the chunk; others may go on in between.

    Args:
        tokens: [B, L] int32.
        chunk: tokens at once, None for `fitting_chunk`; a chunk ends before a picture rather than in it, and a longer
            picture is whole.
        mask: [B, L], false where the left padding is.
        features: of each row the soft tokens [tokens, H] of its placeholders, or None.
    """
    held = (
        tokens == model.config.image_token_id if any(f is not None for f in features) else np.zeros_like(tokens, bool)
    )
    for start, end in chunks(held, chunk or fitting_chunk(model, *tokens.shape)):
        seen = [
            f[int(row[:start].sum()) : int(row[:end].sum())]
            for f, row in zip(features, held)
            if f is not None and row[start:end].any()
        ]
        model.encode(
            mx.array(tokens[:, start:end]),
            prefix,
            mask=None if mask is None else mask[:, start:end],
            features=mx.concatenate(seen) if seen else None,
        )
        evaluate(prefix)
        if end < tokens.shape[1]:
            mx.clear_cache()
        yield


def fitting_chunk(model: DiffusionGemma, batch_size: int, length: int) -> int:
    """Prompt tokens to encode at once: 512, or 1,024 of a prompt beyond 4,096.

    Longer passes read the weights less often but hold more: at the release's shape 2,048 tokens take 2 GiB. Fewer,
    256 at least, where a sliding layer's scores would exceed `SCORES`.
    """
    config, size = model.config.text, 512 if length <= 4096 else 1024
    near = batch_size * config.num_attention_heads * model.dtype.size  # bytes of scores, of a query over a key
    while size > 256 and near * size * (config.sliding_window - 1 + size) > SCORES:
        size //= 2
    return size


def evaluate(prefix: Prefix) -> None:
    """Compute what was encoded, layer after layer."""
    queue = memory.Queue()
    queue.add(*prefix.stages, prefix.state)
    queue.finish()


def chunks(held: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Cut [B, L] into (start, end) of about `size` columns, never inside a run of true in any row."""
    length = held.shape[1]
    inside = np.zeros(length + 1, bool)  # a border here would cut a run
    inside[1:length] = (held[:, 1:] & held[:, :-1]).any(axis=0)
    start = 0
    while start < length:
        end = min(start + size, length)
        while inside[end] and end > start:
            end -= 1
        if end == start:
            end = min(start + size, length)
            while inside[end]:
                end += 1
        yield start, end
        start = end


@dataclass
class _Group:
    """Jobs whose canvases are denoised as one batch."""

    canvases: Canvases
    jobs: list[Job]


class Loop:
    """Jobs that are generated together.

    Canvases of jobs with the same sampler options are denoised as one batch. A job joins it with every canvas of its
    own and leaves when that has settled, so nobody waits for another's; prompts are encoded a chunk at a time between
    the steps of others.
    """

    def __init__(self, model: DiffusionGemma):
        self.model = model
        self._encoding: deque[tuple[Job, Iterator[None]]] = deque()
        self._ready: list[tuple[Any, Job, Canvases]] = []  # whose canvases wait for a border
        self._groups: dict[Any, _Group] = {}

    @property
    def jobs(self) -> list[Job]:
        """All that have not ended."""
        grouped = [job for group in self._groups.values() for job in group.jobs]
        return [job for job, _ in self._encoding] + [job for _, job, _ in self._ready] + grouped

    def add(self, job: Job, encoding: Iterator[None]) -> None:
        """Take in a job, whose prompt this encodes."""
        self._encoding.append((job, encoding))

    def remove(self, job: Job) -> None:
        """Forget a job, wherever it is."""
        self._encoding = deque(one for one in self._encoding if one[0] is not job)
        self._ready = [one for one in self._ready if one[1] is not job]
        for key, group in list(self._groups.items()):
            if job in group.jobs:
                self._leave(key, [job])

    def step(self) -> Iterator[tuple[Job, Draft | Block | Exception | None]]:
        """One chunk of a prompt and one denoising step of every canvas.

        Yields:
            A job and its `Draft` or `Block`, or what it failed with; None where it has ended.
        """
        if self._encoding:
            job, rest = self._encoding[0]
            try:
                if next(rest, self) is self:  # no chunk was left
                    self._encoding.popleft()
                    if job.control is not None:
                        key = mx.random.key(job.row.seed)
                        prefix = job.session.prefix
                        job.row.positions += job.control.prepare(self.model, prefix, job.options, key)
                    yield from self._begin(job)
            except Exception as error:
                self.remove(job)
                yield job, error
        self._join()
        for key in list(self._groups):
            try:
                yield from self._step(key)
            except Exception as error:  # of a whole batch: what it did to whom cannot be told
                for job in self._groups.pop(key).jobs:
                    yield job, error
            self._join()

    def _step(self, key: Any) -> Iterator[tuple[Job, Draft | Block | Exception | None]]:
        group = self._groups[key]
        step = group.canvases.step(ahead=not any(waiting == key for waiting, _, _ in self._ready))
        jobs, over = list(group.jobs), []
        for i, job in enumerate(jobs):
            if job.drafts:
                yield job, Draft(job.row.blocks, step.steps[i], step.best[i], step.accepted[i], step.entropy[i])
            if step.done[i] or step.steps[i] == job.options.max_denoising_steps:
                over.append(i)
        if over:
            self._leave(key, [jobs[i] for i in over])
        for i in over:
            try:
                yield from self._end_block(jobs[i], step, i)
            except Exception as error:
                yield jobs[i], error

    def _end_block(self, job: Job, step: Step, i: int) -> Iterator[tuple[Job, Block | None]]:
        """Take a canvas that has settled, and go on with the next one or end."""
        row, tokens = job.row, np.asarray(step.best[i]).tolist()
        block, row.blocks = row.blocks, row.blocks + 1
        row.steps += step.steps[i]
        row.positions += step.steps[i] * len(tokens)
        ended = row.answer.feed(tuple(tokens)) is not None
        log_probs = np.log(np.asarray(step.confidence[i])).tolist()
        yield job, Block(block, step.steps[i], tuple(tokens), log_probs=tuple(log_probs))
        if ended:
            yield job, None
            return
        if job.control:
            job.control.commit(tokens)
        self.model.encode(step.best[i : i + 1], job.session.prefix)
        evaluate(job.session.prefix)
        job.session.held += tokens
        mx.clear_cache()  # buffers of shapes that the longer prefix has no more use for
        yield from self._begin(job)

    def _begin(self, job: Job) -> Iterator[tuple[Job, None]]:
        """Ready a job's next canvas, if the context has room for it."""
        row, prefix, config = job.row, job.session.prefix, self.model.config
        if prefix.offset + config.canvas_length > config.text.max_position_embeddings:
            row.answer.cut("length")
            yield job, None
            return
        row.key, key = mx.random.split(mx.random.key(row.seed) if row.key is None else row.key, 2)
        left = row.answer.left
        layout, guide = (job.control.layout(), job.control.guide(left)) if job.control else (None, None)
        # What a step does not depend on is left out, so that more jobs are alike.
        options = replace(
            job.options, max_tokens=1, stop=(), prefill_chunk=None, image_tokens=70, fps=1.0, max_frames=1
        )
        canvases = Canvases(self.model, [prefix], options, key[None], [left], layout, guide)
        alike = options, canvases.length, layout is None, guide is None
        self._ready.append((alike, job, canvases))

    def _join(self) -> None:
        """Let canvases that are ready join their groups where no step is under way."""
        waiting = []
        for key, job, canvases in self._ready:
            group = self._groups.get(key)
            if group is None:
                self._groups[key] = _Group(canvases, [job])
            elif group.canvases.ahead:
                waiting.append((key, job, canvases))
            else:
                group.canvases.join(canvases)
                group.jobs.append(job)
        self._ready = waiting

    def _leave(self, key: Any, jobs: list[Job]) -> None:
        group = self._groups[key]
        rows = [i for i, job in enumerate(group.jobs) if job not in jobs]
        if not rows:
            del self._groups[key]
            return
        group.canvases.keep(rows)
        group.jobs = [group.jobs[i] for i in rows]
