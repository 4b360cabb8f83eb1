"""POST /infill and /completion as llama.cpp has them, and POST /v1/fim/completions as Mistral has it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from ...tasks.markers import Parts, parts_of_prompt
from ..errors import ApiError
from ..events import FinishedAnswer, stats
from ..schemas.editing import LlamaInfill, MistralFill
from ..schemas.fields import reject_missing
from ..settings import Settings
from .completions import HoleExchange

if TYPE_CHECKING:
    from ...engine import Engine


class LlamaInfillExchange(HoleExchange):
    """A hole in llama.cpp's shapes. A request of no tokens is answered at once."""

    BODY = LlamaInfill
    KIND = ("infill", "infill", "infill")
    PARAM = "input_prefix"
    ENDS = False

    def __init__(self, body: LlamaInfill, engine: Engine, settings: Settings):
        limit = body.limit
        changes: dict[str, Any] = {"n_predict": limit, "max_tokens": limit or None}
        if body.choices == 0:  # fills a cache there
            changes["stream"] = None
        if body.seed == -1:
            changes["seed"] = secrets.randbits(32)
        super().__init__(body.model_copy(update=changes), engine, settings)

    def read_parts(self) -> tuple[Parts, bool]:
        """The fields for both sides; of `prompt` alone, its markers."""
        body = self.body
        files = [f"{one.filename}\n{one.text}" if one.filename else one.text for one in body.input_extra or ()]
        if body.input_prefix is body.input_suffix is None:
            if body.prompt is None:
                reject_missing("prompt" if self.PARAM == "prompt" else "input_prefix")
            prefix, suffix, more = parts_of_prompt(body.prompt) or Parts(body.prompt, "")
            return Parts(prefix, suffix, (*files, *more)), True
        return Parts((body.input_prefix or "") + (body.prompt or ""), body.input_suffix or "", tuple(files)), True

    def chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        """An event: a piece of the text; the last one has everything that the one body has."""
        answer = self.answers.get(choice["index"])
        told = {**self._body(choice["index"], answer), "content": choice["text"]} if answer else {}
        return {"index": choice["index"], "content": choice["text"], "stop": answer is not None, **told}

    def whole(self) -> Any:
        """The one body, or a list of several."""
        bodies = [self._chosen(self._body(i, self.answers[i])) for i in sorted(self.answers)]
        if not self.body.choices:
            bodies = [self._chosen({"index": 0, "content": "", "stop": True, "model": self.model, **self.ignored})]
        return bodies[0] if len(bodies) == 1 else bodies

    def _body(self, i: int, answer: FinishedAnswer) -> dict[str, Any]:
        """An answer in llama.cpp's shape."""
        told = answer.result.stats
        read, written = told.prompt_tokens - told.reused_tokens, len(answer.result.tokens)
        stopped = self.cutters[i].stopped
        return {
            "index": i,
            "content": self.cutters[i].text,
            "stop": True,
            "model": self.model,
            "stop_type": "word" if stopped else "limit" if self.reason(i, answer) == "length" else "eos",
            "tokens_predicted": written,
            "tokens_evaluated": told.prompt_tokens,
            "tokens_cached": told.prompt_tokens + written,
            "truncated": False,
            "generation_settings": {"n_predict": self.arguments.get("max_tokens", -1), "seed": told.seed},
            "timings": {
                "cache_n": told.reused_tokens,
                **_timings("prompt", read, told.seconds["prefill"]),
                **_timings("predicted", written, told.seconds["denoise"]),
            },
            "stats": stats(answer),
            **self.ignored,
        }

    def _chosen(self, body: dict[str, Any]) -> dict[str, Any]:
        """The fields of a body that are asked for, each under its path."""
        if self.body.response_fields is None:
            return body
        found = {}
        for path in self.body.response_fields:
            value: Any = body
            for name in path.split("/"):
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                found[path] = value
        return found


class LlamaCompletionExchange(LlamaInfillExchange):
    """A prompt in llama.cpp's shape."""

    KIND = ("completion", "completion", "completion")
    PARAM = "prompt"

    def read_parts(self) -> tuple[Parts, bool]:
        """A prompt alone."""
        for name in ("input_prefix", "input_suffix"):
            if getattr(self.body, name) is not None:
                raise ApiError(f"{name} is given, but it belongs to /infill; put the text into prompt.", name)
        return super().read_parts()


class MistralFillExchange(HoleExchange):
    """A hole in Mistral's shapes, which are those of a chat."""

    BODY = MistralFill
    KIND = ("fim", "chat.completion", "chat.completion.chunk")

    def __init__(self, body: MistralFill, engine: Engine, settings: Settings):
        if body.seed is None:
            body = body.model_copy(update={"seed": body.random_seed})
        super().__init__(body, engine, settings)

    def read_parts(self) -> tuple[Parts, bool]:
        """The two fields or, without a suffix, the markers of other models."""
        found = None if self.body.suffix else parts_of_prompt(self.body.prompt)
        return found or Parts(self.body.prompt, self.body.suffix or ""), True

    def piece(self, i: int, text: str, reason: str | None) -> dict[str, Any]:
        """A piece of text as the content of a message or, in a stream, of what is new in it."""
        where = "delta" if self.body.stream else "message"
        return {"index": i, where: {"role": "assistant", "content": text}, "finish_reason": reason}


def _timings(what: str, count: int, seconds: float) -> dict[str, float]:
    milliseconds = seconds * 1000
    return {
        f"{what}_n": count,
        f"{what}_ms": milliseconds,
        f"{what}_per_token_ms": milliseconds / max(count, 1),
        f"{what}_per_second": count / seconds if seconds else 0.0,
    }
