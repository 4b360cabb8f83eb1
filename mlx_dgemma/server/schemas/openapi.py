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
from .anthropic import Messages
from .bodies import Chat
from .decisions import Decision
from .editing import Completion, Edit, Fill, LlamaInfill, MistralFill
from .fields import Body
from .items import Response
from .ollama import OllamaChat, OllamaGenerate, OllamaShow

Schema = dict[str, Any]

ABOUT = (
    "DiffusionGemma behind the APIs of OpenAI, Anthropic and Ollama. A null field counts as absent. Unknown fields are "
    "refused by name; those that change nothing are told in `x_ignored`. Paths of /v1 work without it, too."
)
POSTS: dict[str, tuple[str, str, type[Body]]] = {  # path: (name, summary, body)
    "/v1/chat/completions": ("chat", "Answer messages.", Chat),
    "/v1/completions": ("complete", "Continue a text, or fill a hole in it.", Completion),
    "/v1/responses": ("respond", "Answer input items.", Response),
    "/v1/messages": ("message", "Answer messages, as Anthropic's API does.", Messages),
    "/api/chat": ("ollama_chat", "Answer messages, as Ollama does.", OllamaChat),
    "/api/generate": ("ollama_generate", "Answer a prompt, or fill a hole, as Ollama does.", OllamaGenerate),
    "/api/show": ("ollama_show", "What the model is and can do, as Ollama tells it.", OllamaShow),
    "/v1/fim/completions": ("fim", "Fill a hole, as Mistral has it.", MistralFill),
    "/infill": ("infill", "Fill a hole, as llama.cpp has it.", LlamaInfill),
    "/completion": ("completion", "Continue a prompt or fill its hole, as llama.cpp has it.", LlamaInfill),
    "/v1/edits": ("edit", "Rewrite a text as an instruction says.", Edit),
    "/v1/fill": ("fill", "Fill the holes of a template.", Fill),
    "/v1/decisions": ("decide", "How probable each choice is as a question's answer.", Decision),
}
COUNTS: dict[str, tuple[str, str, type[Body], str]] = {  # path: (name, summary, body, schema of the one answer)
    "/v1/messages/count_tokens": ("count", "The number of tokens of such messages.", Messages, "TokenCount"),
}
GETS: dict[
    str, tuple[str, str, str, str, tuple[int, ...]]
] = {  # path: (name, summary, media type, schema, statuses of errors)
    "/api/tags": ("ollama_tags", "The served model.", "application/json", "OllamaModels", (401, 403)),
    "/api/ps": ("ollama_ps", "The loaded model.", "application/json", "OllamaModels", (401, 403)),
    "/api/version": ("ollama_version", "Versions.", "application/json", "OllamaVersion", (401, 403)),
    "/api/v0/models": ("studio_models", "The model, as LM Studio tells it.", "application/json", "Models", (401, 403)),
    "/api/v0/models/{id}": ("studio_model", "The same by name.", "application/json", "StudioModel", (401, 403, 404)),
    "/v1/models": ("models", "The served model.", "application/json", "Models", (401, 403)),
    "/v1/models/{id}": ("model", "The served model by name.", "application/json", "Model", (401, 403, 404)),
    "/health": ("health", "Whether the server accepts requests.", "application/json", "Health", (403,)),
    "/metrics": ("metrics", "Metrics in Prometheus' text format.", "text/plain", "Text", (401, 403)),
    "/openapi.json": ("openapi", "This description.", "application/json", "Description", (401, 403)),
    "/": ("page", "A web page to try the model.", "text/html", "Text", (403,)),
}
OLLAMAS = "/api/"  # where its paths begin
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
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
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
BLOCK = {"type": ("text", "thinking", "tool_use"), "text?": str, "thinking?": str, "id?": str, "name?": str}
STUDIO_MODEL = {"id": str, "object": ("model",), "type": str, "max_context_length": int}
MODEL = {**STUDIO_MODEL, "created": int, "owned_by": str, "max_model_len": int, "capabilities": [str]}
OLLAMA = {"model": str, "created_at": str, "done": (True,), "done_reason": str, "eval_count?": int}
OLLAMA_MODEL = {"name": str, "model": str, "modified_at": str, "size": int, "digest": str, "details": "Description"}
PROBABILITY = {"value": {}, "probability": float, "label?": str}
DECIDED = {
    **{"type": ("predicate", "choice", "score", "number"), "name": MAYBE, "mass": float, "probability?": float},
    **{"probabilities?": [PROBABILITY], "confidence?": float, "choice?": {}, "score?": float, "number?": {}},
}
ANSWERS: Schema = {  # in the words of `_schema`
    "ChatAnswer": {**ANSWER, "object": ("chat.completion",), "choices": [{**CHOICE, "message": MESSAGE}]},
    "CompletionAnswer": {**ANSWER, "object": ("text_completion",), "choices": [{**CHOICE, "text": str}]},
    "MistralFillAnswer": {**ANSWER, "object": ("chat.completion",), "choices": [{**CHOICE, "message": MESSAGE}]},
    "LlamaInfillAnswer": {"index?": int, "content?": str, "stop?": FLAG, "model?": str, "tokens_predicted?": int},
    "EditAnswer": {**ANSWER, "object": ("edit",), "choices": [{**CHOICE, "text": str}]},
    "FillAnswer": {**ANSWER, "object": ("fill",), "choices": [{**CHOICE, "text": str, "holes": TEXTS}]},
    "DecisionAnswer": {
        **{"id": str, "object": ("decision",), "created": int, "model": str, "usage": "ResponseUsage"},
        **{"answers": [DECIDED], "stats": {"anyOf": ["Stats", ["Stats"]]}},
    },
    "ResponseAnswer": {
        **{"id": str, "object": ("response",), "created_at": int, "model": str, "status": ("completed", "incomplete")},
        **{"output": [ITEM], "usage": "ResponseUsage", "stats": "Stats", "x_ignored?": [str]},
    },
    "MessagesAnswer": {
        **{"id": str, "type": ("message",), "role": ("assistant",), "model": str, "content": [BLOCK]},
        **{"stop_reason": MAYBE, "stop_sequence": MAYBE, "usage": "MessageUsage", "stats": "Stats"},
    },
    "TokenCount": {"input_tokens": int},
    "MessageUsage": dict.fromkeys(
        ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"), int
    ),
    "Usage": {
        **{"prompt_tokens": int, "completion_tokens": int, "total_tokens": int},
        **{"prompt_tokens_details": CACHED, "completion_tokens_details": THOUGHT},
    },
    "ResponseUsage": {
        **{"input_tokens": int, "output_tokens": int, "total_tokens": int},
        **{"input_tokens_details": CACHED, "output_tokens_details": THOUGHT},
    },
    "Model": MODEL,
    "StudioModel": STUDIO_MODEL,
    "Models": {"object": ("list",), "data": [STUDIO_MODEL]},
    "OllamaChatAnswer": {**OLLAMA, "message": {"role": ("assistant",), "content": str, "thinking?": str}},
    "OllamaGenerateAnswer": {**OLLAMA, "response": str, "thinking?": str},
    "OllamaShowAnswer": {"details": "Description", "model_info": "Description", "capabilities": [str]},
    "OllamaModels": {"models": [OLLAMA_MODEL]},
    "OllamaVersion": {"version": str},
    "OllamaError": {"error": str},
    "MessageError": {"type": ("error",), "error": {"type": str, "message": str}},
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
    model = {"type": "string", "enum": [*settings.names, "default"]}
    paths: Schema = {}
    for path, (name, summary, body) in POSTS.items():
        stream = "application/x-ndjson" if path.startswith(OLLAMAS) else "text/event-stream"
        content = _content("application/json", f"{body.__name__}Answer") | _content(stream, "Description")
        operation = _operation(name, f"{summary} With `stream`, the answer is sent as events.", content, STATUSES)
        operation["requestBody"] = {"required": True, "content": _content("application/json", body.__name__)}
        paths[path] = {"post": operation}
    for path, (name, summary, body, schema) in COUNTS.items():
        operation = _operation(name, summary, _content("application/json", schema), STATUSES)
        operation["requestBody"] = {"required": True, "content": _content("application/json", body.__name__)}
        paths[path] = {"post": operation}
    for path, (name, summary, kind, schema, errors) in GETS.items():
        operation = _operation(name, summary, _content(kind, schema), errors)
        paths[path] = {"get": operation | ({"security": []} if path in PUBLIC_PATHS else {})}
    for path, operations in paths.items():
        for beginning, name in ((OLLAMAS, "OllamaError"), ("/v1/messages", "MessageError")):
            if path.startswith(beginning):
                for operation in operations.values():
                    _with_errors(operation, name)
        if path.endswith("/{id}"):
            operations["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": model}]
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
        named = {**model, "enum": [*model["enum"], ""]}
        schemas[body.__name__]["properties"]["model"] = {"anyOf": [named, {"type": "null"}]}
    return schemas


def _with_errors(operation: Schema, name: str) -> None:
    """Describe the errors of an operation as the clients of its API get them."""
    for status, text in STATUSES.items():
        if str(status) in operation["responses"]:
            content = _content("application/json", name)
            operation["responses"][str(status)] = {"description": text, "content": content}


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
    if shape in (MAYBE, FLAG, TEXTS, {}):
        return shape
    properties = {name.rstrip("?"): _schema(one) for name, one in shape.items()}
    return {"type": "object", "properties": properties, "required": [one for one in shape if one in properties]}
