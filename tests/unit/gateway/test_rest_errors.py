"""Every error class has its HTTP status, its type and its headers."""

from __future__ import annotations

import json

import pytest

from chiasm.common import errors
from chiasm.gateway.rest.body import BodyTimeoutError
from chiasm.gateway.rest.errors import HTTP_STATUS, error_response, internal_error

STATUS = {
    errors.InvalidRequestError: (400, "BadRequestError"),
    errors.MediaFetchError: (422, "UnprocessableEntityError"),
    errors.TooLargeError: (413, "RequestEntityTooLargeError"),
    errors.UnauthenticatedError: (401, "AuthenticationError"),
    errors.NotFoundError: (404, "NotFoundError"),
    errors.MediaNotFoundError: (400, "BadRequestError"),
    errors.ConflictError: (409, "ConflictError"),
    errors.EmbeddingExpiredError: (400, "BadRequestError"),
    errors.QuotaExceededError: (429, "RateLimitError"),
    errors.OverloadedError: (503, "ServiceUnavailableError"),
    errors.DeadlineExceededError: (504, "GatewayTimeoutError"),
    errors.UnavailableError: (503, "ServiceUnavailableError"),
    errors.StoreUnavailableError: (503, "ServiceUnavailableError"),
}


@pytest.mark.parametrize("kind", list(errors.GRPC_STATUS))
def test_every_error_has_an_envelope(kind: type[errors.ChiasmError]) -> None:
    response = error_response(kind("What is wrong.", param="field"))
    status, error_type = STATUS[kind]
    assert response.status_code == status
    assert json.loads(bytes(response.body))["error"] == {
        "message": "What is wrong.",
        "type": error_type,
        "param": "field",
        "code": kind.default_reason.lower(),
    }


def test_the_table_is_complete() -> None:
    assert set(HTTP_STATUS) == {*errors.GRPC_STATUS, BodyTimeoutError}


def test_a_full_server_says_when_to_come_back() -> None:
    response = error_response(errors.OverloadedError("Full.", retry_after_s=1.2))
    assert response.headers["retry-after"] == "2"


def test_a_conflict_says_not_to_retry() -> None:
    assert error_response(errors.ConflictError("x")).headers["x-should-retry"] == "false"


def test_a_bug_shows_nothing_but_the_request_id() -> None:
    response = error_response(internal_error())
    assert response.status_code == 500
    assert b"this is a bug" in bytes(response.body)
