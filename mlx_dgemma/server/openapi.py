"""The OpenAPI 3.1 description of every endpoint. The request bodies are described by their models."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from .. import __version__
from ..decoding.events import Stats
from .bodies import Chat, Completion
from .items import Response
from .settings import Settings

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
ANY_OBJECT: Schema = {"type": "object"}
STATUSES = {
    400: "A field is wrong or not supported; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "The request names another model.",
    408: "The request took too long to arrive.",
    413: "The body is too large.",
    429: "The queue is full; retry after `Retry-After` seconds.",
    500: "The server failed.",
    503: "The server is stopping, or has too many connections.",
}


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The description of a server with this configuration."""
    page = "A web page to try the model."
    model = {"type": "string", "enum": [settings.model, "default"]}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-dgemma",
            "version": __version__,
            "description": "DiffusionGemma behind OpenAI's API. A null field counts as absent. Unknown fields are "
            "refused by name.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _post("chat", "Answer messages.", "Chat")},
            "/v1/completions": {"post": _post("complete", "Continue a text, or fill a hole in it.", "Completion")},
            "/v1/responses": {"post": _post("respond", "Answer input items.", "Response")},
            "/v1/models": {"get": _get("models", "The served model.", _json(_ref("Models")), 401, 403)},
            "/v1/models/{id}": {
                "get": _get("model", "The served model by name.", _json(_ref("Model")), 401, 403, 404),
                "parameters": [{"name": "id", "in": "path", "required": True, "schema": model}],
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
            "schemas": {**_bodies(model), **_answers()},
            "responses": {str(status): _error(status, text) for status, text in STATUSES.items()},
        },
    }
    if settings.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


class _BodySchema(GenerateJsonSchema):
    """Optional fields may be null, and have no title beside their name."""

    def default_schema(self, schema: Any) -> Schema:
        inner = self.generate_inner(schema["schema"])
        return (
            _any(inner, {"type": "null"}) if schema.get("default") is None else {**inner, "default": schema["default"]}
        )

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _bodies(model: Schema) -> dict[str, Schema]:
    kinds = (Chat, Completion, Response)
    _, described = models_json_schema(
        [(kind, "validation") for kind in kinds],
        ref_template="#/components/schemas/{model}",
        schema_generator=_BodySchema,
    )
    schemas: dict[str, Schema] = described["$defs"]
    for kind in kinds:
        schemas[kind.__name__]["properties"]["model"] = _any(model, {"type": "null"})
    return schemas


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


def _post(name: str, summary: str, body: str) -> Schema:
    event = {"event": TEXT, "data": {**TEXT, "contentMediaType": "application/json"}}
    done: Schema = {
        "description": f"{summary} With `stream`, the answer is sent as events.",
        "content": _json(_ref(f"{body}Answer")),
    }
    done["content"]["text/event-stream"] = {"schema": {"type": "object", "properties": event, "required": ["data"]}}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {"200": done, **_errors(*STATUSES)},
    }


def _errors(*statuses: int) -> Schema:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error(status: int, description: str) -> Schema:
    response: Schema = {"description": description, "content": _json(_ref("Error"))}
    if status == 429:
        response["headers"] = {"Retry-After": {"schema": COUNT}}
    return response


def _answer(**properties: Schema) -> Schema:
    """An object of a response; every field is present."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _enum(*values: Any) -> Schema:
    return {"enum": list(values)}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _answers() -> dict[str, Schema]:
    kinds = {"int": COUNT, "float": NUMBER, "dict[str, float]": {**ANY_OBJECT, "additionalProperties": NUMBER}}
    stats = _answer(**{one.name: kinds.get(str(one.type), _list(NUMBER)) for one in fields(Stats)})
    cached, thought = _answer(cached_tokens=COUNT), _answer(reasoning_tokens=COUNT)
    reason = _enum("stop", "length", "tool_calls")
    message = _answer(role=_enum("assistant"), content=TEXT_OR_NULL)
    call = _answer(id=TEXT, type=_enum("function"), function=_answer(name=TEXT, arguments=TEXT))
    message["properties"] |= {"reasoning_content": TEXT, "tool_calls": _list(call)}
    base = {"id": TEXT, "created": COUNT, "model": TEXT, "usage": _ref("Usage")}
    base["stats"] = _any(_ref("Stats"), _list(_ref("Stats")))
    model = _answer(id=TEXT, object=_enum("model"), created=COUNT, owned_by=TEXT)
    item = {"type": _enum("message", "reasoning", "function_call")}
    item["status"] = _enum("in_progress", "completed", "incomplete")
    error = {"message": TEXT, "type": TEXT, "param": TEXT_OR_NULL, "code": TEXT_OR_NULL}
    counts = {"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}
    return {
        "ChatAnswer": _answer(
            **base,
            object=_enum("chat.completion"),
            choices=_list(_answer(index=COUNT, message=message, finish_reason=reason)),
        ),
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
            output=_list(_answer(id=TEXT, **item)),
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
