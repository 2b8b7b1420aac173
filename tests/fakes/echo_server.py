"""A gRPC server whose four methods, one of each kind, do what a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from chiasm.common.grpc_server import GrpcServer

SERVICE = "chiasm.test.EchoService"
TOKEN = "t" * 40

Act = Callable[[bytes, "grpc.aio.ServicerContext[bytes, bytes]"], Awaitable[bytes]]


class EchoServer:
    """Serves ``Unary``, ``Stream``, ``Collect`` and ``Duplex``; messages are plain bytes.

    Every method hands each message it gets to ``act`` and answers what that returns.
    """

    def __init__(self, act: Act | None = None) -> None:
        self.act = act or _echo
        self.port = 0
        self._grpc: GrpcServer | None = None

    @property
    def address(self) -> str:
        """Address of the running server."""
        return f"127.0.0.1:{self.port}"

    @property
    def grpc_server(self) -> GrpcServer:
        """The running server."""
        assert self._grpc is not None, "the server runs"
        return self._grpc

    async def start(
        self, *, token: str | None = TOKEN, port: int = 0, max_message_bytes: int = 1 << 20
    ) -> None:
        """Listen and serve."""
        self._grpc = GrpcServer(
            address=f"127.0.0.1:{port}",
            service_names=[SERVICE],
            token=token,
            max_message_bytes=max_message_bytes,
        )
        self._grpc.server.add_generic_rpc_handlers((self._handlers(),))
        self.port = await self._grpc.start()
        await self._grpc.set_serving(True)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stop serving."""
        await self.grpc_server.stop(grace_s)

    def _handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, Any] = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "Stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "Collect": grpc.stream_unary_rpc_method_handler(self._collect),
            "Duplex": grpc.stream_stream_rpc_method_handler(self._duplex),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def _unary(
        self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        return await self.act(request, context)

    async def _stream(
        self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        yield request
        yield await self.act(request, context)

    async def _collect(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        return b"".join([await self.act(request, context) async for request in requests])

    async def _duplex(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
            yield await self.act(request, context)


async def call(
    channel: grpc.aio.Channel, kind: str, request: bytes = b"x", **options: Any
) -> list[bytes]:
    """Call one of the four methods with one message; return the answers.

    Args:
        channel: Channel to an ``EchoServer``.
        kind: ``Unary``, ``Stream``, ``Collect`` or ``Duplex``.
        request: The one message sent.
        options: What else the call is given; ``timeout`` is 5 s unless it says otherwise.
    """
    options = {"timeout": 5.0, **options}
    kinds: dict[str, Any] = {
        "Unary": channel.unary_unary,
        "Stream": channel.unary_stream,
        "Collect": channel.stream_unary,
        "Duplex": channel.stream_stream,
    }
    sent = request if kind in ("Unary", "Stream") else iter([request])
    running = kinds[kind](f"/{SERVICE}/{kind}")(sent, **options)
    try:
        if kind in ("Unary", "Collect"):
            return [await running]
        return [answer async for answer in running]
    finally:
        # A task that is cancelled while grpc sends the request leaves the call as it is.
        running.cancel()


async def _echo(request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return request
