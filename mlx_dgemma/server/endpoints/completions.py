"""POST /v1/completions: continue a text or fill the hole between two; and what editors' other endpoints share."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ...decoding.events import Block
from ...decoding.request import Request
from ...prompt.answer import held_back
from ...serving.scheduler import Accepted
from ...tasks import infill
from ...tasks.markers import Parts, parts_of_prompt
from ..events import FinishedAnswer, stats
from ..options import as_api_errors
from ..pipeline import Exchange
from ..schemas.editing import SAMPLING, Completion, Continued
from ..schemas.fields import reject
from ..settings import Settings

if TYPE_CHECKING:
    from ...engine import Engine

COLD = 0.5  # temperatures below it count as 0: canvases would settle before they are right
C = TypeVar("C", bound=Continued)


@dataclass
class StopCutter:
    """Cuts a text that arrives in pieces before the first stop string, or the first line that is indented too little.

    Attributes:
        stop: the stop strings.
        indent: blanks with which every line but the first must begin; 0: none.
        text: the text received so far, without what follows a stop string.
        sent: number of characters already returned.
        stopped: whether a stop string was found.
    """

    stop: list[str]
    indent: int = 0
    text: str = ""
    sent: int = 0
    stopped: bool = False

    def add(self, piece: str, last: bool = False) -> str:
        """Add a piece and return the new text that no stop string can cut off any more."""
        if self.stopped:
            return ""
        self.text += piece
        found = [at for one in self.stop if (at := self.text.find(one)) >= 0]
        if self.indent and (line := re.search(rf"\n[ \t]{{0,{self.indent - 1}}}(?=[^ \t\r\n])", self.text)):
            found.append(line.start())
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text)
        if not self.stopped and not last:  # the end of the text may begin a stop string
            end -= held_back(self.text, self.stop)
        new, self.sent = self.text[self.sent : end], max(end, self.sent)
        return new


def settled(body: C) -> tuple[C, list[str]]:
    """A body as the engine takes it, and the fields that change nothing here since a canvas takes its best text.

    Raises:
        ApiError: a limit of no tokens; token by token, a penalty or a `top_p` of 0.
    """
    canvas = body.mode in (None, "diffusion")
    changes: dict[str, Any] = {} if body.model else {"model": None}
    passed = [name for name in SAMPLING if canvas and getattr(body, name, None) is not None]
    changes |= dict.fromkeys(passed)
    for name in ("max_tokens", "max_completion_tokens"):
        if (limit := getattr(body, name, None)) == 0:
            reject(name, limit, "it should be a whole number, at least 1, or -1 for none")
        if limit == -1:
            changes[name] = None
    for name in () if canvas else ("frequency_penalty", "presence_penalty", "top_p"):
        if (value := getattr(body, name)) is not None and (value == 0) == (name == "top_p"):
            reject(name, value, "token by token does without it: leave it out, or take the mode diffusion")
    if canvas and body.temperature is not None and body.temperature < COLD:
        changes["temperature"] = 0.0
    return body.model_copy(update=changes), passed


class HoleExchange(Exchange):
    """A text to continue, or a hole in it to fill.

    Attributes:
        parts: what stands around the hole, and other files.
        PARAM: the field that errors in the text name.
    """

    PARAM = "prompt"

    def __init__(self, body: Any, engine: Engine, settings: Settings):
        body, passed = settled(body)
        super().__init__(body, engine, settings)
        names = {*self.ignored.get("x_ignored", ()), *passed}
        self.ignored = {"x_ignored": sorted(names)} if names else {}
        self.parts, editors = self.read_parts()
        if editors and body.seed is None:
            self.arguments["seed"] = 0
        stop = self.arguments.pop("stop", [])  # `infill` has none, so the server cuts the text
        self.cutters = [StopCutter(stop, getattr(body, "n_indent", None) or 0) for _ in range(body.choices)]
        self.arguments.pop("exact", None)

    @abstractmethod
    def read_parts(self) -> tuple[Parts, bool]:
        """What stands around the hole, and whether an editor asks, who wants the same text for the same key stroke."""

    def prepare(self, engine: Engine, arguments: dict[str, Any]) -> Request:
        """Make the request of one answer."""
        with as_api_errors(self.PARAM):
            prefix, suffix, files = self.parts
            return infill.infill(engine.builder, prefix, suffix, context=files, **arguments)

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The chunks of an event."""
        cutter = self.cutters[i]
        if isinstance(event, Accepted):
            yield self.chunk(self.piece(i, "", None))
        elif isinstance(event, Block):
            if text := cutter.add(event.text):
                yield self.chunk(self.piece(i, text, None))
        elif isinstance(event, FinishedAnswer):
            self.answers[i] = event
            yield self.chunk(self.piece(i, cutter.add("", last=True), self.reason(i, event)), stats=stats(event))
        else:
            yield self.draft(i, event)

    def choice(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """A whole answer as a choice of the body."""
        return self.piece(i, self.cutters[i].text, self.reason(i, answer))

    def piece(self, i: int, text: str, reason: str | None) -> dict[str, Any]:
        """A new piece of text as a choice of a chunk, or all of it as one of the body."""
        return {"text": text, "index": i, "logprobs": None, "finish_reason": reason}

    def reason(self, i: int, answer: FinishedAnswer) -> str:
        """Why a text ended."""
        return "stop" if self.cutters[i].stopped else answer.result.finish_reason


class CompletionExchange(HoleExchange):
    """A text to continue or to fill."""

    BODY = Completion
    KIND = ("cmpl", "text_completion", "text_completion")

    def __init__(self, body: Completion, engine: Engine, settings: Settings):
        super().__init__(_with_options(body), engine, settings)

    def read_parts(self) -> tuple[Parts, bool]:
        """The suffix's field or, without one, the markers of other models."""
        text = self.body.prompt if isinstance(self.body.prompt, str) else self.body.prompt[0]
        found = None if self.body.suffix else parts_of_prompt(text)
        return found or Parts(text, self.body.suffix or ""), found is not None


def _with_options(body: Completion) -> Completion:
    """A body with what Ollama's `options` say where it says nothing itself."""
    options, changes = body.options, {}
    for name in ("max_tokens", "temperature", "seed", "stop") if options else ():
        value = getattr(options, {"max_tokens": "num_predict"}.get(name, name))
        if value is not None and getattr(body, name) is None:
            changes[name] = value
    return body.model_copy(update=changes)
