"""Errors of the server: one JSON form on every route, without paths of the machine and without tracebacks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sightloop.errors import (
    CheckpointError,
    ImageError,
    SightloopError,
    UnsupportedError,
    UsageError,
    is_out_of_memory,
)
from sightloop.types import JsonMapping

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    412: "precondition_failed",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class ApiError(HTTPException):
    """Refusal of a request.

    Attributes:
        param: the field that is wrong, None if there is none.
        code: short name of the cause, for programs.

    Args:
        status: the HTTP status.
        message: the fact, then the remedy.
        param: dotted name of a field.
        code: "model_not_found".
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


class JsonResponse(Response):
    """JSON answer in UTF-8. NaN and infinity, which are no JSON, raise ValueError."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """The bytes of the body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def error_body(status: int, message: str, param: str | None, code: str | None) -> JsonMapping:
    """The `{"error": ...}` of an answer."""
    kind = _TYPES.get(status, "invalid_request_error")
    if code == "model_not_found":  # as OpenAI's server has it
        kind = "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JsonResponse:
    """The answer to a request that failed; what is not foreseen is a 500 that says nothing about the machine."""
    error = as_api_error(error)
    headers: Mapping[str, str] = error.headers or {}
    body = error_body(error.status_code, error.detail, error.param, error.code)
    return JsonResponse(body, error.status_code, dict(headers))


def as_api_error(error: Exception) -> ApiError:
    """Any exception as the refusal that a client sees."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _http_error(error)
        case RequestValidationError():
            return _validation_error(error.errors())
        case ImageError():
            return ApiError(400, f"the image cannot be read: {error.reason}", code="invalid_image")
        case UnsupportedError():
            return ApiError(400, str(error), param="model", code="unsupported")
        case CheckpointError():
            return ApiError(
                503, "the model cannot compute this: the server's log says why", code="model_failed"
            )
        case UsageError():
            return ApiError(400, str(error))
        case SightloopError():
            return ApiError(503, "the server cannot do this now: its log says why")
        case _ if is_out_of_memory(error):
            return ApiError(
                503, "the server is out of memory: send less at a time", code="out_of_memory", retry_after=5
            )
        case _:
            return ApiError(500, "the server failed at this request: its log says why", code="internal_error")


def _http_error(error: HTTPException) -> ApiError:
    """Of the framework: 404, 405, a body that is no JSON."""
    status = 400 if error.status_code == 422 else error.status_code
    message = {404: "there is no such path", 405: "this path does not take this method"}.get(status)
    made = ApiError(status, message or str(error.detail))
    made.headers = error.headers
    return made


def _validation_error(errors: Sequence[JsonMapping]) -> ApiError:
    """The first of what is wrong with a request's fields; of a union's members, that which has the right type."""
    first = next((error for error in errors if not str(error["type"]).endswith("_type")), errors[0])
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    # The names of a union's members are no part of the field's name.
    name = ".".join(part for part in where if not part[:1].isupper() and "[" not in part and "-" not in part)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("json_invalid", "model_attributes_type", "dict_type") and not name:
        message, name = "the body must be a JSON object, sent as application/json", ""
    elif first["type"] == "missing" and not name:
        message = "the body is missing: send a JSON object"
    return ApiError(400, f"{name}: {message}" if name else message, param=name or None, code="invalid_value")
