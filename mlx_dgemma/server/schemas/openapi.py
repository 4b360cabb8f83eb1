"""The OpenAPI 3.1 description of every endpoint. The request bodies are described by their models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from ... import __version__
from ...decoding.events import Stats
from ..security import PUBLIC_PATHS
from ..settings import Settings
from .bodies import Chat, Completion
from .fields import Body
from .items import Response

Schema = dict[str, Any]

ABOUT = (
    "DiffusionGemma behind OpenAI's API. A null field counts as absent. Unknown fields are refused by name; those that "
    "change nothing are told in `x_ignored`."
)
POSTS: dict[str, tuple[str, str, type[Body]]] = {  # path: (name, summary, body)
    "/v1/chat/completions": ("chat", "Answer messages.", Chat),
    "/v1/completions": ("complete", "Continue a text, or fill a hole in it.", Completion),
    "/v1/responses": ("respond", "Answer input items.", Response),
}
GETS: dict[
    str, tuple[str, str, str, str, tuple[int, ...]]
] = {  # path: (name, summary, media type, schema, statuses of errors)
    "/v1/models": ("models", "The served model.", "application/json", "Models", (401, 403)),
    "/v1/models/{id}": ("model", "The served model by name.", "application/json", "Model", (401, 403, 404)),
    "/health": ("health", "Whether the server accepts requests.", "application/json", "Health", (403,)),
    "/metrics": ("metrics", "Metrics in Prometheus' text format.", "text/plain", "Text", (401, 403)),
    "/openapi.json": ("openapi", "This description.", "application/json", "Description", (401, 403)),
    "/": ("page", "A web page to try the model.", "text/html", "Text", (403,)),
}
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
COUNT: Schema = {"type": "integer", "minimum": 0}
MAYBE: Schema = {"type": ["string", "null"]}
CACHED, THOUGHT = {"cached_tokens": int}, {"reasoning_tokens": int}
FUNCTION_CALL = {"id": str, "type": ("function",), "function": {"name": str, "arguments": str}}
MESSAGE = {"role": ("assistant",), "content": MAYBE, "reasoning_content?": str, "tool_calls?": [FUNCTION_CALL]}
CHOICE = {"index": int, "finish_reason": ("stop", "length", "tool_calls")}
ANSWER = {
    "id": str,
    "created": int,
    "model": str,
    "usage": "Usage",
    "stats": {"anyOf": ["Stats", ["Stats"]]},
    "x_ignored?": [str],
}
ITEM = {
    "id": str,
    "type": ("message", "reasoning", "function_call", "custom_tool_call"),
    "status": ("in_progress", "completed", "incomplete"),
}
MODEL = {"id": str, "object": ("model",), "created": int, "owned_by": str}
ANSWERS: Schema = {  # in the words of `_schema`
    "ChatAnswer": {**ANSWER, "object": ("chat.completion",), "choices": [{**CHOICE, "message": MESSAGE}]},
    "CompletionAnswer": {**ANSWER, "object": ("text_completion",), "choices": [{**CHOICE, "text": str}]},
    "ResponseAnswer": {
        **{"id": str, "object": ("response",), "created_at": int, "model": str, "status": ("completed", "incomplete")},
        **{"output": [ITEM], "usage": "ResponseUsage", "stats": "Stats", "x_ignored?": [str]},
    },
    "Usage": {
        **{"prompt_tokens": int, "completion_tokens": int, "total_tokens": int},
        **{"prompt_tokens_details": CACHED, "completion_tokens_details": THOUGHT},
    },
    "ResponseUsage": {
        **{"input_tokens": int, "output_tokens": int, "total_tokens": int},
        **{"input_tokens_details": CACHED, "output_tokens_details": THOUGHT},
    },
    "Model": MODEL,
    "Models": {"object": ("list",), "data": ["Model"]},
    "Health": {
        **{"status": ("ok", "stopping", "failed"), "model": str, "running": int, "waiting": int},
        "seconds_since_step": float,
    },
    "Error": {"error": {"message": str, "type": str, "param": MAYBE, "code": MAYBE}},
    "Description": {},
    "Text": str,
}


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The description of a server with this configuration."""
    model = {"type": "string", "enum": [settings.model, "default"]}
    paths: Schema = {}
    for path, (name, summary, body) in POSTS.items():
        content = _content("application/json", f"{body.__name__}Answer") | _content("text/event-stream", "Text")
        operation = _operation(name, f"{summary} With `stream`, the answer is sent as events.", content, STATUSES)
        operation["requestBody"] = {"required": True, "content": _content("application/json", body.__name__)}
        paths[path] = {"post": operation}
    for path, (name, summary, kind, schema, errors) in GETS.items():
        operation = _operation(name, summary, _content(kind, schema), errors)
        paths[path] = {"get": operation | ({"security": []} if path in PUBLIC_PATHS else {})}
    paths["/v1/models/{id}"]["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": model}]
    stopping = {"description": STATUSES[503], "content": _content("application/json", "Health")}
    paths["/health"]["get"]["responses"]["503"] = stopping
    error = {"content": _content("application/json", "Error")}
    responses: Schema = {str(status): {"description": text, **error} for status, text in STATUSES.items()}
    responses["429"]["headers"] = {"Retry-After": {"schema": COUNT}}
    components = {
        "schemas": _bodies(model) | {name: _schema(shape) for name, shape in ANSWERS.items()},
        "responses": responses,
    }
    components["schemas"]["Stats"] = TypeAdapter(Stats).json_schema(mode="serialization")
    info = {"title": "mlx-dgemma", "version": __version__, "description": ABOUT}
    document: Schema = {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
    if settings.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


class _BodySchema(GenerateJsonSchema):
    """Optional fields may be null, and have no title beside their name."""

    def default_schema(self, schema: Any) -> Schema:
        inner, default = self.generate_inner(schema["schema"]), schema.get("default")
        return {"anyOf": [inner, {"type": "null"}]} if default is None else {**inner, "default": default}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _bodies(model: Schema) -> dict[str, Schema]:
    bodies = [body for _, _, body in POSTS.values()]
    _, described = models_json_schema(
        [(body, "validation") for body in bodies],
        ref_template="#/components/schemas/{model}",
        schema_generator=_BodySchema,
    )
    schemas: dict[str, Schema] = described["$defs"]
    for body in bodies:
        schemas[body.__name__]["properties"]["model"] = {"anyOf": [model, {"type": "null"}]}
    return schemas


def _content(media_type: str, schema: str) -> Schema:
    return {media_type: {"schema": _schema(schema)}}


def _operation(name: str, summary: str, content: Schema, errors: Iterable[int]) -> Schema:
    answers: Schema = {str(status): {"$ref": f"#/components/responses/{status}"} for status in errors}
    answers["200"] = {"description": summary, "content": content}
    return {"operationId": name, "summary": summary, "responses": answers}


def _schema(shape: Any) -> Schema:
    """The JSON Schema of a shape: a type, a tuple of values, a list of one shape, the name of a schema, an object's
    fields by their names, optional ones with a question mark, or a schema."""
    if isinstance(shape, type):
        return {int: COUNT, float: {"type": "number", "minimum": 0}, str: {"type": "string"}}[shape]
    if isinstance(shape, str):
        return {"$ref": f"#/components/schemas/{shape}"}
    if isinstance(shape, tuple):
        return {"enum": list(shape)}
    if isinstance(shape, list):
        return {"type": "array", "items": _schema(shape[0])}
    if "anyOf" in shape:
        return {"anyOf": [_schema(one) for one in shape["anyOf"]]}
    if shape is MAYBE:
        return MAYBE
    properties = {name.rstrip("?"): _schema(one) for name, one in shape.items()}
    return {"type": "object", "properties": properties, "required": [one for one in shape if one in properties]}
