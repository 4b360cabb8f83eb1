"""What a client is told when something is wrong, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refused request.

    Args:
        message: one sentence: what is wrong, the value, what to do.
        param: the parameter's name in the request, such as "messages" or "response_format.type".
        status: of the HTTP answer.
        code: a short name that a program can compare.
        headers: to send along.
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
        """The JSON that says so."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
