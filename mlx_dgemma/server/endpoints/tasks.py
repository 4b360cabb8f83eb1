"""POST /v1/edits and /v1/fill: a text rewritten as an instruction says, and a template whose holes are filled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...decoding.events import Block
from ...decoding.request import Request
from ...serving.scheduler import Accepted
from ...tasks import edit, fill
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import Exchange
from ..schemas.editing import Edit, Fill
from ..schemas.fields import reject
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine


class TaskExchange(Exchange):
    """A text that is known only when it is whole; a stream tells it in its last chunk."""

    def __init__(self, body: Any, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        self.arguments.pop("exact", None)

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The chunks of an event."""
        if isinstance(event, Accepted):
            yield self.chunk({"index": i, "text": "", "finish_reason": None})
        elif isinstance(event, FinishedAnswer):
            self.answers[i] = event
            yield self.chunk(self.choice(i, event), stats=stats(event))
        elif not isinstance(event, Block):
            yield self.draft(i, event)

    @abstractmethod
    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """A whole answer as a choice of the body, and of the last chunk."""


class EditExchange(TaskExchange):
    """A text and an instruction."""

    BODY = Edit
    KIND = ("edit", "edit", "edit.chunk")

    def __init__(self, body: Edit, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        for name, text in (("input", body.input), ("instruction", body.instruction)):
            if not text.strip():
                reject(name, text, "it should be a text that is not empty")

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer."""
        if self.body.strength is not None:
            arguments["strength"] = self.body.strength
        with as_api_errors("input"):
            return edit.edit(engine.builder, self.body.input, self.body.instruction, **arguments)

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """The new text."""
        return {"index": i, "text": answer.result.text, "finish_reason": answer.result.finish_reason}


class FillExchange(TaskExchange):
    """A template and the texts that its holes may have."""

    BODY = Fill
    KIND = ("fill", "fill", "fill.chunk")

    def __init__(self, body: Fill, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        if body.prompt is not None and not body.prompt.strip():
            reject("prompt", body.prompt, "it should be a text that is not empty: leave it out, or write what to do")

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer."""
        with as_api_errors("template", holes="holes", template="template", hole="holes", pattern="holes"):
            return fill.fill(engine.builder, self.body.template, self.body.holes, prompt=self.body.prompt, **arguments)

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """The text, and what stands in each hole."""
        result = answer.result
        return {"index": i, "text": result.text, "holes": result.holes, "finish_reason": result.finish_reason}
