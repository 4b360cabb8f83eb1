"""The OpenAPI 3.1 description of every endpoint: request bodies, responses and errors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .. import __version__
from ..decoding.events import Stats
from ..decoding.options import MODES
from ..model.patches import BUDGETS
from .chat import EFFORTS
from .fields import MAX_INTEGER
from .items import ROLES, STATUS
from .options import (
    FLAGS,
    INTEGER_LIMITS,
    MAX_CHOICES,
    MAX_STOP_STRINGS,
    NUMBER_LIMITS,
    TOKEN_LIMITS,
    TOKEN_NUMBER_LIMITS,
)
from .responses import MAX_LABEL_NAME, MAX_LABEL_VALUE, MAX_LABELS
from .settings import Settings

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NON_BLANK: Schema = {"type": "string", "pattern": "\\S"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
ANY_OBJECT: Schema = {"type": "object"}
OPTION_DESCRIPTIONS = {  # of the options that OpenAI does not have
    "exact": "Use the reference implementation's stopping rule only.",
    "fast": "Fix confident tokens for good, which takes fewer steps.",
    "max_denoising_steps": "Maximum number of denoising steps of a canvas.",
    "stability_threshold": "Number of previous steps whose most probable tokens must be the same.",
    "patience": "Finish a canvas after this many steps without a change; 0 disables this.",
    "image_tokens": "Maximum number of soft tokens of a picture.",
    "mode": "diffusion: canvas by canvas; causal: token by token; speculative: the same text from drafts.",
    "top_k": "Token by token: draw among so many most probable tokens; 0: all.",
    "min_p": "Token by token: draw among tokens with this share of the most probable one's probability.",
    "repetition_penalty": "Token by token: make tokens that were there before less probable.",
    "entropy_bound": "Nats; a higher value accepts more positions in one step.",
    "t_min": "Temperature at the last step.",
    "t_max": "Temperature at the first step.",
    "confidence_threshold": "Finish a canvas when its mean entropy, in nats, is below this.",
    "certainty_threshold": "Finish a canvas when every position's entropy, in nats, is below this; 0 disables this.",
}
STATUSES = {
    400: "A field is wrong or not supported; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "The request names another model.",
    413: "The body is too large.",
    429: "The queue is full; retry after `Retry-After` seconds.",
    500: "The server failed.",
    503: "The server is stopping.",
}


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The description of a server with this configuration."""
    body = (400, 401, 403, 404, 413, 429, 500, 503)
    page = "A web page to try the model."
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-dgemma",
            "version": __version__,
            "description": "DiffusionGemma behind OpenAI's API. A null field counts as absent. Unknown fields are "
            "refused by name.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _post("chat", "Answer messages.", "Chat", "ChatAnswer", body)},
            "/v1/completions": {
                "post": _post(
                    "complete", "Continue a text, or fill a hole in it.", "Completion", "CompletionAnswer", body
                )
            },
            "/v1/responses": {"post": _post("respond", "Answer input items.", "Response", "ResponseAnswer", body)},
            "/v1/models": {"get": _get("models", "The served model.", _json(_ref("Models")), 401, 403)},
            "/v1/models/{id}": {
                "get": _get("model", "The served model by name.", _json(_ref("Model")), 401, 403, 404),
                "parameters": [{"name": "id", "in": "path", "required": True, "schema": _model(settings)}],
            },
            "/health": {"get": _health()},
            "/metrics": {
                "get": _get(
                    "metrics", "Metrics in Prometheus' text format.", {"text/plain": {"schema": TEXT}}, 401, 403
                )
            },
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
            "responses": {str(status): _error(status, text) for status, text in STATUSES.items()},
        },
    }
    if settings.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _get(name: str, summary: str, content: Schema, *errors: int) -> Schema:
    answers = {"200": {"description": summary, "content": content}}
    return {"operationId": name, "summary": summary, "responses": answers | _errors(*errors)}


def _health() -> Schema:
    operation = _get("health", "Whether the server accepts requests.", _json(_ref("Health")), 403)
    operation["responses"]["503"] = {"description": "The server is stopping.", "content": _json(_ref("Health"))}
    return operation | {"security": []}


