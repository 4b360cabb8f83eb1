"""POST /v1/completions: continue a text or, with a suffix, fill the hole between two texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...decoding.events import Block
from ...decoding.request import Request
from ...prompt.answer import held_back
from ...serving.scheduler import Accepted
from ...tasks import infill
from ...tasks.infill import LONGEST
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import Exchange
from ..schemas.bodies import Completion
from ..schemas.fields import reject
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine


@dataclass
class StopCutter:
    """Cuts a text that arrives in pieces before the first stop string.

    Attributes:
        stop: the stop strings.
        text: the text received so far, without what follows a stop string.
        sent: number of characters already returned.
        stopped: whether a stop string was found.
    """

    stop: list[str]
    text: str = ""
    sent: int = 0
    stopped: bool = False

    def add(self, piece: str, last: bool = False) -> str:
        """Add a piece and return the new text that no stop string can cut off any more."""
        if self.stopped:
            return ""
        self.text += piece
        found = [at for one in self.stop if (at := self.text.find(one)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text)
        if not self.stopped and not last:  # the end of the text may begin a stop string
            end -= held_back(self.text, self.stop)
        new, self.sent = self.text[self.sent : end], max(end, self.sent)
        return new


class CompletionExchange(Exchange):
    """A text to continue or to fill."""

    BODY = Completion
    KIND = ("cmpl", "text_completion", "text_completion")

    def __init__(self, body: Completion, engine: Engine, settings: Settings):
        super().__init__(body, engine, settings)
        self.prefix = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
        stop = self.arguments.pop("stop", [])  # `infill` has none, so the server cuts the text
        self._cutters = [StopCutter(stop) for _ in range(body.choices)]
        self.arguments.pop("exact", None)
        if body.suffix and (limit := self.arguments.pop("max_tokens", LONGEST)) < LONGEST:
            why = f"the length of a hole is found by looking at up to {LONGEST} tokens: give that many or more"
            reject("max_tokens", limit, why)

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer."""
        with as_api_errors("prompt"):
            return infill.infill(engine.builder, self.prefix, self.body.suffix or "", **arguments)

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The chunks of an event."""
        cutter = self._cutters[i]
        if isinstance(event, Accepted):
            yield self.chunk(_choice(i, "", None))
        elif isinstance(event, Block):
            if text := cutter.add(event.text):
                yield self.chunk(_choice(i, text, None))
        elif isinstance(event, FinishedAnswer):
            self.answers[i] = event
            yield self.chunk(_choice(i, cutter.add("", last=True), self._reason(i, event)), stats=stats(event))
        else:
            yield self.draft(i, event)

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """A whole answer as a choice of the body."""
        return _choice(i, self._cutters[i].text, self._reason(i, answer))

    def _reason(self, i: int, answer: FinishedAnswer) -> str:
        return "stop" if self._cutters[i].stopped else answer.result.finish_reason


def _choice(i: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": i, "logprobs": None, "finish_reason": reason}
