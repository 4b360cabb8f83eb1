"""The block loop: canvases of noise become blocks of text.

A step is one forward over a canvas. A block is one canvas until it settles. A commit encodes the block into the prefix.
Every random number comes from a key that depends on the request's seed, the block and the step alone, so neither
watching nor company changes what is drawn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import INTERRUPTS, as_exception
from ..model.diffusion_gemma import DiffusionGemma
from .canvas import CanvasBatch
from .causal import TokenLoop
from .costs import Costs, reckoned
from .events import Block, Draft, Event, Finished
from .lookahead import Step, advance
from .request import Request
from .session import Session


@dataclass
class _Group:
    """Requests whose canvases are denoised as one batch."""

    batch: CanvasBatch
    requests: list[Request]


class Loop:
    """Requests that are generated together: continuous batching, a canvas at a time.

    Canvases of requests with the same sampler options are denoised as one batch. A request joins a batch for one
    canvas and leaves when that has settled, so nobody waits for another's. Prompts are encoded in turns, a chunk of one
    of them between two steps of others.

    Args:
        model: the model.
        load_seconds: what loading it took, for statistics.
        costs: of its passes, for drafts; None: they are reckoned.
    """

    def __init__(self, model: DiffusionGemma, load_seconds: float = 0.0, costs: Callable[[], Costs] | None = None):
        self.model, self._load_seconds = model, load_seconds
        self._beginning: deque[tuple[Request, Iterator[None]]] = deque()  # whose first canvas is not ready
        self._ready: list[tuple[Any, Request, CanvasBatch]] = []  # whose canvases wait to join a group
        self._groups: dict[Any, _Group] = {}
        self._tokens = TokenLoop(model, load_seconds, costs or partial(reckoned, model.config.text))
        self.requests: list[Request] = []  # all that have not ended; their sessions are theirs until then

    def add(self, request: Request, session: Session | None = None, snapshot_at: int = 0) -> None:
        """Take in a request.

        Args:
            request: its control and reader are used up.
            session: what its prompt and blocks are encoded into; it may hold the prompt's beginning. None: a new one.
                It is the request's own until that ends or is removed.
            snapshot_at: position of the prompt at which a copy of the session is kept, as `session.snapshot`; 0: none.

        Raises:
            OptionError: the session is another request's or another model's.
        """
        if session is None:
            canvas = self.model.config.canvas_length  # what is longer than this room grows in steps
            room = len(request.prompt.tokens) + min(request.options.max_tokens, 4 * canvas) + canvas
            session = Session(self.model, room)
        session.acquire(request, self.model)
        self.requests.append(request)
        request.session, request.started = session, time.perf_counter()
        prompt = request.prompt.without_last() if request.options.causal else request.prompt
        encoding = session.encode(prompt, request.options.prefill_chunk, snapshot_at)
        self._beginning.append((request, encoding))

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and let go of its session."""
        self._end(request)
        self._tokens.remove(request)
        self._beginning = deque(one for one in self._beginning if one[0] is not request)
        self._ready = [one for one in self._ready if one[1] is not request]
        for key, group in list(self._groups.items()):
            if request in group.requests:
                self._leave(key, [request])

    def close(self) -> None:
        """Forget all requests: whoever drives the loop calls it at the end, an interrupt included."""
        for request in list(self.requests):
            self.remove(request)

    def _end(self, request: Request) -> None:
        if request in self.requests:
            self.requests.remove(request)
            request.session.release(request)

    def step(self) -> Iterator[tuple[Request, Event | Exception]]:
        """One chunk or pass before one's first canvas, one denoising step of every canvas, one pass token by token.

        Yields:
            A request and its event. `Finished`, or what it failed with, is a request's last.
        """
        if self._beginning:
            request, turns = self._beginning.popleft()
            try:
                over = next(turns, self) is self
                if not over and not request.encoded and request.session.prefix.offset == len(request.prompt.tokens):
                    over = next(turns, self) is self  # that was the last chunk: no turn is waited for the end
                if over and not request.encoded:
                    request.encoded, turns = time.perf_counter(), self._look(request)
                    over = next(turns, self) is self
                if not over:
                    self._beginning.append((request, turns))  # behind the others, so that a short prompt comes soon
                elif request.options.causal:
                    self._tokens.add(request)
                else:
                    yield from self._begin_block(request)
            except INTERRUPTS:
                raise
            except BaseException as error:
                self.remove(request)
                yield request, as_exception(error)
        self._join()
        for key in list(self._groups):
            try:
                yield from self._step_group(key)
            except INTERRUPTS:
                raise
            except BaseException as error:  # of a whole batch: what it did to whom cannot be told
                for request in self._groups.pop(key).requests:
                    request.session.reset()
                    self._end(request)
                    yield request, as_exception(error)
            self._join()

        for request, event in self._tokens.step():
            if isinstance(event, (Finished, Exception)):
                self._end(request)
            yield request, event

    def _look(self, request: Request) -> Iterator[None]:
        """The prompt is encoded: let the control find out what it must know, a pass a turn."""
        if request.control is not None:
            key, prefix = mx.random.key(request.seed), request.session.prefix
            for positions in request.control.prepare(self.model, prefix, request.options, key):
                request.positions += positions
                yield

    def _step_group(self, key: Any) -> Iterator[tuple[Request, Event | Exception]]:
        group = self._groups[key]
        step = advance(group.batch, ahead=not any(waiting == key for waiting, _, _ in self._ready))
        requests, over = list(group.requests), []
        for i, request in enumerate(requests):
            if request.drafts and i not in step.overflowed:
                text = request.reader.preview(np.asarray(step.argmax[i]).tolist())
                shown = step.steps[i], step.argmax[i], step.accepted[i], step.entropy[i]
                yield request, Draft(request.blocks, *shown, text)
            if step.done[i] or step.steps[i] == request.options.max_denoising_steps:
                over.append(i)
        if over:
            self._leave(key, [requests[i] for i in over])
        for i in over:
            try:
                if i in step.overflowed:
                    requests[i].session.reset()
                    raise self.model.range_error()
                yield from self._end_block(requests[i], step, i)
            except INTERRUPTS:
                raise
            except BaseException as error:
                self._end(requests[i])
                yield requests[i], as_exception(error)

    def _end_block(self, request: Request, step: Step, i: int) -> Iterator[tuple[Request, Event]]:
        """Take a canvas that has settled, and go on with the next one or end."""
        reader, settled = request.reader, np.asarray(step.argmax[i]).tolist()
        tokens, log_probs = settled, np.log(np.asarray(step.confidence[i])).tolist()
        if request.options.thinking_budget is not None:
            tokens, log_probs = reader.close_thought(tokens, log_probs)
        block, request.blocks = request.blocks, request.blocks + 1
        request.steps += step.steps[i]
        request.positions += step.positions[i]
        ended = reader.feed(tokens, log_probs) is not None
        request.first_block = request.first_block or time.perf_counter() - request.started
        yield request, Block(block, step.steps[i], tuple(tokens), *reader.take(), tuple(log_probs))
        if ended:
            self._end(request)
            yield request, Finished(request.result(self._load_seconds))
            return
        if request.control:
            request.control.commit(tokens)
        request.session.commit(step.argmax[i : i + 1] if tokens is settled else mx.array([tokens], mx.int32))
        yield from self._begin_block(request)

    def _begin_block(self, request: Request) -> Iterator[tuple[Request, Event]]:
        """Ready a request's next canvas, if the context has room for it."""
        prefix, config, control = request.session.prefix, self.model.config, request.control
        if prefix.offset + config.canvas_length > config.text.max_position_embeddings:
            request.reader.cut("length")
        if request.reader.finish_reason is not None:  # or the passes before it have answered
            self._end(request)
            yield request, Finished(request.result(self._load_seconds))
            return
        request.key, key = mx.random.split(mx.random.key(request.seed) if request.key is None else request.key, 2)
        left = request.reader.left
        layout, guide = (control.layout(), control.guide(left)) if control else (None, None)
        # What a step does not depend on is left out, so that more requests are alike.
        options = replace(
            request.options,
            max_tokens=1,
            stop=(),
            thinking_budget=None,
            prefill_chunk=None,
            image_tokens=70,
            fps=1.0,
            max_frames=1,
            canvas="full" if request.options.canvas == "full" else "auto",
        )
        length = request.options.canvas_at(request.blocks, config.canvas_length)
        batch = CanvasBatch(self.model, [prefix], options, key[None], [left], layout, guide, length)
        alike = options, batch.length, layout is None, guide is None
        self._ready.append((alike, request, batch))

    def _join(self) -> None:
        """Let canvases that are ready join their groups where no step is under way."""
        waiting = []
        for key, request, batch in self._ready:
            group = self._groups.get(key)
            if group is None:
                self._groups[key] = _Group(batch, [request])
            elif group.batch.ahead is not None:
                waiting.append((key, request, batch))
            else:
                group.batch.append(batch)
                group.requests.append(request)
        self._ready = waiting

    def _leave(self, key: Any, requests: list[Request]) -> None:
        group = self._groups[key]
        rows = [i for i, request in enumerate(group.requests) if request not in requests]
        if not rows:
            del self._groups[key]
            return
        group.batch.select(rows)
        group.requests = [group.requests[i] for i in rows]