def _post(name: str, summary: str, body: str, answer: str, errors: tuple[int, ...]) -> Schema:
    event = {"event": TEXT, "data": {**TEXT, "contentMediaType": "application/json"}}
    done: Schema = {
        "description": f"{summary} With `stream`, the answer is sent as events.",
        "content": _json(_ref(answer)),
    }
    done["content"]["text/event-stream"] = {"schema": {"type": "object", "properties": event, "required": ["data"]}}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {"200": done, **_errors(*errors)},
    }


def _errors(*statuses: int) -> Schema:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error(status: int, description: str) -> Schema:
    response: Schema = {"description": description, "content": _json(_ref("Error"))}
    if status == 429:
        response["headers"] = {"Retry-After": {"schema": COUNT}}
    return response


def _object(properties: dict[str, Schema], *required: str) -> Schema:
    """An object of a request without additional properties. Optional fields may be null."""
    fields = {
        name: schema if name in required else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in properties.items()
    }
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _answer(**properties: Schema) -> Schema:
    """An object of a response; every field is present."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _enum(*values: Any) -> Schema:
    return {"enum": list(values)}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _integer(low: int, high: int = MAX_INTEGER) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _model(settings: Settings) -> Schema:
    return {"type": "string", "enum": [settings.model, "default"]}


def _delivery_fields(settings: Settings) -> dict[str, Schema]:
    """Fields that control how an answer is sent, and fields that are ignored."""
    return {
        "model": _model(settings),
        "stream": FLAG,
        "stream_options": _object({"include_usage": FLAG, "include_obfuscation": FLAG}),
        "drafts": {**FLAG, "description": "Send the canvas after each denoising step; requires `stream`."},
        "user": TEXT,
        "safety_identifier": TEXT,
        "prompt_cache_key": TEXT,
        "metadata": ANY_OBJECT,
        "store": _enum(False),
        "service_tier": _enum("auto", "default"),
    }


def _generation_fields(choices: int) -> dict[str, Schema]:
    """Fields that control generation."""
    options: dict[str, Schema] = dict.fromkeys(FLAGS, FLAG)
    options |= {name: _integer(*bounds) for name, bounds in INTEGER_LIMITS.items()}
    options |= {name: _number(*bounds) for name, bounds in NUMBER_LIMITS.items()}
    options |= {name: _integer(*bounds) for name, bounds in TOKEN_LIMITS.items()}
    options |= {name: _number(*bounds) for name, bounds in TOKEN_NUMBER_LIMITS.items()}
    options |= {"mode": _enum(*MODES)}
    options["image_tokens"] = _enum(*BUDGETS)
    stop = {**TEXT, "minLength": 1}
    return {
        "seed": {**_integer(0, 2**64 - choices), "description": "The same seed gives the same answer."},
        "temperature": {
            **_number(0, 2),
            "description": "Of tokens; of canvases it multiplies t_min and t_max. 0 means seed 0 if no seed is given.",
        },
        "top_p": {**_number(0.001, 1), "description": "Token by token; whole canvases take 1 alone."},
        "stop": _any(stop, _list(stop, maxItems=MAX_STOP_STRINGS)),
        **{name: {**schema, "description": OPTION_DESCRIPTIONS[name]} for name, schema in options.items()},
    }


def _penalties() -> dict[str, Schema]:
    empty = {"type": "object", "maxProperties": 0}
    return {"frequency_penalty": _enum(0), "presence_penalty": _enum(0), "logit_bias": empty}


REGEX = {"regex": {**TEXT, "description": "A Python regular expression that the whole answer matches."}}
PICTURE = {**TEXT, "pattern": "^[dD][aA][tT][aA]:", "description": "A data URL."}
FUNCTION = {
    "name": {**TEXT, "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
    "description": TEXT,
    "parameters": {**ANY_OBJECT, "description": "A JSON Schema."},
    "strict": FLAG,
}
JSON_SCHEMA_FORMAT = {
    "name": TEXT,
    "description": TEXT,
    "schema": {**ANY_OBJECT, "description": "A JSON Schema."},
    "strict": FLAG,
}


def _chat(settings: Settings) -> Schema:
    text = _object({"type": _enum("text"), "text": TEXT}, "type", "text")
    source = _object({"url": PICTURE, "detail": _enum("auto")}, "url")
    picture = _object({"type": _enum("image_url"), "image_url": source}, "type", "image_url")
    texts, parts = _any(TEXT, _list(text, minItems=1)), _any(NON_BLANK, _list(_any(text, picture), minItems=1))
    function = _object({"name": TEXT, "arguments": {**TEXT, "contentMediaType": "application/json"}}, "name")
    call = {"id": TEXT, "type": _enum("function"), "index": COUNT, "function": function}
    said = {"role": _enum("assistant"), "content": texts, "reasoning_content": TEXT}
    calls = _list(_object(call, "id", "function"), minItems=1)
    messages = _any(
        _object({"role": _enum("system", "developer"), "content": texts}, "role", "content"),
        _object({"role": _enum("user"), "content": parts}, "role", "content"),
        _object(said, "role", "content"),
        _object({**said, "tool_calls": calls}, "role", "tool_calls"),
        _object({"role": _enum("tool"), "content": texts, "tool_call_id": TEXT}, "role", "content", "tool_call_id"),
    )
    named = _object({"name": TEXT}, "name")
    properties = {
        "messages": _list(messages, minItems=1),
        **_delivery_fields(settings),
        **_generation_fields(MAX_CHOICES),
        **_penalties(),
        **REGEX,
        "n": _integer(1, MAX_CHOICES),
        "max_completion_tokens": _integer(1),
        "max_tokens": _integer(1),
        "thinking": FLAG,
        "reasoning_effort": _enum(*EFFORTS),
        "chat_template_kwargs": _object({"enable_thinking": FLAG}),
        "response_format": _any(
            _object({"type": _enum("text", "json_object")}, "type"),
            _object(
                {"type": _enum("json_schema"), "json_schema": _object(JSON_SCHEMA_FORMAT, "schema")},
                "type",
                "json_schema",
            ),
        ),
        "tools": _list(_object({"type": _enum("function"), "function": _object(FUNCTION, "name")}, "function")),
        "tool_choice": _any(
            _enum("auto", "none", "required"), _object({"type": _enum("function"), "function": named}, "function")
        ),
        "parallel_tool_calls": FLAG,
        "logprobs": FLAG,
        "top_logprobs": _enum(0),
    }
    return _object(properties, "messages")


def _completion(settings: Settings) -> Schema:
    properties = {
        "prompt": _any(TEXT, _list(TEXT, minItems=1, maxItems=1)),
        "suffix": TEXT,
        **_delivery_fields(settings),
        **_generation_fields(MAX_CHOICES),
        **_penalties(),
        "exact": _enum(False),
        "thinking": _enum(False),
        "n": _integer(1, MAX_CHOICES),
        "max_tokens": _integer(1),
        "echo": _enum(False),
        "best_of": _enum(1),
    }
    return _object(properties, "prompt")


def _response(settings: Settings) -> Schema:
    text = _object({"type": _enum("input_text"), "text": TEXT}, "type", "text")
    said = {"type": _enum("output_text"), "text": TEXT, "annotations": _list({}), "logprobs": _list({})}
    picture = {"type": _enum("input_image"), "image_url": PICTURE, "detail": _enum("auto")}
    part = _any(text, _object(said, "type", "text"), _object(picture, "type", "image_url"))
    common = {"id": TEXT, "status": _enum(*STATUS)}
    message = {
        "type": _enum("message"),
        "role": _enum(*ROLES),
        "content": _any(TEXT, _list(part, minItems=1)),
        "phase": _enum("commentary", "final_answer"),
        **common,
    }
    thought = {
        "type": _enum("reasoning"),
        "content": _list(_object({"type": _enum("reasoning_text"), "text": TEXT}, "text")),
        "summary": _list(_object({"type": _enum("summary_text"), "text": TEXT}, "text")),
        **common,
    }
    call = {
        "type": _enum("function_call"),
        "call_id": TEXT,
        "name": TEXT,
        "arguments": {**TEXT, "contentMediaType": "application/json"},
        **common,
    }
    output = {
        "type": _enum("function_call_output"),
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
        _object({"type": _enum("text", "json_object")}, "type"),
        _object({"type": _enum("json_schema"), **JSON_SCHEMA_FORMAT}, "type", "schema"),
    )
    label = {**TEXT, "maxLength": MAX_LABEL_VALUE}
    labels = {
        "propertyNames": {"maxLength": MAX_LABEL_NAME},
        "additionalProperties": label,
        "maxProperties": MAX_LABELS,
    }
    properties = {
        "input": _any(NON_BLANK, _list(item, minItems=1)),
        "instructions": TEXT,
        **_delivery_fields(settings),
        **_generation_fields(1),
        **REGEX,
        "metadata": {"type": "object", **labels},
        "max_output_tokens": _integer(1),
        "thinking": FLAG,
        "reasoning": _object({"effort": _enum(*EFFORTS)}),
        "text": _object({"format": form, "verbosity": _enum("medium")}),
        "tools": _list(_object({"type": _enum("function"), **FUNCTION}, "type", "name")),
        "tool_choice": _any(
            _enum("auto", "none", "required"), _object({"type": _enum("function"), "name": TEXT}, "type", "name")
        ),
        "parallel_tool_calls": FLAG,
        "top_logprobs": _enum(0),
        "background": _enum(False),
        "include": _list({}, maxItems=0),
        "truncation": _enum("disabled"),
    }
    return _object(properties, "input")


def _answers() -> dict[str, Schema]:
    seconds = {**ANY_OBJECT, "additionalProperties": NUMBER}
    kinds = {"int": COUNT, "float": NUMBER, "str": TEXT, "dict[str, float]": seconds}
    stats = _answer(**{one.name: kinds.get(str(one.type), _list(NUMBER)) for one in fields(Stats)})
    cached, thought = _answer(cached_tokens=COUNT), _answer(reasoning_tokens=COUNT)
    reason = _enum("stop", "length", "tool_calls")
    function = _answer(name=TEXT, arguments=TEXT)
    message = _answer(role=_enum("assistant"), content={"type": ["string", "null"]})
    message["properties"] |= {
        "reasoning_content": TEXT,
        "tool_calls": _list(_answer(id=TEXT, type=_enum("function"), function=function)),
    }
    base = {"id": TEXT, "created": COUNT, "model": TEXT, "usage": _ref("Usage")}
    base["stats"] = _any(_ref("Stats"), _list(_ref("Stats")))
    choice = _answer(index=COUNT, message=message, finish_reason=reason)
    model = _answer(id=TEXT, object=_enum("model"), created=COUNT, owned_by=TEXT)
    error = {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}
    counts = {"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}
    return {
        "ChatAnswer": _answer(**base, object=_enum("chat.completion"), choices=_list(choice)),
        "CompletionAnswer": _answer(
            **base,
            object=_enum("text_completion"),
            choices=_list(_answer(index=COUNT, text=TEXT, finish_reason=reason)),
        ),
        "ResponseAnswer": _answer(
            id=TEXT,
            object=_enum("response"),
            created_at=COUNT,
            model=TEXT,
            status=_enum("completed", "incomplete"),
            output=_list(_answer(id=TEXT, type=_enum("message", "reasoning", "function_call"), status=_enum(*STATUS))),
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
        "Stats": {
            **stats,
            "description": "Statistics of the answer; times are in seconds. The seed reproduces the answer.",
        },
        "Model": model,
        "Models": _answer(object=_enum("list"), data=_list(model)),
        "Health": _answer(status=_enum("ok", "stopping"), model=TEXT, running=COUNT, waiting=COUNT),
        "Error": _answer(error=_answer(**error)),
    }
