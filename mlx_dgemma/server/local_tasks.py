"""The tasks of commands that ask over the Unix socket, as requests for the scheduler and as lines of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from ..decoding.events import Block, Draft, Finished, Result
from ..decoding.options import GenerationOptions
from ..decoding.request import Request
from ..errors import DgemmaError, OptionError
from ..prompt.drafts import uncertain_text
from ..prompt.messages import messages_of, parts_of
from ..serving.tickets import Accepted
from ..tasks import choose, edit, infill
from ..tasks.decide import Decision, decide
from ..tasks.labels import questions_of
from .errors import ApiError

if TYPE_CHECKING:
    from ..engine import Engine

OPTIONS = {field.name for field in fields(GenerationOptions)}
COLLECTED: ContextVar[list[str] | None] = ContextVar("COLLECTED", default=None)  # warnings about a request


@contextmanager
def collected() -> Iterator[list[str]]:
    """The warnings of what runs here, once `collect_warnings` was called.

    Raises:
        ApiError: in place of wrong usage, with the code "usage".
    """
    found: list[str] = []
    token = COLLECTED.set(found)
    try:
        yield found
    except DgemmaError as error:
        if error.exit_code != OptionError.exit_code:
            raise
        raise ApiError(str(error), code="usage") from None
    finally:
        COLLECTED.reset(token)


class Task:
    """A text that is generated.

    Args:
        make: makes the request of an engine, the arguments and the keywords.
        engine: what is asked.
        body: `arguments` and `keywords` of the task.
    """

    def __init__(self, make: Callable[..., Request], engine: Engine, body: dict[str, Any]):
        self._make, self._engine = make, engine
        self._arguments, self._keywords = body["arguments"], body["keywords"]
        self._options = engine.options
        self._warnings: list[str] = []

    def prepares(self) -> Sequence[Callable[[], Request]]:
        """What makes the requests, on threads of the scheduler's."""
        return [self._prepare]

    def translate(self, event: Draft | Block | Finished) -> dict[str, Any]:
        """An event as a line, on the scheduler's thread, which alone may read arrays."""
        if isinstance(event, Draft):
            pieces = uncertain_text(event, self._engine.tokenizer, self._engine.options.end_tokens)
            return {"draft": {"block": event.block, "step": event.step, "pieces": pieces}}
        if isinstance(event, Block):
            return {"block": {"text": event.text, "thinking": event.thinking}}
        return {"result": asdict(event.result)}

    def told(self, i: int, event: Accepted | dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines for an event of request `i`, which `translate` has made one unless it is the first."""
        if isinstance(event, Accepted):
            yield {"accepted": {"options": asdict(self._options), "warnings": self._warnings}}
        else:
            yield event

    def end(self) -> Sequence[dict[str, Any]]:
        """The last lines, on any thread."""
        return ()

    def _prepare(self) -> Request:
        with collected() as found:
            self._take_options(self._keywords)
            request = self._make(self._engine, *self._arguments, **self._keywords)
        self._warnings += found
        return request

    def _take_options(self, keywords: dict[str, Any]) -> None:
        """Settle the options, and decode the pictures in the lane of the server's threads."""
        self._options = self._engine.options.override(
            **{name: value for name, value in keywords.items() if name in OPTIONS}
        )
        messages = self._arguments[0] if isinstance(self._arguments[0], list) else []
        for part in parts_of(messages, "image"):
            self._engine.builder.load_part(part, self._options.image_tokens)


class Choosing(Task):
    """Labels that are weighed, as `choose` does it."""

    def __init__(self, engine: Engine, body: dict[str, Any]):
        super().__init__(lambda *_, **__: None, engine, body)  # type: ignore[arg-type,return-value]
        keywords = dict(self._keywords)
        self._answer, self._calibrate = keywords.pop("answer"), keywords.pop("calibrate")
        self._seed, self._given = keywords.pop("seed"), keywords
        kind, values = self._arguments[1]
        self._labels = range(*values) if kind == "range" else bool if kind == "bool" else values
        self._readings: dict[int, Decision] = {}
        self._results: dict[int, Result] = {}

    def prepares(self) -> Sequence[Callable[[], Request]]:
        """The question, and what is asked to calibrate."""
        return [partial(self._decision, i) for i in range(2 if self._calibrate else 1)]

    def _decision(self, i: int) -> Request:
        with collected() as found:
            self._take_options(self._given)
            builder = self._engine.builder
            self._plan = choose.plan_of(builder.tokenizer, builder.config, questions_of(self._labels), self._answer)
            messages = messages_of(self._arguments[0])
            asked = choose.neutral_of(messages) if i else messages
            request, self._readings[i] = decide(builder, asked, self._plan, self._seed, self._options)
        self._warnings += found
        return request

    def translate(self, event: Draft | Block | Finished) -> Any:
        """Only the end counts: there is no text."""
        return event.result if isinstance(event, Finished) else None

    def told(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """Nothing before the end."""
        if isinstance(event, Result):
            self._results[i] = event
        yield from ()

    def end(self) -> Sequence[dict[str, Any]]:
        """The choice, with its labels and questions in lists, since keys of JSON are texts."""
        said = [self._readings[i].said for i in sorted(self._readings)]
        with collected() as found:
            read, named = choose.read_questions(self._plan.questions, said, self._answer is not None)
        results = [self._results[i] for i in sorted(self._results)]
        stats = results[0].stats
        whole = {
            "named": named,
            "prompt_tokens": stats.prompt_tokens,
            "canvases": len(self._plan.fixed) * len(results),
            "images": stats.images,
            "seconds": sum(one.stats.seconds["total"] for one in results),
            "peak_memory_bytes": stats.peak_memory_bytes,
            "seed": stats.seed,
        }
        read_pairs = [[name, list(one.items())] for name, one in read.items()]
        return [{"choice": {"probabilities": read_pairs, **whole}, "warnings": [*self._warnings, *found]}]


def _generate(engine: Engine, messages: list[dict[str, Any]], **keywords: Any) -> Request:
    return engine.prepare(messages, **keywords)


def _infill(engine: Engine, prefix: str, suffix: str, **keywords: Any) -> Request:
    return infill.infill(engine.builder, prefix, suffix, **keywords)


def _edit(engine: Engine, text: str, instruction: str, **keywords: Any) -> Request:
    return edit.edit(engine.builder, text, instruction, **keywords)


TASKS: dict[str, Callable[[Engine, dict[str, Any]], Task]] = {
    "generate": partial(Task, _generate),
    "infill": partial(Task, _infill),
    "edit": partial(Task, _edit),
    "choose": Choosing,
}
