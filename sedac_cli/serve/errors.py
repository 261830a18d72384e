"""What clients are told when something is wrong: one form, OpenAI's, whatever the cause.

raise ApiError(400, "n is 0", param="n")
"""

from __future__ import annotations

from typing import Any

from sedac_cli.errors import InputError, ran_out


class ApiError(Exception):
    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def document(self) -> dict[str, Any]:
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
                 429: "rate_limit_error"}  # fmt: skip
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class QueueFullError(ApiError):
    def __init__(self, waiting: int, retry_after: int):
        super().__init__(
            429, f"{waiting} sequences are waiting: try again in {retry_after} s", code="queue_full",
            headers={"Retry-After": str(retry_after)},
        )  # fmt: skip


def failed(error: Exception) -> ApiError:
    """What the clients of a batch that failed are told."""
    if what := ran_out(error):
        return ApiError(503, f"the server ran out of {what}: ask for fewer tokens, or later", code="out_of_memory")
    if isinstance(error, InputError):  # what this engine does not do for this request
        return ApiError(400, error.message, code="not_served")
    return ApiError(500, f"generation failed: {type(error).__name__}", code="engine_error")
