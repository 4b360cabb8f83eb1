"""Ollama's API: /api/chat and /api/generate, and what its clients ask about models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ... import __version__
from ...prompt.messages import Message
from ..errors import ApiError
from ..options import check_model
from ..pipeline import Exchange
from ..schemas.fields import ignored, parse_body
from ..schemas.ollama import (
    LATEST,
    SHARED,
    OllamaBody,
    OllamaChat,
    OllamaGenerate,
    OllamaShow,
    ollama_messages,
    ollamas_name,
    prompt_messages,
)
from ..settings import Settings
from ..streaming import EventStream, LineStream, format_line
from .chat import ChatExchange
from .completions import CompletionExchange
from .models import ModelFacts

if TYPE_CHECKING:
    from ...engine import Engine

SPEAKS = "0.13.0"  # the version of Ollama's API that is followed; some clients refuse older ones
NEVER = "9999-12-31T23:59:59Z"  # when the model leaves memory
CHOSEN = "`mlx-dgemma serve --model` chooses the model"
ABSENT = {  # parts of Ollama's API that are not there, and why
    "pull": f"Nothing is downloaded here; {CHOSEN}.",
    "push": f"Nothing is uploaded here; {CHOSEN}.",
    "create": f"No model is made here; {CHOSEN}.",
    "copy": "No model is copied here; `mlx-dgemma serve --alias NAME` gives it another name.",
    "delete": f"No model is deleted here; {CHOSEN}.",
    "embed": "This model makes no embeddings; ask another server for them.",
    "embeddings": "This model makes no embeddings; ask another server for them.",
    "blobs": f"No files are kept here; {CHOSEN}.",
}


class Lines(Exchange):
    """Answers in Ollama's form: OpenAI's chunks and choices in other words. Stands before the exchange that has these.

    Attributes:
        asked: the body as it came.
    """

    FORMAT = staticmethod(format_line)
    STREAM: ClassVar[type[EventStream]] = LineStream
    ENDS = False
    asked: OllamaBody

    def reply(self, said: dict[str, Any]) -> dict[str, Any]:
        """The fields that say the text, the thought and the calls, from a delta, a message or a choice."""
        raise NotImplementedError

    def read_fields(self, settings: Settings) -> None:
        """Take from the body as it came what the answer tells of it."""
        fields = {ollamas_name(one) for one in self.ignored.get("x_ignored", ())}
        fields.update(one for one in ignored(self.asked) if one.removeprefix("options.") not in SHARED)
        self.ignored = {"x_ignored": sorted(fields)} if fields else {}
        self.model = self.asked.model or settings.model

    def events(self, i: int, event: Any) -> Iterator[dict[str, Any]]:
        """The lines of an event."""
        for chunk in super().events(i, event):  # type: ignore[safe-super]
            choice = chunk["choices"][0]
            said, last = choice.get("delta", choice), choice["finish_reason"] is not None
            if last or any(said.get(name) for name in ("content", "reasoning_content", "tool_calls", "text")):
                yield self._line(said, choice if last else None, chunk.get("stats"))

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        body = super().whole()
        choice = body["choices"][0]
        return self._line(choice.get("message", choice), choice, body["stats"])

    def loaded(self) -> dict[str, Any]:
        """The answer where nothing is asked: the model is loaded."""
        return {**self._begin({}), "done": True, "done_reason": "load", **self.ignored}

    def failed(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """A line that ends a stream."""
        return [{"error": str(error)}]

    def _begin(self, said: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "created_at": _now(), **self.reply(said)}

    def _line(self, said: dict[str, Any], end: dict[str, Any] | None, stats: Any) -> dict[str, Any]:
        if end is None:
            return {**self._begin(said), "done": False}
        seconds, log_probs = stats["seconds"], (end.get("logprobs") or {}).get("content")
        return {
            **self._begin(said),
            "done": True,
            "done_reason": "length" if end["finish_reason"] == "length" else "stop",
            "total_duration": _nanoseconds(seconds["total"]),
            "load_duration": 0,  # the model is there before the first request
            "prompt_eval_count": stats["prompt_tokens"],
            "prompt_eval_duration": _nanoseconds(seconds["prefill"]),
            "eval_count": stats["generated_tokens"],
            "eval_duration": _nanoseconds(seconds["denoise"]),
            **({"logprobs": log_probs} if log_probs else {}),
            **self.ignored,
        }


class OllamaChatExchange(Lines, ChatExchange):
    """Messages to answer."""

    BODY = OllamaChat
    asked: OllamaChat

    def __init__(self, asked: OllamaChat, engine: Engine, settings: Settings):
        self.asked = asked
        super().__init__(asked.chat(tools=asked.tools), engine, settings)
        self.read_fields(settings)
        self.at_once = None if asked.messages else self.loaded()

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        return ollama_messages(self.asked)

    def reply(self, said: dict[str, Any]) -> dict[str, Any]:
        """The message of an answer."""
        message = {"role": "assistant", "content": said.get("content") or ""}
        if thought := said.get("reasoning_content"):
            message["thinking"] = thought
        if calls := said.get("tool_calls"):
            message["tool_calls"] = [_call(k, call) for k, call in enumerate(calls)]
        return {"message": message}


class OllamaPromptExchange(Lines, ChatExchange):
    """A prompt to answer as a chat of one message."""

    asked: OllamaGenerate

    def __init__(self, asked: OllamaGenerate, engine: Engine, settings: Settings):
        self.asked = asked
        super().__init__(asked.chat(), engine, settings)
        self.read_fields(settings)
        self.at_once = None if asked.prompt or asked.images else self.loaded()

    def read_messages(self) -> list[Message]:
        """The messages as `Engine.prepare` takes them."""
        return prompt_messages(self.asked)

    def reply(self, said: dict[str, Any]) -> dict[str, Any]:
        """The text of an answer, and its thought."""
        thought = said.get("reasoning_content")
        return {"response": said.get("content") or "", **({"thinking": thought} if thought else {})}


class OllamaTextExchange(Lines, CompletionExchange):
    """A text to continue, or a hole to fill."""

    asked: OllamaGenerate

    def __init__(self, asked: OllamaGenerate, engine: Engine, settings: Settings):
        self.asked = asked
        super().__init__(asked.completion(), engine, settings)
        self.read_fields(settings)
        self.at_once = None if asked.prompt or asked.suffix else self.loaded()

    def reply(self, said: dict[str, Any]) -> dict[str, Any]:
        """The text of an answer."""
        return {"response": said.get("text") or ""}


class OllamaGenerateExchange(OllamaPromptExchange):
    """What /api/generate answers: a prompt, or with `suffix` or `raw` a text."""

    BODY = OllamaGenerate

    @classmethod
    def read(cls, text: bytes, engine: Engine, settings: Settings) -> Exchange:
        """The exchange of a request's body."""
        asked = parse_body(OllamaGenerate, text)
        return (OllamaTextExchange if asked.suffix or asked.raw else cls)(asked, engine, settings)


