"""The OpenAPI 3.1 description of every endpoint: what a body may hold, and what comes back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .. import __version__
from ..decoding.events import Stats
from ..model.patches import BUDGETS
from .chat import EFFORTS
from .fields import WHOLE
from .items import ROLES, STATUS
from .options import CHOICES, FLAGS, NUMBERS, STOPS, WHOLES
from .responses import LABEL, LABELS, NAME
from .settings import Settings

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WORDED: Schema = {"type": "string", "pattern": "\\S"}  # not empty
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
ANY_OBJECT: Schema = {"type": "object"}
WORDS = {  # what this model's own options mean
    "exact": "Settle a canvas by the reference's rule alone.",
    "fast": "Keep tokens once they are confident instead of drawing them.",
    "max_denoising_steps": "Steps after which a canvas is taken as it is.",
    "stability_threshold": "Earlier steps whose best tokens must be the same.",
    "patience": "Steps without a change that settle a canvas; 0: never.",
    "image_tokens": "Soft tokens that a picture takes at most.",
    "entropy_bound": "Nats accepted at once.",
    "t_min": "Temperature at the last step.",
    "t_max": "Temperature at the first step.",
    "confidence_threshold": "Mean entropy, in nats, below which a canvas has settled.",
    "certainty_threshold": "A canvas has settled where no position has so many nats; 0: never.",
}
STATUSES = {
    400: "A field is wrong or not supported: `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "Another model was asked for.",
    413: "The body is too large.",
    429: "Too many requests are waiting; `Retry-After` says for how many seconds.",
    500: "The server failed.",
    503: "The server is stopping.",
}


def document(settings: Settings) -> dict[str, Any]:
    """The description of a server with these settings."""
    body = (400, 401, 403, 404, 413, 429, 500, 503)
    page = "The page to try the model on."
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-dgemma",
            "version": __version__,
            "description": "DiffusionGemma behind OpenAI's API. A field that is null counts as absent; what is not "
            "described here is refused with its name.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _post("chat", "Answer messages.", "Chat", "ChatAnswer", body)},
            "/v1/completions": {
                "post": _post("complete", "Continue a text, or fill its hole.", "Completion", "CompletionAnswer", body)
            },
            "/v1/responses": {"post": _post("respond", "Answer input items.", "Response", "ResponseAnswer", body)},
            "/v1/models": {"get": _get("models", "The one model.", _json(_ref("Models")), 401, 403)},
            "/v1/models/{id}": {
                "get": _get("model", "The model by its name.", _json(_ref("Model")), 401, 403, 404),
                "parameters": [{"name": "id", "in": "path", "required": True, "schema": _model(settings)}],
            },
            "/health": {"get": _health()},
            "/metrics": {"get": _get("metrics", "Figures for Prometheus.", {"text/plain": {"schema": TEXT}}, 401, 403)},
            "/openapi.json": {"get": _get("openapi", "This description.", _json(ANY_OBJECT), 401, 403)},
            "/": {"get": _get("page", page, {"text/html": {"schema": TEXT}}, 403) | {"security": []}},
        },
        "components": {
            "schemas": {
                "Chat": _chat(settings),
                "Completion": _completion(settings),
                "Response": _response(settings),
                **_answers(),
            },
            "responses": {str(status): _error(status, what) for status, what in STATUSES.items()},
        },
    }
    if settings.api_key is not None:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _get(name: str, summary: str, content: Schema, *errors: int) -> Schema:
    answers = {"200": {"description": summary, "content": content}}
    return {"operationId": name, "summary": summary, "responses": answers | _errors(*errors)}


def _health() -> Schema:
    found = _get("health", "Whether it is worth asking.", _json(_ref("Health")), 403)
    found["responses"]["503"] = {"description": "The server is stopping.", "content": _json(_ref("Health"))}
    return found | {"security": []}


def _post(name: str, summary: str, body: str, answer: str, errors: tuple[int, ...]) -> Schema:
    event = {"event": TEXT, "data": {**TEXT, "contentMediaType": "application/json"}}
    done: Schema = {"description": f"{summary} With `stream`, as events.", "content": _json(_ref(answer))}
    done["content"]["text/event-stream"] = {"schema": {"type": "object", "properties": event, "required": ["data"]}}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {"200": done, **_errors(*errors)},
    }


def _errors(*statuses: int) -> Schema:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error(status: int, what: str) -> Schema:
    found: Schema = {"description": what, "content": _json(_ref("Error"))}
    if status == 429:
        found["headers"] = {"Retry-After": {"schema": COUNT}}
    return found


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    """A closed object of a request; what is not required may be null."""
    given = {
        name: schema if name in required else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in properties.items()
    }
    return {"type": "object", "properties": given, "required": list(required), "additionalProperties": False}


def _answer(**properties: Schema) -> Schema:
    """An object of an answer, whose fields are all there."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _one(*values: Any) -> Schema:
    return {"enum": list(values)}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _whole(low: int, high: int = WHOLE) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _model(settings: Settings) -> Schema:
    return {"type": "string", "enum": [settings.model, "default"]}


