"""Carry a ``ChiasmError`` over gRPC: to a status with ``google.rpc.ErrorInfo``, and back.

The status code alone cannot tell ``TooLargeError`` from ``MediaFetchError``, so the details name
the class, the reason, the field at fault and the time after which a retry may succeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from chiasm.common.errors import (
    GRPC_STATUS,
    ChiasmError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

DETAILS_METADATA_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "chiasm"
SERVICE_TOKEN_REASON = "SERVICE_TOKEN"

_INTERNAL_TEXT = "The server failed; this is a bug. Please report it with the request id."
_KINDS: dict[str, type[ChiasmError]] = {kind.__name__: kind for kind in GRPC_STATUS}
_UNNAMED: dict[grpc.StatusCode, ChiasmError] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError("A service that this request needs is down."),
    grpc.StatusCode.CANCELLED: UnavailableError("A service ended the call.", reason="CANCELLED"),
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError(
        "The deadline passed before the work was done."
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError("A service is full."),
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError("A service refused the request."),
    grpc.StatusCode.NOT_FOUND: NotFoundError("What the request names does not exist."),
    grpc.StatusCode.ALREADY_EXISTS: ConflictError("What the request names exists already."),
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError("The caller is not known."),
}


def code_of(error: ChiasmError) -> grpc.StatusCode:
    """Return the gRPC code of ``error``; of a class that the table lacks, its nearest base's."""
    return GRPC_STATUS.get(_kind_of(error), grpc.StatusCode.INTERNAL)


def details_of(error: ChiasmError) -> bytes:
    """Return the serialised ``google.rpc.Status`` of ``error``."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=ERROR_DOMAIN,
        metadata={"kind": _kind_of(error).__name__},
    )
    if error.param:
        info.metadata["param"] = error.param
    status = status_pb2.Status(code=code_of(error).value[0], message=error.message)
    if error.retry_after_s is not None:
        info.metadata["retry_after_s"] = repr(float(error.retry_after_s))
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(retry)
    status.details.add().Pack(info)
    return bytes(status.SerializeToString())


def internal_error(request_id: str) -> ChiasmError:
    """Return the error that stands for a bug: its text tells nothing but the request id."""
    return ChiasmError(f"{_INTERNAL_TEXT} (request id {request_id})")


def error_from_status(
    code: grpc.StatusCode,
    trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    text: str | None = None,
) -> ChiasmError:
    """Return the error that a peer answered with.

    Args:
        code: Status code of the call.
        trailing_metadata: Trailing metadata of the call; details of another domain are ignored.
        text: Status text; looked at, never shown, unless the details prove that it is ours.

    Returns:
        The same class, reason, param and retry time if the peer is a Chiasm service, else a fixed
        text for the code. A refused service token is this stack's fault, not the client's, and
        becomes ``UnavailableError``.
    """
    status, info = _parse(trailing_metadata)
    if info is None:
        return _from_code(code, text or "")
    if info.reason == SERVICE_TOKEN_REASON:
        return UnavailableError(
            "The services of this stack do not share one service token.",
            reason=SERVICE_TOKEN_REASON,
        )
    kind = _KINDS.get(info.metadata.get("kind", ""), ChiasmError)
    return kind(
        status.message,
        reason=info.reason,
        param=info.metadata.get("param", ""),
        retry_after_s=_parse_seconds(info.metadata.get("retry_after_s")),
    )


def error_from_details(details: bytes) -> ChiasmError:
    """Return the error that ``details_of`` made ``details`` from; see ``error_from_status``."""
    return error_from_status(grpc.StatusCode.UNKNOWN, ((DETAILS_METADATA_KEY, details),))


def _kind_of(error: ChiasmError) -> type[ChiasmError]:
    return next((kind for kind in type(error).__mro__ if kind in GRPC_STATUS), ChiasmError)


def _from_code(code: grpc.StatusCode, text: str) -> ChiasmError:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return TooLargeError("A message is over the limit of bytes.")
    known = _UNNAMED.get(code)
    if known is None:
        return ChiasmError("A service that this request needs failed.")
    return type(known)(known.message, reason=known.reason)


def _parse(
    trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo | None]:
    status = status_pb2.Status()
    for key, value in trailing_metadata or ():
        if key != DETAILS_METADATA_KEY or not isinstance(value, bytes):
            continue
        try:
            status.ParseFromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                    return status, info
        except DecodeError:
            break
    return status, None


def _parse_seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
