"""The one error type of the API. Dialects turn it into their own shape, transports send it."""

from __future__ import annotations

from typing import Any

__all__ = ["ApiError", "draining", "invalid", "not_found"]


class ApiError(Exception):
    """An error a client is told about.

    ``kind`` is OpenAI's ``type`` (``invalid_request_error``, ``authentication_error``,
    ``not_found_error``, ``rate_limit_error``, ``server_error``); ``code`` a stable machine-readable
    word; ``param`` the field at fault (dotted path); ``retry_after_s`` becomes ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400: the request must be changed."""
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 404: what the request names does not exist, or not for this caller."""
    return ApiError(404, message, kind="not_found_error", param=param, code=code)


def draining() -> ApiError:
    """Return a 503: this server ends, another one or the next one serves."""
    return ApiError(
        503,
        "The server is shutting down.",
        kind="server_error",
        code="server_draining",
        retry_after_s=5,
    )