def _sent(settings: Settings) -> dict[str, Schema]:
    """How an answer is sent, and what changes nothing."""
    return {
        "model": _model(settings),
        "stream": FLAG,
        "stream_options": _object({"include_usage": FLAG, "include_obfuscation": FLAG}),
        "drafts": {**FLAG, "description": "Tell every denoising step's canvas; with `stream` alone."},
        "user": TEXT,
        "safety_identifier": TEXT,
        "prompt_cache_key": TEXT,
        "metadata": ANY_OBJECT,
        "store": _one(False),
        "service_tier": _one("auto", "default"),
    }


def _drawn(choices: int) -> dict[str, Schema]:
    """How an answer is generated."""
    own: dict[str, Schema] = dict.fromkeys(FLAGS, FLAG)
    own |= {name: _whole(*limits) for name, limits in WHOLES.items()}
    own |= {name: _number(*limits) for name, limits in NUMBERS.items()}
    own["image_tokens"] = _one(*BUDGETS)
    stop = {**TEXT, "minLength": 1}
    return {
        "seed": {**_whole(0, 2**64 - choices), "description": "The same seed gives the same answer."},
        "temperature": {**_number(0, 2), "description": "Multiplies t_min and t_max; 0 is seed 0."},
        "top_p": _one(1),
        "stop": _any(stop, _list(stop, maxItems=STOPS)),
        **{name: {**schema, "description": WORDS[name]} for name, schema in own.items()},
    }


def _penalties() -> dict[str, Schema]:
    nothing = {"type": "object", "maxProperties": 0}
    return {"frequency_penalty": _one(0), "presence_penalty": _one(0), "logit_bias": nothing}