async def tags(request: Request) -> Response:
    """GET /api/tags: the names of the model."""
    facts = request.app.state.facts
    return JSONResponse({"models": [_listed(facts, name) for name in facts.names]})


async def running(request: Request) -> Response:
    """GET /api/ps: the loaded model."""
    facts = request.app.state.facts
    more = {"expires_at": NEVER, "size_vram": facts.nbytes, "context_length": facts.context}
    return JSONResponse({"models": [{**_listed(facts, facts.names[0]), **more}]})


async def version(_: Request) -> Response:
    """GET /api/version."""
    return JSONResponse({"version": SPEAKS, "mlx_dgemma": __version__})


async def show(request: Request) -> Response:
    """POST /api/show: what the model is and can do."""
    asked = parse_body(OllamaShow, await request.body())
    name = asked.model or asked.name
    check_model(name and name.removesuffix(LATEST), request.app.state.settings)
    facts = request.app.state.facts
    return JSONResponse(
        {
            "modelfile": f"# served by mlx-dgemma {__version__}\nFROM {facts.names[0]}\n",
            "parameters": "",
            "template": "{{ .Prompt }}",  # the checkpoint's own template is no Go template
            "details": _details(facts),
            "model_info": {
                "general.architecture": facts.architecture,
                "general.basename": facts.names[0],
                "general.parameter_count": facts.parameters,
                f"{facts.architecture}.context_length": facts.context,
                f"{facts.architecture}.embedding_length": facts.hidden_size,
                f"{facts.architecture}.block_count": facts.layers,
                f"{facts.architecture}.vocab_size": facts.vocabulary,
            },
            "capabilities": list(facts.capabilities),
            "modified_at": _time(facts.modified),
        }
    )


def absent(path: str) -> str | None:
    """Why there is no such path of Ollama's API here."""
    return ABSENT.get(path.removeprefix("/api/").split("/")[0]) if path.startswith("/api/") else None


def _listed(facts: ModelFacts, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": _time(facts.modified),
        "size": facts.nbytes,
        "digest": facts.digest,
        "details": _details(facts),
    }


def _details(facts: ModelFacts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": facts.size_in_words,
        "quantization_level": facts.quantization,
    }


def _call(k: int, call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.loads(function["arguments"])
    return {"id": call["id"], "function": {"index": k, "name": function["name"], "arguments": arguments}}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 10**9)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), timezone.utc).isoformat().replace("+00:00", "Z")
