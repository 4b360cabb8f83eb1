"""Errors of the HTTP API, in the JSON format of the API that was asked: OpenAI's, unless a path has another."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

LOG = logging.getLogger("mlx_dgemma.server")
ANTHROPIC_KINDS = {  # by status
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A refused request.

    Args:
        message: one sentence with what is wrong, the value, and what to do.
        param: name of the request parameter, such as "messages" or "response_format.type".
        status: HTTP status code.
        code: a short name that programs can compare.
        headers: additional response headers.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.param, self.status, self.code, self.headers = param, status, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's format.

    A prompt that is too long is told in the words that agents look for, which then sum the conversation up.
    """
    kind = ANTHROPIC_KINDS.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    message = str(error)
    if error.code == "context_length_exceeded":
        numbers = re.search(r"has (\d+) tokens, but the context leaves room for (\d+)", message)
        beyond = (
            "Prompt is too long: {} tokens > {} maximum.".format(*numbers.groups())
            if numbers
            else "Prompt is too long."
        )
        message = f"{beyond} {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_error(error: ApiError) -> dict[str, Any]:
    """An error in Ollama's format."""
    return {"error": str(error)}


FORMATS: dict[str, Callable[[ApiError], dict[str, Any]]] = {
    "/v1/messages": anthropic_error,
    "/api": ollama_error,
}  # by beginning of a path


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The JSON body of the response to a request for this path."""
    begins = (form for begin, form in FORMATS.items() if path == begin or path.startswith(f"{begin}/"))
    return next(begins, ApiError.body)(error)


def as_api_error(error: Exception) -> ApiError:
    """The error to show in place of any other, which is logged."""
    if isinstance(error, ApiError):
        return error
    LOG.error("An answer failed after its stream began.", exc_info=error)
    return ApiError("The server failed; its log says why.", status=500)
