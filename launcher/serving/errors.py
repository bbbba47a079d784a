"""Errors in OpenAI's shape: what the server answers instead of a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets an error as its answer: an HTTP status and what the client can do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that clients of OpenAI's API know."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unknown_model(name: str, *, known: int) -> Refused:
    """For a model that is not served; known: how many adapters are."""
    message = f"the model {name!r:.200} is not served here: GET /v1/models lists the base and {known:,} adapters"
    return Refused(404, message, code="model_not_found", param="model")
