"""The block loop: canvases of noise become blocks of text. It knows no text, terminal or HTTP.

Three scopes: a step is one forward over the canvas, a block is one canvas until it settles, a commit
encodes the block into the prefix. Whatever is watched and whoever is beside, the draws are the same: every
random number comes from a key that depends on the job's seed, the block and the step alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .canvas import Canvases
from .control import Step
from .events import Block, Draft
from .prefill import evaluate

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from .request import Job


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
                yield job, Draft(job.row.blocks, step.steps[i], step.argmax[i], step.accepted[i], step.entropy[i])
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
        row, tokens = job.row, np.asarray(step.argmax[i]).tolist()
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
        self.model.encode(step.argmax[i : i + 1], job.session.prefix)
        evaluate(job.session.prefix)
        job.session.cache_key += tokens
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
