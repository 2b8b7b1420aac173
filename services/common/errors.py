"""Errors that may leave a service, and their gRPC status.

::

    ChiasmError
    ├── InvalidRequestError       INVALID_ARGUMENT     the client can fix it; names the field
    │   ├── MediaFetchError       INVALID_ARGUMENT     the URL could not be fetched
    │   └── TooLargeError         INVALID_ARGUMENT     a body or a media item is over a limit
    ├── UnauthenticatedError      UNAUTHENTICATED      no or wrong key
    ├── NotFoundError             NOT_FOUND            unknown model or route
    │   └── MediaNotFoundError    NOT_FOUND            null media whose uuid is unknown or expired
    ├── ConflictError             ALREADY_EXISTS       a uuid is bound to other content
    ├── EmbeddingExpiredError     FAILED_PRECONDITION  evicted and the source is gone
    ├── QuotaExceededError        RESOURCE_EXHAUSTED   this tenant is over its share
    ├── OverloadedError           RESOURCE_EXHAUSTED   a queue or budget of the server is full
    ├── DeadlineExceededError     DEADLINE_EXCEEDED    the deadline passed
    └── UnavailableError          UNAVAILABLE          starting, draining, dependency down
        └── StoreUnavailableError UNAVAILABLE          the embedding store cannot be used now

Everything else is a bug: INTERNAL with a fixed text outside, the traceback in the log. The classes
know no transport; ``GRPC_STATUS`` maps them for gRPC and the gateway maps them for HTTP.
"""

from __future__ import annotations

import grpc


class ChiasmError(Exception):
    """Base of all errors that a client may see.

    Attributes:
        message: Sentence that says what is wrong, where, and what to do; safe to show.
        reason: Stable word for programs, such as ``"INVALID_MEDIA"``.
        param: Path of the field at fault, such as ``"messages[1].content[0]"``; empty if none.
        retry_after_s: Seconds after which a retry may succeed; ``None`` if unknown.
    """

    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        param: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequestError(ChiasmError):
    """The request is wrong and the client can fix it."""

    default_reason = "INVALID_REQUEST"


class MediaFetchError(InvalidRequestError):
    """A media URL could not be fetched, for the client to fix."""

    default_reason = "MEDIA_FETCH_FAILED"


class TooLargeError(InvalidRequestError):
    """A body or a media item is over a limit."""

    default_reason = "TOO_LARGE"


class UnauthenticatedError(ChiasmError):
    """The caller showed no key, or a wrong one."""

    default_reason = "UNAUTHENTICATED"


class NotFoundError(ChiasmError):
    """The named thing does not exist."""

    default_reason = "NOT_FOUND"


class MediaNotFoundError(NotFoundError):
    """Null media whose uuid is unknown or expired."""

    default_reason = "MEDIA_NOT_FOUND"


class ConflictError(ChiasmError):
    """A uuid is already bound to other content."""

    default_reason = "UUID_CONFLICT"


class EmbeddingExpiredError(ChiasmError):
    """An embedding was evicted and its source is gone."""

    default_reason = "EMBEDDING_EXPIRED"


class QuotaExceededError(ChiasmError):
    """The tenant is over its share."""

    default_reason = "QUOTA_EXCEEDED"


class OverloadedError(ChiasmError):
    """A queue or a budget of the server is full."""

    default_reason = "OVERLOADED"


class DeadlineExceededError(ChiasmError):
    """The deadline passed before the work was done."""

    default_reason = "DEADLINE_EXCEEDED"


class UnavailableError(ChiasmError):
    """The service is starting, draining, or lacks something it depends on."""

    default_reason = "UNAVAILABLE"


class StoreUnavailableError(UnavailableError):
    """The embedding store is down, slow, full or read-only."""

    default_reason = "STORE_UNAVAILABLE"


GRPC_STATUS: dict[type[ChiasmError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    MediaFetchError: grpc.StatusCode.INVALID_ARGUMENT,
    TooLargeError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    MediaNotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    EmbeddingExpiredError: grpc.StatusCode.FAILED_PRECONDITION,
    QuotaExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    StoreUnavailableError: grpc.StatusCode.UNAVAILABLE,
}
