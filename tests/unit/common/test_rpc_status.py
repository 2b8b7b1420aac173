"""Errors as gRPC statuses, without a server."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from chiasm.common.errors import (
    GRPC_STATUS,
    ChiasmError,
    DeadlineExceededError,
    OverloadedError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
)
from chiasm.common.rpc_status import (
    DETAILS_METADATA_KEY,
    SERVICE_TOKEN_REASON,
    code_of,
    details_of,
    error_from_status,
)


def leaves(kind: type[ChiasmError]) -> list[type[ChiasmError]]:
    """Return every class below ``kind``."""
    return [found for child in kind.__subclasses__() for found in (child, *leaves(child))]


class StoreDownError(UnavailableError):
    """A class that the table does not list."""

    default_reason = "STORE_DOWN"


def carry(error: ChiasmError) -> ChiasmError:
    metadata = ((DETAILS_METADATA_KEY, details_of(error)),)
    return error_from_status(code_of(error), metadata, error.message)


def test_every_class_of_the_tree_stands_in_the_table() -> None:
    ours = {kind for kind in leaves(ChiasmError) if kind.__module__ == "chiasm.common.errors"}

    assert ours == set(GRPC_STATUS)


@pytest.mark.parametrize("kind", GRPC_STATUS)
def test_class_message_reason_param_and_retry_time_come_back(kind: type[ChiasmError]) -> None:
    sent = kind("What is wrong.", reason="SOME_REASON", param="messages[1]", retry_after_s=1.25)

    back = carry(sent)

    assert type(back) is kind
    assert vars(back) == vars(sent)


def test_absent_param_and_retry_time_stay_absent() -> None:
    back = carry(OverloadedError("Full."))

    assert (back.param, back.retry_after_s, back.reason) == ("", None, "OVERLOADED")


def test_class_outside_the_table_comes_back_as_its_nearest_base() -> None:
    back = carry(StoreDownError("The store is down."))

    assert type(back) is UnavailableError
    assert back.reason == "STORE_DOWN"


def test_retry_time_is_also_told_to_clients_that_know_only_google_rpc() -> None:
    status = status_pb2.Status.FromString(details_of(OverloadedError("Full.", retry_after_s=1.5)))
    retry = error_details_pb2.RetryInfo()

    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == 1_500_000_000


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
        (grpc.StatusCode.UNKNOWN, ChiasmError),
        (grpc.StatusCode.INTERNAL, ChiasmError),
        (grpc.StatusCode.UNIMPLEMENTED, ChiasmError),
    ],
)
def test_text_of_a_peer_that_is_not_ours_is_never_shown(
    code: grpc.StatusCode, kind: type[ChiasmError]
) -> None:
    error = error_from_status(code, (), "failed to connect to 10.0.0.7:4443")

    assert type(error) is kind
    assert "10.0.0.7" not in error.message


def test_oversized_message_is_too_large_and_not_an_overload() -> None:
    text = "CLIENT: Sent message larger than max (20 vs. 10)"

    assert type(error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, (), text)) is TooLargeError


def test_refused_service_token_is_the_stacks_fault_and_not_the_clients() -> None:
    refused = UnauthenticatedError("Show the token.", reason=SERVICE_TOKEN_REASON)

    assert type(carry(refused)) is UnavailableError


@pytest.mark.parametrize("details", [b"\xff\xff\xff", b"", "text"])
def test_details_that_cannot_be_read_are_ignored(details: str | bytes) -> None:
    metadata = ((DETAILS_METADATA_KEY, details),)

    error = error_from_status(grpc.StatusCode.UNAVAILABLE, metadata)

    assert type(error) is UnavailableError


def test_details_of_another_domain_are_ignored() -> None:
    status = status_pb2.Status(message="secret of a proxy")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="other", reason="X"))
    metadata = ((DETAILS_METADATA_KEY, status.SerializeToString()),)

    assert "proxy" not in error_from_status(grpc.StatusCode.UNAVAILABLE, metadata).message


def test_retry_time_that_is_no_number_is_dropped() -> None:
    status = status_pb2.Status(message="Full.")
    info = error_details_pb2.ErrorInfo(domain="chiasm", reason="OVERLOADED")
    info.metadata["kind"] = "OverloadedError"
    info.metadata["retry_after_s"] = "soon"
    status.details.add().Pack(info)
    metadata = ((DETAILS_METADATA_KEY, status.SerializeToString()),)

    assert error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, metadata).retry_after_s is None
