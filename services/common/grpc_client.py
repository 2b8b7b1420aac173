"""Call peers: channels, their errors, and a pool of interchangeable endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING

import grpc
import structlog

from chiasm.common.endpoint import Endpoint
from chiasm.common.errors import StoreUnavailableError, UnavailableError
from chiasm.common.grpc_channel import DEFAULT_MAX_MESSAGE_BYTES, open_channel
from chiasm.common.rpc_status import error_from_status

if TYPE_CHECKING:
    from chiasm.common.errors import ChiasmError

__all__ = ["EndpointPool", "Resolver", "error_from_rpc", "open_channel", "resolve_addresses"]

log = structlog.get_logger(__name__)

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host as gRPC targets; raises ``OSError`` if it has none."""


def error_from_rpc(error: grpc.aio.AioRpcError) -> ChiasmError:
    """Return the error that the peer raised, or a fixed text for the code if it is not ours."""
    return error_from_status(error.code(), error.trailing_metadata(), error.details())


async def resolve_addresses(host: str, port: int) -> list[str]:
    """Return every address of ``host`` as ``ip:port``, IPv6 in brackets, without doubles."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys((family, str(address[0])) for family, _, _, _, address in infos)
    return [
        f"[{ip}]:{port}" if family == socket.AF_INET6 else f"{ip}:{port}" for family, ip in hosts
    ]


class EndpointPool:
    """Interchangeable peers behind one or more names.

    Each name is resolved anew every few seconds; each address has one channel. A call goes to the
    serving endpoint with the fewest calls in flight, in turn among equals.
    """

    def __init__(
        self,
        targets: str,
        token: str | None,
        *,
        peer: str = "service",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        resolve_interval_s: float = 3.0,
        resolver: Resolver = resolve_addresses,
    ) -> None:
        """Build the pool; nothing is resolved or opened before ``start``.

        Args:
            targets: ``host:port`` or ``unix:path``, several separated by commas.
            token: Service token to show; ``None`` for public ports.
            peer: What the endpoints are, for messages, such as ``"encoder"``.
            max_message_bytes: Bytes of one message, either way.
            resolve_interval_s: Seconds between two resolutions of the names.
            resolver: Resolves a host; injected by tests.
        """
        self._targets = tuple(part.strip() for part in targets.split(",") if part.strip())
        self._token = token
        self._peer = peer
        self._max_message_bytes = max_message_bytes
        self._resolve_interval_s = resolve_interval_s
        self._resolver = resolver
        self._endpoints: dict[str, Endpoint] = {}
        self._num_picks = 0
        self._changed = asyncio.Event()
        self._refresher: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        """Whether at least one endpoint serves."""
        return any(endpoint.is_serving for endpoint in self._endpoints.values())

    @property
    def serving_addresses(self) -> tuple[str, ...]:
        """Addresses of the endpoints that serve."""
        return tuple(e.address for e in self._endpoints.values() if e.is_serving)

    async def start(self) -> None:
        """Resolve the names, open the channels and keep both up to date."""
        await self.refresh()
        self._refresher = asyncio.create_task(self._refresh_often(), name="resolve endpoints")

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Return when an endpoint serves; raise ``UnavailableError`` after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_serving:
                    await self.wait_for_change()
        except TimeoutError:
            raise self._unavailable() from None

    async def wait_for_change(self) -> None:
        """Return when an endpoint starts or stops serving.

        Await it directly: as a task it begins later, and misses what changes until then.
        """
        self._changed.clear()
        await self._changed.wait()

    @contextlib.asynccontextmanager
    async def acquire(
        self, avoid: Collection[grpc.aio.Channel] = ()
    ) -> AsyncIterator[grpc.aio.Channel]:
        """Lend the channel of the least busy endpoint for one call.

        If the call ends with UNAVAILABLE, the endpoint is passed over until it says again that it
        serves; not if it answered that the embedding store is unavailable, since it is well itself.

        Args:
            avoid: Channels that are lent only if no other serves, because a call failed there.

        Raises:
            UnavailableError: No endpoint serves.
        """
        endpoint = self._pick(avoid)
        self._num_picks += 1
        endpoint.last_used = self._num_picks
        endpoint.num_outstanding += 1
        try:
            yield endpoint.channel
        except (grpc.aio.AioRpcError, UnavailableError) as error:
            failure = error_from_rpc(error) if isinstance(error, grpc.aio.AioRpcError) else error
            is_away = isinstance(failure, UnavailableError)
            if is_away and not isinstance(failure, StoreUnavailableError):
                endpoint.suspect()
            raise
        finally:
            await endpoint.release()

    async def refresh(self) -> None:
        """Resolve the names once: open what is new, retire what is gone.

        A name that cannot be resolved keeps the addresses it had, so that an outage of the name
        service ends nothing.
        """
        found: dict[str, None] = {}
        for target in self._targets:
            found.update(dict.fromkeys(await self._resolve(target)))
        if not found:
            return
        for address in found.keys() - self._endpoints.keys():
            self._endpoints[address] = Endpoint(
                address, self._token, self._max_message_bytes, self._changed.set
            )
        for address in self._endpoints.keys() - found.keys():
            await self._endpoints.pop(address).retire()

    async def close(self) -> None:
        """Stop resolving and close every channel."""
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.wait([self._refresher])
        endpoints, self._endpoints = self._endpoints, {}
        for endpoint in endpoints.values():
            await endpoint.close()

    async def _refresh_often(self) -> None:
        while True:
            await asyncio.sleep(self._resolve_interval_s)
            await self.refresh()

    async def _resolve(self, target: str) -> list[str]:
        host, _, port = target.rpartition(":")
        if target.startswith("unix:") or not host or not port.isdigit():
            return [target]
        try:
            return await self._resolver(host.strip("[]"), int(port))
        except (OSError, UnicodeError) as error:
            log.warning("name_not_resolved", host=host, error=str(error))
            return [address for address in self._endpoints if address.endswith(f":{port}")]

    def _pick(self, avoid: Collection[grpc.aio.Channel]) -> Endpoint:
        serving = [endpoint for endpoint in self._endpoints.values() if endpoint.is_serving]
        wanted = [endpoint for endpoint in serving if endpoint.channel not in avoid] or serving
        if not wanted:
            raise self._unavailable()
        return min(wanted, key=lambda endpoint: (endpoint.num_outstanding, endpoint.last_used))

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(f"No {self._peer} is serving.", retry_after_s=1.0)