REGEX = {"regex": {**TEXT, "description": "A pattern, as `re.fullmatch` knows it, that the answer's text matches."}}
PICTURE = {**TEXT, "pattern": "^[dD][aA][tT][aA]:", "description": "A data URL."}
FUNCTION = {
    "name": {**TEXT, "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
    "description": TEXT,
    "parameters": {**ANY_OBJECT, "description": "A JSON Schema."},
    "strict": FLAG,
}
FORM = {"name": TEXT, "description": TEXT, "schema": {**ANY_OBJECT, "description": "A JSON Schema."}, "strict": FLAG}


def _chat(settings: Settings) -> Schema:
    text = _object({"type": _one("text"), "text": TEXT}, "type", "text")
    source = _object({"url": PICTURE, "detail": _one("auto")}, "url")
    picture = _object({"type": _one("image_url"), "image_url": source}, "type", "image_url")
    texts, parts = _any(TEXT, _list(text, minItems=1)), _any(WORDED, _list(_any(text, picture), minItems=1))
    function = _object({"name": TEXT, "arguments": {**TEXT, "contentMediaType": "application/json"}}, "name")
    call = {"id": TEXT, "type": _one("function"), "index": COUNT, "function": function}
    said = {"role": _one("assistant"), "content": texts, "reasoning_content": TEXT}
    calls = _list(_object(call, "id", "function"), minItems=1)
    messages = _any(
        _object({"role": _one("system", "developer"), "content": texts}, "role", "content"),
        _object({"role": _one("user"), "content": parts}, "role", "content"),
        _object(said, "role", "content"),
        _object({**said, "tool_calls": calls}, "role", "tool_calls"),
        _object({"role": _one("tool"), "content": texts, "tool_call_id": TEXT}, "role", "content", "tool_call_id"),
    )
    named = _object({"name": TEXT}, "name")
    properties = {
        "messages": _list(messages, minItems=1),
        **_sent(settings),
        **_drawn(CHOICES),
        **_penalties(),
        **REGEX,
        "n": _whole(1, CHOICES),
        "max_completion_tokens": _whole(1),
        "max_tokens": _whole(1),
        "thinking": FLAG,
        "reasoning_effort": _one(*EFFORTS),
        "chat_template_kwargs": _object({"enable_thinking": FLAG}),
        "response_format": _any(
            _object({"type": _one("text", "json_object")}, "type"),
            _object({"type": _one("json_schema"), "json_schema": _object(FORM, "schema")}, "type", "json_schema"),
        ),
        "tools": _list(_object({"type": _one("function"), "function": _object(FUNCTION, "name")}, "function")),
        "tool_choice": _any(
            _one("auto", "none", "required"), _object({"type": _one("function"), "function": named}, "function")
        ),
        "parallel_tool_calls": FLAG,
        "logprobs": FLAG,
        "top_logprobs": _one(0),
    }
    return _object(properties, "messages")


def _completion(settings: Settings) -> Schema:
    properties = {
        "prompt": _any(TEXT, _list(TEXT, minItems=1, maxItems=1)),
        "suffix": TEXT,
        **_sent(settings),
        **_drawn(CHOICES),
        **_penalties(),
        "exact": _one(False),
        "thinking": _one(False),
        "n": _whole(1, CHOICES),
        "max_tokens": _whole(1),
        "echo": _one(False),
        "best_of": _one(1),
    }
    return _object(properties, "prompt")


def _response(settings: Settings) -> Schema:
    text = _object({"type": _one("input_text"), "text": TEXT}, "type", "text")
    said = {"type": _one("output_text"), "text": TEXT, "annotations": _list({}), "logprobs": _list({})}
    picture = {"type": _one("input_image"), "image_url": PICTURE, "detail": _one("auto")}
    part = _any(text, _object(said, "type", "text"), _object(picture, "type", "image_url"))
    common = {"id": TEXT, "status": _one(*STATUS)}
    message = {
        "type": _one("message"),
        "role": _one(*ROLES),
        "content": _any(TEXT, _list(part, minItems=1)),
        "phase": _one("commentary", "final_answer"),
        **common,
    }
    thought = {
        "type": _one("reasoning"),
        "content": _list(_object({"type": _one("reasoning_text"), "text": TEXT}, "text")),
        "summary": _list(_object({"type": _one("summary_text"), "text": TEXT}, "text")),
        **common,
    }
    call = {
        "type": _one("function_call"),
        "call_id": TEXT,
        "name": TEXT,
        "arguments": {**TEXT, "contentMediaType": "application/json"},
        **common,
    }
    output = {
        "type": _one("function_call_output"),
        "call_id": TEXT,
        "output": _any(TEXT, _list(text, minItems=1)),
        **common,
    }
    item = _any(
        _object(message, "role", "content"),
        _object(thought, "type"),
        _object(call, "type", "call_id", "name", "arguments"),
        _object(output, "type", "call_id", "output"),
    )
    form = _any(
        _object({"type": _one("text", "json_object")}, "type"),
        _object({"type": _one("json_schema"), **FORM}, "type", "schema"),
    )
    label = {**TEXT, "maxLength": LABEL}
    labels = {"propertyNames": {"maxLength": NAME}, "additionalProperties": label, "maxProperties": LABELS}
    properties = {
        "input": _any(WORDED, _list(item, minItems=1)),
        "instructions": TEXT,
        **_sent(settings),
        **_drawn(1),
        **REGEX,
        "metadata": {"type": "object", **labels},
        "max_output_tokens": _whole(1),
        "thinking": FLAG,
        "reasoning": _object({"effort": _one(*EFFORTS)}),
        "text": _object({"format": form, "verbosity": _one("medium")}),
        "tools": _list(_object({"type": _one("function"), **FUNCTION}, "type", "name")),
        "tool_choice": _any(
            _one("auto", "none", "required"), _object({"type": _one("function"), "name": TEXT}, "type", "name")
        ),
        "parallel_tool_calls": FLAG,
        "top_logprobs": _one(0),
        "background": _one(False),
        "include": _list({}, maxItems=0),
        "truncation": _one("disabled"),
    }
    return _object(properties, "input")


def _answers() -> dict[str, Schema]:
    kinds = {"int": COUNT, "float": NUMBER, "dict[str, float]": {**ANY_OBJECT, "additionalProperties": NUMBER}}
    stats = _answer(**{one.name: kinds.get(str(one.type), _list(NUMBER)) for one in fields(Stats)})
    cached, thought = _answer(cached_tokens=COUNT), _answer(reasoning_tokens=COUNT)
    reason = _one("stop", "length", "tool_calls")
    function = _answer(name=TEXT, arguments=TEXT)
    message = _answer(role=_one("assistant"), content={"type": ["string", "null"]})
    message["properties"] |= {
        "reasoning_content": TEXT,
        "tool_calls": _list(_answer(id=TEXT, type=_one("function"), function=function)),
    }
    base = {"id": TEXT, "created": COUNT, "model": TEXT, "usage": _ref("Usage")}
    base["stats"] = _any(_ref("Stats"), _list(_ref("Stats")))
    choice = _answer(index=COUNT, message=message, finish_reason=reason)
    model = _answer(id=TEXT, object=_one("model"), created=COUNT, owned_by=TEXT)
    error = {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    counts = {"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}
    return {
        "ChatAnswer": _answer(**base, object=_one("chat.completion"), choices=_list(choice)),
        "CompletionAnswer": _answer(
            **base,
            object=_one("text_completion"),
            choices=_list(_answer(index=COUNT, text=TEXT, finish_reason=reason)),
        ),
        "ResponseAnswer": _answer(
            id=TEXT,
            object=_one("response"),
            created_at=COUNT,
            model=TEXT,
            status=_one("completed", "incomplete"),
            output=_list(_answer(id=TEXT, type=_one("message", "reasoning", "function_call"), status=_one(*STATUS))),
            usage=_answer(**counts, input_tokens_details=cached, output_tokens_details=thought),
            stats=_ref("Stats"),
        ),
        "Usage": _answer(
            prompt_tokens=COUNT,
            completion_tokens=COUNT,
            total_tokens=COUNT,
            prompt_tokens_details=cached,
            completion_tokens_details=thought,
        ),
        "Stats": {**stats, "description": "What the answer took, times in seconds; the seed repeats it."},
        "Model": model,
        "Models": _answer(object=_one("list"), data=_list(model)),
        "Health": _answer(status=_one("ok", "stopping"), model=TEXT, running=COUNT, waiting=COUNT),
        "Error": _answer(error=_answer(**error)),
    }
