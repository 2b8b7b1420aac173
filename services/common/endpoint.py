"""One peer of an ``EndpointPool``: its channel, its health, its calls in flight."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health_pb2

from chiasm.common.grpc_channel import open_channel

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

_WATCH_DEADLINE_S = 3600.0
_FIRST_RETRY_S = 0.1
_MAX_RETRY_S = 2.0


class Endpoint:
    """A peer at one address, watched by its health service for as long as it is open."""

    def __init__(
        self,
        address: str,
        token: str | None,
        max_message_bytes: int,
        on_change: Callable[[], None],
    ) -> None:
        """Open the channel and start watching; needs a running event loop.

        Args:
            address: gRPC target of the peer.
            token: Service token to show; ``None`` for public ports.
            max_message_bytes: Bytes of one message, either way.
            on_change: Called whenever ``is_serving`` changed.
        """
        self.address = address
        self.channel = open_channel(address, token, max_message_bytes)
        self.num_outstanding = 0
        self.last_used = 0
        self._is_serving = False
        self._is_retired = False
        self._on_change = on_change
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {address}")

    @property
    def is_serving(self) -> bool:
        """Whether the peer said that it serves, and has not failed since."""
        return self._is_serving

    def suspect(self) -> None:
        """Count the peer as not serving until it says again that it serves."""
        if self._watcher.done() or self._is_retired:
            return
        self._set_serving(False)
        self._watcher.cancel()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.address}")

    async def retire(self) -> None:
        """Stop watching; close the channel now, or when the last call in flight is released."""
        self._is_retired = True
        self._set_serving(False)
        await self._stop_watching()
        if self.num_outstanding == 0:
            await self.channel.close()

    async def release(self) -> None:
        """Count one call less; the last one of a retired endpoint closes the channel."""
        self.num_outstanding -= 1
        if self._is_retired and self.num_outstanding == 0:
            await self.channel.close()

    async def close(self) -> None:
        """Stop watching and close the channel; calls in flight are cancelled."""
        self._is_retired = True
        self._set_serving(False)
        await self._stop_watching()
        await self.channel.close()

    async def _stop_watching(self) -> None:
        self._watcher.cancel()
        # NOTE: awaiting the task itself would swallow a cancellation meant for the caller.
        await asyncio.wait([self._watcher])

    async def _watch(self) -> None:
        """Follow the peer's health; reconnect with growing pauses for as long as it is away."""
        watch = self.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        request = health_pb2.HealthCheckRequest(service="")
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                call = watch(request, timeout=_WATCH_DEADLINE_S)
                async for answer in call:
                    is_serving = answer.status == health_pb2.HealthCheckResponse.SERVING
                    self._set_serving(is_serving)
                    if not is_serving:
                        # A draining server waits for its calls, and this one would never end.
                        call.cancel()
                        break
                    retry_s = _FIRST_RETRY_S
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._set_serving(False)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _MAX_RETRY_S)

    def _set_serving(self, is_serving: bool) -> None:
        if is_serving == self._is_serving:
            return
        self._is_serving = is_serving
        log.info("endpoint_changed", address=self.address, is_serving=is_serving)
        self._on_change()
