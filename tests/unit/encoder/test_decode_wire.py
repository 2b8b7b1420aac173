"""Messages between the encoder and its decode workers survive the way, and nothing else does."""

from __future__ import annotations

import pytest

from chiasm.encoder.decode_wire import (
    REPLY_BYTES,
    REQUEST_BYTES,
    DecodeReply,
    DecodeRequest,
    Operation,
    Status,
    WireError,
)


def test_requests_survive_the_way() -> None:
    request = DecodeRequest(Operation.DECODE, 0xABCDEF, 3, 4, 10, 2**40)

    assert len(request.pack()) == REQUEST_BYTES
    assert DecodeRequest.unpack(request.pack()) == request


def test_replies_survive_the_way_with_their_text_cut() -> None:
    reply = DecodeReply(Status.INVALID, 3, 4, "é" + "x" * 300)

    answer = DecodeReply.unpack(reply.pack())

    assert len(reply.pack()) == REPLY_BYTES
    assert answer == DecodeReply(Status.INVALID, 3, 4, "?" + "x" * 255)


@pytest.mark.parametrize("size", [0, 1, REQUEST_BYTES - 1, REQUEST_BYTES, REPLY_BYTES])
def test_other_bytes_are_no_messages(size: int) -> None:
    for kind in (DecodeRequest, DecodeReply):
        with pytest.raises(WireError):
            kind.unpack(b"\xff" * size)


def test_unknown_operations_and_statuses_are_refused() -> None:
    request = bytearray(DecodeRequest(Operation.PROBE, 0, 0, 0, 1, 1).pack())
    reply = bytearray(DecodeReply(Status.OK).pack())
    request[4] = reply[4] = 77

    with pytest.raises(WireError):
        DecodeRequest.unpack(bytes(request))
    with pytest.raises(WireError):
        DecodeReply.unpack(bytes(reply))
