"""Messages between the encoder and its decode workers survive the way, and nothing else does."""

from __future__ import annotations

import pytest

from chiasm.encoder.decode_wire import (
    MAX_BODY_BYTES,
    MAX_TEXT_CHARS,
    DecodeReply,
    DecodeRequest,
    Operation,
    Status,
    WireError,
)
from chiasm.encoder.wire_image import ImageHeader, ImageTask


@pytest.mark.parametrize("body", [b"", b"task", b"x" * MAX_BODY_BYTES])
def test_requests_survive_the_way(body: bytes) -> None:
    request = DecodeRequest(Operation.DECODE_IMAGE, 10, body)

    assert DecodeRequest.unpack(request.pack()) == request


def test_replies_survive_the_way() -> None:
    reply = DecodeReply(Status.OK, b"header")

    assert DecodeReply.unpack(reply.pack()) == reply


def test_the_text_of_a_failure_is_cut_to_ascii() -> None:
    reply = DecodeReply.failure(Status.INVALID, "é" + "x" * 300)

    answer = DecodeReply.unpack(reply.pack())

    assert answer.status is Status.INVALID
    assert answer.message == "?" + "x" * (MAX_TEXT_CHARS - 1)


@pytest.mark.parametrize("size", [0, 1, 12, 16, 100])
def test_other_bytes_are_no_messages(size: int) -> None:
    for kind in (DecodeRequest, DecodeReply):
        with pytest.raises(WireError):
            kind.unpack(b"\xff" * size)


@pytest.mark.parametrize("kind", [DecodeRequest, DecodeReply])
def test_unknown_operations_and_statuses_are_refused(
    kind: type[DecodeRequest | DecodeReply],
) -> None:
    message = bytearray(make(kind))
    message[4] = 77

    with pytest.raises(WireError):
        kind.unpack(bytes(message))


@pytest.mark.parametrize("kind", [DecodeRequest, DecodeReply])
def test_bodies_of_another_length_than_announced_are_refused(
    kind: type[DecodeRequest | DecodeReply],
) -> None:
    for message in (make(kind) + b"x", make(kind)[:-1]):
        with pytest.raises(WireError):
            kind.unpack(message)


def test_tasks_and_headers_of_pictures_survive_the_way() -> None:
    task = ImageTask(2**40, 3, 4, 0xABCDEF)

    assert ImageTask.unpack(task.pack()) == task
    assert ImageHeader.unpack(ImageHeader(3, 4).pack()) == ImageHeader(3, 4)
    for kind in (ImageTask, ImageHeader):
        with pytest.raises(WireError):
            kind.unpack(b"short")


def make(kind: type[DecodeRequest | DecodeReply]) -> bytes:
    if kind is DecodeRequest:
        return DecodeRequest(Operation.PROBE_IMAGE, 1, b"body").pack()
    return DecodeReply(Status.OK, b"body").pack()
