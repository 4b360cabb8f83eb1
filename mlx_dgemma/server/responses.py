"""POST /v1/responses: a chat request in OpenAI's newer form, which is read as the chat request that means the same."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..decoding.events import Block
from ..decoding.request import Request
from ..serving.scheduler import Accepted
from .chat import Chat, read_chat
from .errors import ApiError
from .fields import Fields, read
from .follow import follow_all
from .items import Reply, messages_of_input
from .options import FLAGS, NUMBERS, WHOLES
from .reading import Done, Reading, stats, usage
from .sending import LOG, EventStream, begun, unless_gone
from .settings import Settings

if TYPE_CHECKING:
    from ..engine import Engine


SAME = (  # fields that mean the same in a chat request
    "model", "stream", "stream_options", "drafts", "user", "safety_identifier", "prompt_cache_key", "metadata",
    "store", "service_tier", "seed", "stop", "temperature", "top_p", "top_logprobs", "regex", "thinking",
    "parallel_tool_calls", *FLAGS, *WHOLES, *NUMBERS,
)  # fmt: skip
RENAMED = (  # what a chat request calls otherwise, for errors
    (r"\b(tools\[\d+\]|tool_choice)\.function\b", r"\1"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"^messages\b", "input"),
)
LABELS, NAME, LABEL = 16, 64, 512  # pairs of metadata, characters of a name and of a value


async def responses(request: HttpRequest) -> Response:
    """Answer input items, as a whole or as events."""
    scheduler, settings = request.app.state.scheduler, request.app.state.settings
    asked, repeated = read_response(await read(request), scheduler.engine, settings)
    prepares = [_prepare(asked, scheduler.engine)]
    events = follow_all(scheduler, prepares, asked.form.drafts, Reading(scheduler.engine))
    reply = Reply(repeated)
    told = _events(asked, reply, events)
    if asked.form.stream:
        return EventStream(await begun(request, _safe(reply, told)), done=False)
    return JSONResponse(await unless_gone(request, _whole(told)))


def read_response(fields: Fields, engine: Engine, settings: Settings) -> tuple[Chat, dict[str, Any]]:
    """Read the body: the chat request that means the same, and the fields that the response repeats.

    Raises:
        ApiError: anything in it cannot be honoured.
    """
    messages = messages_of_input(fields, settings.pictures)
    chat = {name: fields.take(name) for name in SAME}
    chat["max_completion_tokens"] = fields.take("max_output_tokens")
    chat["tools"] = [_nested(tool, "function") for tool in fields.array("tools", [])]
    choice = chat["tool_choice"] = _nested(fields.take("tool_choice"), "function")
    text: dict[str, Any] = {"format": {"type": "text"}}
    if given := fields.object("text"):
        form = given.take("format")
        kind = form.get("type") if isinstance(form, dict) else None
        chat["response_format"] = _nested(form, "json_schema") if kind == "json_schema" else form
        given.only("verbosity", "medium", why="it cannot be chosen: leave it out, or ask in words")
        given.done()
        text["format"] = form or text["format"]
    if reasoning := fields.object("reasoning"):
        chat["reasoning_effort"] = reasoning.take("effort")
        for name in ("summary", "generate_summary"):
            reasoning.only(name, why="nothing is summed up: the whole thinking is told, leave it out")
        reasoning.done()
    if labels := fields.object("metadata"):
        for name in labels.given:
            if len(labels.text(name, "")) > LABEL or len(name) > NAME or len(labels.given) > LABELS:
                fields.refuse("metadata", f"there may be {LABELS} pairs, {NAME} characters a name, {LABEL} a value")
    gone = "nothing is stored here: send the whole conversation as input"
    fields.only("previous_response_id", why=gone)
    fields.only("conversation", why=gone)
    fields.only("background", False, why="nothing is stored here that could be asked for later: leave it out")
    fields.only("include", [], why="there is nothing more to include: leave it out")
    fields.only("truncation", "disabled", why="nothing is left out of a long input: shorten it")
    fields.done()
    with _renamed():
        asked = read_chat(Fields(chat), engine, settings, messages)
    tools = [{"type": "function", "strict": False, **tool["function"]} for tool in asked.arguments.get("tools", [])]
    repeated = {
        "model": asked.form.model,
        "background": False,
        "instructions": fields.given.get("instructions"),
        "max_output_tokens": fields.given.get("max_output_tokens"),
        "metadata": fields.given.get("metadata") or {},
        "parallel_tool_calls": fields.given.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": chat.get("reasoning_effort"), "summary": None},
        "store": False,
        "temperature": fields.given.get("temperature"),
        "text": text,
        "tool_choice": fields.given.get("tool_choice") if choice else "auto",
        "tools": tools,
        "top_p": fields.given.get("top_p"),
        "truncation": "disabled",
        "user": fields.given.get("user"),
    }
    return asked, repeated


def _nested(given: Any, name: str) -> Any:
    """{"type", ...} with what is beside the type in an object of its own, as chat requests have it."""
    if not isinstance(given, dict):
        return given
    rest = {key: value for key, value in given.items() if key != "type"}
    return {"type": given.get("type"), name: rest}


@contextmanager
def _renamed() -> Iterator[None]:
    """Let errors of the chat request name what was asked; quoted values stay as they are."""
    try:
        yield
    except ApiError as error:
        param, message = error.param, re.split(r"('[^']*'|\"[^\"]*\")", str(error))
        for old, new in RENAMED:
            param = param and re.sub(old, new, param)
            message[::2] = [re.sub(old, new, part) for part in message[::2]]
        raise ApiError("".join(message), param, error.status, error.code, error.headers) from None


def _prepare(asked: Chat, engine: Engine) -> Callable[[], Request]:
    prepare = asked.prepare(engine, 0)

    def renamed() -> Request:
        with _renamed():
            return prepare()

    return renamed


async def _events(asked: Chat, reply: Reply, events: AsyncGenerator[tuple[int, Any]]) -> AsyncGenerator[dict[str, Any]]:
    async with aclosing(events):
        async for _, event in events:
            if isinstance(event, Accepted):
                told = reply.begin()
            elif isinstance(event, Block):
                told = reply.grow(event.thinking, "" if asked.forced else event.text)
            elif isinstance(event, Done):
                whole = asked.finish_reason(event) != "length"
                told = reply.finish(asked.calls(event), whole, usage=_usage(event), stats=stats(event))
            else:
                told = reply.draft(event)
            for one in told:
                yield one


async def _whole(told: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async with aclosing(told):
        async for event in told:
            last = event
    return last["response"]


async def _safe(reply: Reply, told: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
    """The same events; what goes wrong after the first of them is told by one more."""
    try:
        async with aclosing(told):
            async for event in told:
                yield event
    except Exception as error:
        if not reply.begun:
            raise
        if not isinstance(error, ApiError):
            LOG.exception("An answer failed after its stream began.")
        for event in reply.fail(str(error) if isinstance(error, ApiError) else "The server failed; its log says why."):
            yield event


def _usage(done: Done) -> dict[str, Any]:
    took = usage([done])
    return {
        "input_tokens": took["prompt_tokens"],
        "input_tokens_details": {**took["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": took["completion_tokens"],
        "output_tokens_details": took["completion_tokens_details"],
        "total_tokens": took["total_tokens"],
    }
