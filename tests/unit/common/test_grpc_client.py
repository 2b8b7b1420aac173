"""Channels that insist on deadlines, and the pool of endpoints behind names."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from chiasm.common.errors import StoreUnavailableError, UnavailableError
from chiasm.common.grpc_client import (
    EndpointPool,
    error_from_rpc,
    open_channel,
    resolve_addresses,
)
from tests.fakes.echo_server import TOKEN, EchoServer, call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVE = """
import asyncio
from tests.fakes.echo_server import EchoServer
async def hang(request, context):
    await asyncio.Event().wait()
async def main():
    server = EchoServer(hang)
    await server.start()
    print(server.port, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class TellPort:
    """Answers ``port`` with the port of its server and everything else with itself."""

    def __init__(self) -> None:
        self.server = EchoServer(self)

    async def __call__(
        self, request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        """Answer one message."""
        return str(self.server.port).encode() if request == b"port" else request


@pytest.fixture
async def servers() -> AsyncIterator[list[EchoServer]]:
    servers = [TellPort().server for _ in range(3)]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.stop()


@contextlib.asynccontextmanager
async def started(pool: EndpointPool, num_serving: int = 1) -> AsyncIterator[EndpointPool]:
    """Run the pool; wait until that many endpoints serve."""
    await pool.start()
    try:
        await until_serving(pool, num_serving)
        yield pool
    finally:
        await pool.close()


async def until_serving(pool: EndpointPool, count: int) -> None:
    """Return when exactly ``count`` endpoints serve."""
    async with asyncio.timeout(10):
        while len(pool.serving_addresses) != count:
            await pool.wait_for_change()


class Names:
    """A name service whose answers tests change; ``None`` is an outage."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: list[str] | None = list(addresses)

    async def __call__(self, _host: str, _port: int) -> list[str]:
        """Resolve any name."""
        if self.addresses is None:
            raise OSError("name service is down")
        return self.addresses


@pytest.mark.parametrize("kind", ["Unary", "Stream", "Collect", "Duplex"])
async def test_call_without_deadline_is_refused_before_it_is_sent(kind: str) -> None:
    async with open_channel("127.0.0.1:1", None) as channel:
        with pytest.raises(ValueError, match="needs a timeout"):
            await call(channel, kind, timeout=None)


async def test_own_metadata_of_a_call_travels_beside_the_token(
    servers: list[EchoServer],
) -> None:
    async def tell(_request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return str(dict(context.invocation_metadata() or ()).get("traceparent")).encode()

    servers[0].act = tell
    async with open_channel(servers[0].address, TOKEN) as channel:
        answers = await call(channel, "Unary", metadata=(("traceparent", "00-ab-cd-01"),))

    assert answers == [b"00-ab-cd-01"]


async def test_peer_that_is_not_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:1", None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "Unary")

    error = error_from_rpc(caught.value)
    assert type(error) is UnavailableError
    assert "127.0.0.1" not in error.message


async def test_stopped_process_is_noticed_within_three_seconds() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        port = int(await asyncio.wait_for(process.stdout.readline(), 20))
        async with open_channel(f"127.0.0.1:{port}", TOKEN) as channel:
            start: Any = channel.unary_stream("/chiasm.test.EchoService/Stream")
            stream = start(b"x", timeout=30.0)
            assert await stream.read() == b"x"
            process.send_signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - stopped_at < 3.0
    finally:
        process.kill()
        await process.wait()


async def test_localhost_resolves_to_loopback_addresses_without_doubles() -> None:
    addresses = await resolve_addresses("localhost", 80)

    assert "127.0.0.1:80" in addresses
    assert len(addresses) == len(set(addresses))


async def test_calls_take_the_endpoints_behind_a_name_in_turn(servers: list[EchoServer]) -> None:
    names = Names(*(server.address for server in servers))
    pool = EndpointPool("encoder:1", TOKEN, resolver=names)

    async with started(pool, 3):
        used = []
        for _ in range(6):
            async with pool.acquire() as channel:
                used.append(await port_behind(channel))

    assert sorted(used[:3]) == sorted(used[3:]) == sorted(server.port for server in servers)


async def test_several_targets_may_be_given(servers: list[EchoServer]) -> None:
    pool = EndpointPool(f"{servers[0].address}, {servers[1].address},", TOKEN)

    async with started(pool, 2):
        assert set(pool.serving_addresses) == {servers[0].address, servers[1].address}


async def test_call_goes_to_the_endpoint_with_the_fewest_calls_in_flight(
    servers: list[EchoServer],
) -> None:
    pool = EndpointPool("encoder:1", TOKEN, resolver=Names(*(s.address for s in servers)))

    async with started(pool, 3), contextlib.AsyncExitStack() as held:
        first = await held.enter_async_context(pool.acquire())
        second = await held.enter_async_context(pool.acquire())
        for _ in range(3):
            async with pool.acquire() as channel:
                assert channel is not first
                assert channel is not second


async def test_channel_to_avoid_is_lent_only_if_no_other_serves(
    servers: list[EchoServer],
) -> None:
    pool = EndpointPool(f"{servers[0].address},{servers[1].address}", TOKEN)

    async with started(pool, 2):
        async with pool.acquire() as failed:
            pass
        for _ in range(4):
            async with pool.acquire(avoid=[failed]) as other:
                assert other is not failed
        async with pool.acquire(avoid=[failed, other]) as channel:
            assert await call(channel, "Unary", b"still") == [b"still"]


async def test_dead_endpoint_is_left_out_and_taken_again_when_it_is_back(
    servers: list[EchoServer],
) -> None:
    pool = EndpointPool(f"{servers[0].address},{servers[1].address}", TOKEN)

    async with started(pool, 2):
        await servers[0].stop()
        await until_serving(pool, 1)
        for _ in range(4):
            async with pool.acquire() as channel:
                assert await call(channel, "Unary", b"ok") == [b"ok"]
        await servers[0].start(port=servers[0].port)
        await until_serving(pool, 2)


async def test_draining_endpoint_gets_no_new_calls(servers: list[EchoServer]) -> None:
    pool = EndpointPool(f"{servers[0].address},{servers[1].address}", TOKEN)

    async with started(pool, 2):
        await servers[0].grpc_server.set_serving(False)
        await until_serving(pool, 1)

        assert pool.serving_addresses == (servers[1].address,)


async def test_watching_does_not_hold_up_a_server_that_stops(servers: list[EchoServer]) -> None:
    pool = EndpointPool(servers[0].address, TOKEN)

    async with started(pool):
        async with asyncio.timeout(5):
            await servers[0].stop(grace_s=30.0)

        assert not pool.is_serving


async def test_no_serving_endpoint_is_unavailable_with_a_time_to_retry() -> None:
    pool = EndpointPool("127.0.0.1:1", TOKEN, peer="encoder")
    await pool.start()
    try:
        assert not pool.is_serving
        with pytest.raises(UnavailableError, match="No encoder is serving") as caught:
            async with pool.acquire():
                pass
        with pytest.raises(UnavailableError, match="No encoder is serving"):
            await pool.wait_until_serving(0.01)
    finally:
        await pool.close()

    assert caught.value.retry_after_s == 1.0


async def test_endpoint_whose_call_failed_is_passed_over_until_it_says_it_serves(
    servers: list[EchoServer],
) -> None:
    pool = EndpointPool(servers[0].address, TOKEN)

    async with started(pool):
        with pytest.raises(UnavailableError):
            async with pool.acquire():
                raise UnavailableError("The call failed.")
        assert not pool.is_serving

        await until_serving(pool, 1)
        async with pool.acquire() as channel:
            assert await call(channel, "Unary", b"ok") == [b"ok"]


async def test_endpoint_that_lacks_only_the_store_goes_on_getting_calls(
    servers: list[EchoServer],
) -> None:
    async def lack_store(_request: bytes, _context: object) -> bytes:
        raise StoreUnavailableError("The embedding store is unavailable.")

    servers[0].act = lack_store
    pool = EndpointPool(servers[0].address, TOKEN)

    async with started(pool):
        with pytest.raises(grpc.aio.AioRpcError):
            async with pool.acquire() as channel:
                await call(channel, "Unary")

        assert pool.serving_addresses == (servers[0].address,)


async def test_new_and_gone_addresses_of_a_name_are_followed(servers: list[EchoServer]) -> None:
    names = Names(servers[0].address)
    pool = EndpointPool("encoder:1", TOKEN, resolver=names, resolve_interval_s=0.01)

    async with started(pool):
        names.addresses = [servers[0].address, servers[1].address]
        await until_serving(pool, 2)
        names.addresses = [servers[1].address]
        await until_serving(pool, 1)

        assert pool.serving_addresses == (servers[1].address,)


async def test_call_in_flight_outlives_the_address_it_runs_on(servers: list[EchoServer]) -> None:
    names = Names(servers[0].address)
    pool = EndpointPool("encoder:1", TOKEN, resolver=names, resolve_interval_s=60)

    async with started(pool):
        async with pool.acquire() as channel:
            names.addresses = [servers[1].address]
            await pool.refresh()
            assert await call(channel, "Duplex", b"on") == [b"on", b"on"]
        with pytest.raises(grpc.aio.UsageError):
            await call(channel, "Unary")


async def test_outage_of_the_name_service_keeps_the_known_addresses(
    servers: list[EchoServer],
) -> None:
    names = Names(servers[0].address)
    pool = EndpointPool(f"encoder:{servers[0].port}", TOKEN, resolver=names)

    async with started(pool):
        names.addresses = None
        await pool.refresh()

        async with pool.acquire() as channel:
            assert await call(channel, "Unary", b"ok") == [b"ok"]


async def test_name_that_resolves_only_later_is_picked_up(servers: list[EchoServer]) -> None:
    names = Names()
    names.addresses = None
    pool = EndpointPool("encoder:1", TOKEN, resolver=names, resolve_interval_s=0.01)
    await pool.start()
    try:
        assert pool.serving_addresses == ()
        names.addresses = [servers[0].address]
        await until_serving(pool, 1)
    finally:
        await pool.close()


async def port_behind(channel: grpc.aio.Channel) -> int:
    """Return the port of the server that a channel leads to."""
    return int((await call(channel, "Unary", b"port"))[0])
