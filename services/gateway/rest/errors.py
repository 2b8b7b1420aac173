"""Answer errors as the OpenAI API does: an envelope with message, type, param and code."""

from __future__ import annotations

import math
from functools import wraps
from typing import TYPE_CHECKING

import orjson
import structlog
from starlette.responses import Response

from chiasm.common.errors import (
    ChiasmError,
    ConflictError,
    DeadlineExceededError,
    EmbeddingExpiredError,
    InvalidRequestError,
    MediaFetchError,
    MediaNotFoundError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
    StoreUnavailableError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from chiasm.common.logging import current_request_id

from .body import BodyTimeoutError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    Endpoint = Callable[[Request], Awaitable[Response]]

HTTP_STATUS: dict[type[ChiasmError], int] = {
    InvalidRequestError: 400,
    MediaFetchError: 422,
    TooLargeError: 413,
    BodyTimeoutError: 408,
    UnauthenticatedError: 401,
    NotFoundError: 404,
    MediaNotFoundError: 400,
    ConflictError: 409,
    EmbeddingExpiredError: 400,
    QuotaExceededError: 429,
    OverloadedError: 503,
    DeadlineExceededError: 504,
    UnavailableError: 503,
    StoreUnavailableError: 503,
}
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
JSON_TYPE = "application/json"

_DEFAULT_RETRY_AFTER_S = 1.0

log = structlog.get_logger(__name__)


def status_of(error: ChiasmError) -> int:
    """Return the HTTP status of ``error``; of a class that the table lacks, its nearest base's."""
    return next((HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS), 500)


def envelope(error: ChiasmError) -> bytes:
    """Return the JSON body that tells of ``error``."""
    return _envelope(error.message, status_of(error), error.param, error.reason.lower())


def error_response(error: ChiasmError) -> Response:
    """Return the response that tells of ``error``, with headers on when to try again."""
    status = status_of(error)
    headers = {}
    if status in (429, 503):
        retry_after_s = error.retry_after_s or _DEFAULT_RETRY_AFTER_S
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if status == 408:
        headers["connection"] = "close"  # the rest of the body may still come
    if status == 409:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(envelope(error), status, headers, JSON_TYPE)


def internal_error() -> ChiasmError:
    """Return the error that stands for a bug: a fixed text and the request id."""
    return ChiasmError(
        "The server failed; this is a bug. Please report it with the request id"
        f" {current_request_id() or 'of the response'}."
    )


def answers_errors(endpoint: Endpoint) -> Endpoint:
    """Wrap ``endpoint`` so that whatever it raises is answered in the envelope."""

    @wraps(endpoint)
    async def wrapped(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ChiasmError as error:
            return error_response(error)
        except Exception:
            log.exception("request_crashed", path=request.scope["path"])
            return error_response(internal_error())

    return wrapped


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: no such route, or no such method on it."""
    del request
    http_error: HTTPException = error  # type: ignore[assignment]  # registered for this class
    status = http_error.status_code
    if status == 405:
        message, code = "Method Not Allowed", "method_not_allowed"
    else:
        message, code = "Not Found", "not_found"
    body = _envelope(message, status, "", code)
    return Response(body, status, dict(http_error.headers or {}), JSON_TYPE)


def _envelope(message: str, status: int, param: str, code: str) -> bytes:
    return orjson.dumps(
        {
            "error": {
                "message": message,
                "type": ERROR_TYPES.get(status, ERROR_TYPES[500]),
                "param": param or None,
                "code": code,
            }
        }
    )
