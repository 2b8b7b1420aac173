"""Serve gRPC: errors and token by interceptor, health, reflection, keepalive and limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from chiasm.common.interceptors import ErrorInterceptor, ServiceTokenInterceptor

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_MAX_MESSAGE_BYTES = 16 << 20
LIVENESS_SERVICE = "liveness"


class AddressInUseError(Exception):
    """The address cannot be listened on."""


class GrpcServer:
    """A ``grpc.aio`` server as every service of the stack runs it.

    Health answers for ``""`` and each service name whether requests are served, and for
    ``liveness`` that the process is alive. A fresh server is alive but not serving.
    """

    def __init__(
        self,
        *,
        address: str,
        service_names: Sequence[str],
        token: str | None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Build the server; register servicers on ``server`` before ``start``.

        Args:
            address: ``host:port`` or ``unix:path``; port 0 lets the system choose.
            service_names: Full names of the services, such as ``"chiasm.v1.EncoderService"``.
            token: Service token that callers must show; ``None`` for a public port.
            max_message_bytes: Most bytes of one received message.
        """
        self._address = address
        self._service_names = tuple(service_names)
        interceptors: list[grpc.aio.ServerInterceptor] = [ErrorInterceptor()]
        if token is not None:
            interceptors.append(ServiceTokenInterceptor(token))
        self._server = grpc.aio.server(
            interceptors=interceptors, options=_server_options(max_message_bytes)
        )
        self._health = health.aio.HealthServicer()

    @property
    def server(self) -> grpc.aio.Server:
        """The server that servicers are registered on."""
        return self._server

    async def start(self) -> int:
        """Listen and answer health checks; not serving until ``set_serving``.

        Returns:
            The bound port; 0 for a UNIX socket.

        Raises:
            AddressInUseError: The address cannot be listened on.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self.set_serving(False)
        await self._health.set(LIVENESS_SERVICE, health_pb2.HealthCheckResponse.SERVING)
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise AddressInUseError(
                f"Cannot listen on {self._address}: it is in use or not an address of this host."
            ) from error
        await self._server.start()
        return 0 if self._address.startswith("unix:") else port

    async def set_serving(self, is_serving: bool) -> None:
        """Tell health checks whether requests are served."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish for ``grace_s`` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # The receiver checks: a sender over its own limit fails a stream without a usable status.
        ("grpc.max_send_message_length", -1),
        # Two servers on one port would share its calls silently.
        ("grpc.so_reuseport", 0),
        # Clients ping every second (grpc_channel.py); the default minimum is five minutes.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        # Notice clients that vanished without closing, so that their work is freed.
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.ping_timeout_ms", 5000),
    ]
