"""POST /v1/responses: OpenAI's newer API. Each request is translated into the equivalent chat request."""

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
from .chat import ChatRequest, parse_chat
from .errors import ApiError
from .events import EventTranslator, FinishedAnswer, stats, usage
from .fields import Fields, read_body
from .follow import follow_all
from .items import ResponseBuilder, ResponseEvent, parse_input
from .options import FLAGS, INTEGER_LIMITS, NUMBER_LIMITS, TOKEN_LIMITS, TOKEN_NUMBER_LIMITS
from .settings import Settings
from .streaming import LOG, EventStream, after_first_event, cancel_on_disconnect

if TYPE_CHECKING:
    from ..engine import Engine


SHARED_FIELDS = (  # fields with the same name and meaning in a chat request
    "model", "stream", "stream_options", "drafts", "user", "safety_identifier", "prompt_cache_key", "metadata",
    "store", "service_tier", "seed", "stop", "temperature", "top_p", "top_logprobs", "regex", "thinking",
    "parallel_tool_calls", *FLAGS, *INTEGER_LIMITS, *NUMBER_LIMITS, "mode", *TOKEN_LIMITS,
    *TOKEN_NUMBER_LIMITS,
)  # fmt: skip
RENAMED_FIELDS = (  # (pattern of a chat request's field, its name here), for error messages
    (r"\b(tools\[\d+\]|tool_choice)\.function\b", r"\1"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\breasoning_effort\b", "reasoning.effort"),
    (r"^messages\b", "input"),
)
MAX_LABELS = 16  # pairs of `metadata`
MAX_LABEL_NAME, MAX_LABEL_VALUE = 64, 512  # characters


async def responses(request: HttpRequest) -> Response:
    """Answer input items, with one JSON body or with server-sent events."""
    scheduler, settings = request.app.state.scheduler, request.app.state.settings
    chat, echoed = parse_response(await read_body(request), scheduler.engine, settings)
    prepares = [_prepare(chat, scheduler.engine)]
    events = follow_all(scheduler, prepares, chat.delivery.drafts, EventTranslator(scheduler.engine))
    builder = ResponseBuilder(echoed)
    response_events = _response_events(chat, builder, events)
    if chat.delivery.stream:
        events_or_failure = _with_failure_event(builder, response_events)
        return EventStream(await after_first_event(request, events_or_failure), done=False)
    return JSONResponse(await cancel_on_disconnect(request, _body(response_events)))


def parse_response(fields: Fields, engine: Engine, settings: Settings) -> tuple[ChatRequest, dict[str, Any]]:
    """Parse the body into the equivalent chat request and the fields that the response repeats.

    Raises:
        ApiError: a field is wrong or not supported.
    """
    messages = parse_input(fields, settings.pictures)
    chat_fields = {name: fields.get(name) for name in SHARED_FIELDS}
    chat_fields["max_completion_tokens"] = fields.get("max_output_tokens")
    chat_fields["tools"] = [_nested(tool, "function") for tool in fields.array("tools", [])]
    choice = chat_fields["tool_choice"] = _nested(fields.get("tool_choice"), "function")
    text: dict[str, Any] = {"format": {"type": "text"}}
    if text_fields := fields.object("text"):
        text_format = text_fields.get("format")
        kind = text_format.get("type") if isinstance(text_format, dict) else None
        chat_fields["response_format"] = _nested(text_format, "json_schema") if kind == "json_schema" else text_format
        text_fields.allow_only("verbosity", "medium", why="it cannot be chosen: leave it out, or ask in words")
        text_fields.reject_unknown()
        text["format"] = text_format or text["format"]
    if reasoning := fields.object("reasoning"):
        chat_fields["reasoning_effort"] = reasoning.get("effort")
        for name in ("summary", "generate_summary"):
            reasoning.allow_only(name, why="nothing is summed up: the whole thinking is told, leave it out")
        reasoning.reject_unknown()
    if labels := fields.object("metadata"):
        for name in labels.data:
            if (
                len(labels.text(name, "")) > MAX_LABEL_VALUE
                or len(name) > MAX_LABEL_NAME
                or len(labels.data) > MAX_LABELS
            ):
                limits = f"{MAX_LABELS} pairs, {MAX_LABEL_NAME} characters a name, {MAX_LABEL_VALUE} a value"
                fields.reject("metadata", f"there may be {limits}")
    not_stored = "nothing is stored here: send the whole conversation as input"
    fields.allow_only("previous_response_id", why=not_stored)
    fields.allow_only("conversation", why=not_stored)
    fields.allow_only("background", False, why="nothing is stored here that could be asked for later: leave it out")
    fields.allow_only("include", [], why="there is nothing more to include: leave it out")
    fields.allow_only("truncation", "disabled", why="nothing is left out of a long input: shorten it")
    fields.reject_unknown()
    with _renamed_errors():
        chat = parse_chat(Fields(chat_fields), engine, settings, messages)
    tools = [{"type": "function", "strict": False, **tool["function"]} for tool in chat.arguments.get("tools", [])]
    echoed = {
        "model": chat.delivery.model,
        "background": False,
        "instructions": fields.data.get("instructions"),
        "max_output_tokens": fields.data.get("max_output_tokens"),
        "metadata": fields.data.get("metadata") or {},
        "parallel_tool_calls": fields.data.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": chat_fields.get("reasoning_effort"), "summary": None},
        "store": False,
        "temperature": fields.data.get("temperature"),
        "text": text,
        "tool_choice": fields.data.get("tool_choice") if choice else "auto",
        "tools": tools,
        "top_p": fields.data.get("top_p"),
        "truncation": "disabled",
        "user": fields.data.get("user"),
    }
    return chat, echoed


def _nested(value: Any, name: str) -> Any:
    """Move the fields beside "type" into an object called `name`, as in chat requests."""
    if not isinstance(value, dict):
        return value
    rest = {key: item for key, item in value.items() if key != "type"}
    return {"type": value.get("type"), name: rest}


@contextmanager
def _renamed_errors() -> Iterator[None]:
    """Rename the chat request's fields in errors to those of this API. Quoted values are left unchanged."""
    try:
        yield
    except ApiError as error:
        param, message = error.param, re.split(r"('[^']*'|\"[^\"]*\")", str(error))
        for old, new in RENAMED_FIELDS:
            param = param and re.sub(old, new, param)
            message[::2] = [re.sub(old, new, part) for part in message[::2]]
        raise ApiError("".join(message), param, error.status, error.code, error.headers) from None


def _prepare(chat: ChatRequest, engine: Engine) -> Callable[[], Request]:
    prepare = chat.prepare(engine, 0)

    def prepare_with_renamed_errors() -> Request:
        with _renamed_errors():
            return prepare()

    return prepare_with_renamed_errors


async def _response_events(
    chat: ChatRequest, builder: ResponseBuilder, events: AsyncGenerator[tuple[int, Any]]
) -> AsyncGenerator[ResponseEvent]:
    async with aclosing(events):
        async for _, event in events:
            if isinstance(event, Accepted):
                response_events = builder.start()
            elif isinstance(event, Block):
                response_events = builder.append(event.thinking, "" if chat.forced_tools else event.text)
            elif isinstance(event, FinishedAnswer):
                complete = chat.finish_reason(event) != "length"
                totals = {"usage": _usage(event), "stats": stats(event)}
                response_events = builder.finish(chat.tool_calls(event), complete, **totals)
            else:
                response_events = builder.draft(event)
            for response_event in response_events:
                yield response_event


async def _body(events: AsyncGenerator[ResponseEvent]) -> dict[str, Any]:
    last: ResponseEvent = {}
    async with aclosing(events):
        async for event in events:
            last = event
    return last["response"]


async def _with_failure_event(
    builder: ResponseBuilder, events: AsyncGenerator[ResponseEvent]
) -> AsyncGenerator[ResponseEvent]:
    """Yield the events; an error after the first of them becomes a last event of type response.failed."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except Exception as error:
        if not builder.started:
            raise
        if not isinstance(error, ApiError):
            LOG.exception("An answer failed after its stream began.")
        message = str(error) if isinstance(error, ApiError) else "The server failed; its log says why."
        for event in builder.fail(message):
            yield event


def _usage(answer: FinishedAnswer) -> dict[str, Any]:
    counts = usage([answer])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }
