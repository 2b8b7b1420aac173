"""Write to a call that takes a stream, without losing the peer's status.

A peer may end a call while its caller still sends: it refuses an upload at the header, or it is
full. ``grpc.aio`` answers a write that loses this race by replacing the peer's status with INTERNAL
(or, for a request iterator, by cancelling the call), and so hides why the call ended. ``send`` and
``finish_sending`` leave the status alone: whoever reads the call learns it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # gRPC's types leave it out

if TYPE_CHECKING:
    from google.protobuf.message import Message

    Call = grpc.aio.StreamStreamCall[Any, Any] | grpc.aio.StreamUnaryCall[Any, Any]


async def send(call: Call, request: Message) -> bool:
    """Send one message; never at the same time as another one of the same call.

    Args:
        call: A call that was started without a request iterator.
        request: What to send.

    Returns:
        ``False`` if the call has ended; reading it tells why.
    """
    if call.done():
        return False
    try:
        await call.wait_for_connection()
        await _core_call(call).send_serialized_message(request.SerializeToString())
    except (grpc.aio.AioRpcError, cygrpc.InternalError):
        return False
    return True


async def finish_sending(call: Call) -> None:
    """Close the sending side of a call; does nothing if the call has ended."""
    if call.done():
        return
    try:
        await call.wait_for_connection()
        await _core_call(call).send_receive_close()
    except (grpc.aio.AioRpcError, cygrpc.InternalError):
        return


def _core_call(call: Call) -> Any:
    # NOTE: the public write turns any failure into the call's status; a test watches this name.
    return call._cython_call  # type: ignore[union-attr]  # private
