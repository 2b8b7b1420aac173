"""Open channels that notice hung peers, show the service token and insist on deadlines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from chiasm.common.service_token import TOKEN_METADATA_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_MAX_MESSAGE_BYTES = 16 << 20

_PING_INTERVAL_MS = 1000
_PING_TIMEOUT_MS = 1500


def open_channel(
    address: str, token: str | None, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """Open a channel to one peer; connecting happens at the first call.

    A peer that hangs is noticed within three seconds and its calls end with UNAVAILABLE.

    Args:
        address: ``host:port``, ``unix:path`` or any gRPC target.
        token: Service token to show; ``None`` for public ports.
        max_message_bytes: Most bytes of one received message.

    Returns:
        A channel whose calls raise ``ValueError`` at once if they have no ``timeout``.
    """
    channel = grpc.aio.insecure_channel(address, options=_channel_options(max_message_bytes))
    return _GuardedChannel(channel, ((TOKEN_METADATA_KEY, token),) if token is not None else ())


class _GuardedCall:
    """One method of a peer, called with the token and always with a deadline.

    NOTE: client interceptors would do the same, but they pump every message of a stream through
    a queue and a task; this adds nothing per message.
    """

    def __init__(self, call: Callable[..., Any], metadata: tuple[tuple[str, str], ...]) -> None:
        self._call = call
        self._metadata = metadata

    def __call__(
        self,
        *args: object,
        timeout: float | None = None,
        metadata: grpc.aio.Metadata | tuple[tuple[str, str | bytes], ...] | None = None,
        wait_for_ready: bool | None = None,
    ) -> Any:
        """Start the call; ``timeout`` in seconds is required."""
        if timeout is None:
            raise ValueError("A remote call needs a timeout.")
        own = tuple(metadata) if metadata is not None else ()
        return self._call(
            *args,
            timeout=timeout,
            metadata=grpc.aio.Metadata(*own, *self._metadata),
            wait_for_ready=wait_for_ready,
        )


class _GuardedChannel(grpc.aio.Channel):
    """A channel whose methods are ``_GuardedCall``s; all else is the inner channel's."""

    def __init__(self, inner: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._inner = inner
        self._metadata = metadata

    async def __aenter__(self) -> _GuardedChannel:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _GuardedCall(self._inner.unary_unary(*args, **kwargs), self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _GuardedCall(self._inner.unary_stream(*args, **kwargs), self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _GuardedCall(self._inner.stream_unary(*args, **kwargs), self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _GuardedCall(self._inner.stream_stream(*args, **kwargs), self._metadata)


def _channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # The receiver checks: a sender over its own limit fails a stream without a usable status.
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", _PING_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        # NOTE: without this one a stopped process, whose kernel still acknowledges, is noticed
        # only after a minute; the keepalive options alone do not cover it.
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
