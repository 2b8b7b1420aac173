"""Health, reflection, limits and the end of a server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from chiasm.common.errors import TooLargeError, UnavailableError
from chiasm.common.grpc_client import error_from_rpc, open_channel
from chiasm.common.grpc_server import AddressInUseError, GrpcServer
from tests.fakes.echo_server import SERVICE, TOKEN, EchoServer, call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server() -> AsyncIterator[EchoServer]:
    server = EchoServer()
    await server.start()
    yield server
    await server.stop()


async def health_of(address: str, service: str) -> int:
    async with open_channel(address, None) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
        return int(answer.status)


async def services_of(address: str, token: str | None) -> set[str]:
    async with open_channel(address, token) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        return {
            service.name
            async for answer in ask(iter([request]), timeout=5.0)
            for service in answer.list_services_response.service
        }


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_is_told_without_token_and_follows_readiness(
    server: EchoServer, service: str
) -> None:
    assert await health_of(server.address, service) == SERVING

    await server.grpc_server.set_serving(False)

    assert await health_of(server.address, service) == NOT_SERVING


async def test_liveness_does_not_follow_readiness(server: EchoServer) -> None:
    await server.grpc_server.set_serving(False)

    assert await health_of(server.address, "liveness") == SERVING


async def test_fresh_server_is_alive_but_not_serving() -> None:
    server = GrpcServer(address="127.0.0.1:0", service_names=[SERVICE], token=None)
    port = await server.start()

    assert await health_of(f"127.0.0.1:{port}", "") == NOT_SERVING
    assert await health_of(f"127.0.0.1:{port}", "liveness") == SERVING
    await server.stop(0)


async def test_reflection_on_an_internal_port_needs_the_token(server: EchoServer) -> None:
    assert {SERVICE, "grpc.health.v1.Health"} <= await services_of(server.address, TOKEN)

    with pytest.raises(grpc.aio.AioRpcError, match="service token"):
        await services_of(server.address, None)


async def test_reflection_and_calls_on_a_public_port_need_no_token() -> None:
    server = EchoServer()
    await server.start(token=None)

    assert SERVICE in await services_of(server.address, None)
    async with open_channel(server.address, None) as channel:
        assert await call(channel, "Unary", b"hi") == [b"hi"]
    await server.stop()


@pytest.mark.parametrize("kind", ["Unary", "Duplex"])
@pytest.mark.parametrize(
    ("client_limit", "server_limit"), [(1 << 20, 5000), (5000, 1 << 20), (5000, 5000)]
)
async def test_message_over_the_limit_of_either_side_is_too_large(
    client_limit: int, server_limit: int, kind: str
) -> None:
    server = EchoServer()
    await server.start(max_message_bytes=server_limit)
    try:
        async with open_channel(server.address, TOKEN, client_limit) as channel:
            assert (await call(channel, kind, b"x" * 4000))[0] == b"x" * 4000
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, kind, b"x" * 6000)
    finally:
        await server.stop()

    assert type(error_from_rpc(caught.value)) is TooLargeError


async def test_address_in_use_is_named(server: EchoServer) -> None:
    second = GrpcServer(address=server.address, service_names=[], token=None)

    with pytest.raises(AddressInUseError, match=server.address):
        await second.start()


async def test_server_listens_on_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    server = GrpcServer(address=address, service_names=[SERVICE], token=None)

    assert await server.start() == 0
    assert await health_of(address, "liveness") == SERVING
    await server.stop(0)


async def until_refused(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    """Call until a call is refused; return how.

    A call that reaches the server in the moment of its stop is ended by the library's core with
    CANCELLED, a later one with UNAVAILABLE.
    """
    async with asyncio.timeout(10):
        while True:
            try:
                await call(channel, "Unary", timeout=0.2)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    return error


async def test_stop_lets_running_calls_finish_and_refuses_new_ones() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        entered.set()
        await release.wait()
        return request

    server = EchoServer(wait)
    await server.start()
    async with (
        open_channel(server.address, TOKEN) as old,
        open_channel(server.address, TOKEN) as new,
    ):
        running = asyncio.create_task(call(old, "Duplex", b"old"))
        await asyncio.wait_for(entered.wait(), 5)
        stopping = asyncio.create_task(server.stop(10.0))
        refusal = await until_refused(new)
        release.set()

        assert await running == [b"old", b"old"]
        assert type(error_from_rpc(refusal)) is UnavailableError
        await stopping


async def test_stop_cancels_what_outlasts_the_grace() -> None:
    entered = asyncio.Event()

    async def hang(_request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    server = EchoServer(hang)
    await server.start()
    async with open_channel(server.address, TOKEN) as channel:
        running = asyncio.create_task(call(channel, "Unary"))
        await asyncio.wait_for(entered.wait(), 5)

        await asyncio.wait_for(server.stop(0.05), 5)

        with pytest.raises(grpc.aio.AioRpcError):
            await running
